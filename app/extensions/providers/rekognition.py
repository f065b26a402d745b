"""Amazon Rekognition's label detection, through boto3 in threads of its own.

Source: Amazon Rekognition developer guide, DetectLabels.
"""

import asyncio
import io
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import boto3
import structlog
from botocore import exceptions as aws
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
    AWSPreparedRequest,
    AWSRequest,
    AWSResponse,
)
from botocore.compat import HTTPHeaders
from botocore.config import Config
from botocore.parsers import ResponseParserError
from pydantic_settings import BaseSettings
from urllib3.exceptions import HTTPError, ReadTimeoutError

from app.extensions.lookup import look_up
from app.extensions.provider import (
    Answer,
    CallLimits,
    Label,
    NotConfigured,
    Provider,
    ProviderError,
    Reason,
)
from app.images import ImagePool, ProviderCopy

if TYPE_CHECKING:
    from types_boto3_rekognition import RekognitionClient

T = TypeVar("T")

_log = structlog.get_logger(__name__)

# The service's own upper limit. Its default floor of confidence is 55.
MAX_RESULTS = 1_000
# Far above what was asked for. A longer list is no longer an answer, only work.
MAX_LABELS = 10_000
MAX_VERSION_CHARACTERS = 100
MAX_REPLY_BYTES = 4 * 1024 * 1024

CONNECT_SECONDS = 3.0
GREETING_SECONDS = 3.0
CLOSE_SECONDS = 2.0

_REASONS = {
    Reason.THROTTLED: (
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "SlowDown",
        "Throttling",
        "ThrottledException",
        "ThrottlingException",
        "TooManyRequestsException",
    ),
    Reason.IMAGE_REJECTED: (
        "ImageTooLargeException",
        "InvalidImageFormatException",
        "InvalidParameterException",
        "ValidationException",
    ),
    Reason.CREDENTIALS: (
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "IncompleteSignatureException",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NotAuthorized",
        "OptInRequired",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    ),
    Reason.UNAVAILABLE: ("InternalServerError", "ServiceUnavailableException"),
}
_REASON_OF_CODE = {code: reason for reason, codes in _REASONS.items() for code in codes}
_SENTENCES = {
    Reason.TIMEOUT: "Amazon Rekognition did not answer in time.",
    Reason.UNAVAILABLE: "Amazon Rekognition could not be reached or failed.",
    Reason.THROTTLED: "Amazon Rekognition has throttled our calls.",
    Reason.CREDENTIALS: "Amazon Rekognition did not accept our credentials.",
    Reason.IMAGE_REJECTED: "Amazon Rekognition rejected the image.",
    Reason.BAD_REPLY: "Amazon Rekognition gave a reply that cannot be read.",
}
# Nothing of the request can have reached the service.
_NOT_CONNECTED = (aws.EndpointConnectionError, aws.ConnectTimeoutError)
_NO_CREDENTIALS = (
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.RefreshWithMFAUnsupportedError,
    aws.SSOError,
    aws.TokenRetrievalError,
)
# What botocore's parser raises when the JSON is not of the shape that it walks.
_UNREADABLE = (
    ResponseParserError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class RekognitionSettings(BaseSettings):
    """None of ours. boto3 reads AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_REKOGNITION and the like."""


class Rekognition:
    """Amazon Rekognition. Confidence as it gives it, in percent."""

    name: ClassVar[str] = "rekognition"
    ANSWER_VERSION: ClassVar[int] = 1
    is_billed: ClassVar[bool] = True
    settings_class: ClassVar[type[BaseSettings]] = RekognitionSettings

    _client: "RekognitionClient"

    def __init__(self, extension: str, limits: CallLimits, images: ImagePool) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.concurrency, thread_name_prefix=self.name)
        self._calls: set[_Call] = set()
        self._opened = False

    async def open(self) -> None:
        """Raises NotConfigured. A server that is down is none of its errors."""
        try:
            self._client = await look_up(self._make_client)
        except (aws.BotoCoreError, ValueError) as error:
            raise NotConfigured(f"Amazon Rekognition is not configured: {error}") from error
        self._opened = True
        await self._rehearse()

    async def detect_labels(self, image: ProviderCopy) -> Answer:
        """All labels for one image, in Rekognition's order. Raises ProviderError."""
        try:
            return await self._in_thread(
                lambda: self._detect(image.jpeg), self._limits.timeout_seconds
            )
        except TimeoutError as error:
            raise _failure(Reason.TIMEOUT) from error

    async def close(self) -> None:
        for call in list(self._calls):
            call.cut()
        with suppress(TimeoutError):
            await look_up(
                lambda: self._threads.shutdown(cancel_futures=True), timeout_seconds=CLOSE_SECONDS
            )
        if self._opened:
            self._client.close()

    async def _in_thread(self, function: Callable[[], T], timeout_seconds: float) -> T:
        """Ends in time, whatever the server sends, and so does the thread. Raises TimeoutError."""
        call = _Call()
        self._calls.add(call)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_seconds):
                return await loop.run_in_executor(self._threads, call.run, function)
        finally:
            call.cut()
            self._calls.discard(call)

    # In a thread

    def _make_client(self) -> "RekognitionClient":
        session = boto3.Session()
        client = session.client("rekognition", config=_config(self._limits))
        if session.get_credentials() is None:
            raise aws.NoCredentialsError
        http: Any = client._endpoint.http_session  # type: ignore[attr-defined]
        http._pool_classes_by_scheme.update(http=_Pool, https=_SecurePool)
        send: Any = _BoundedSend(http)
        client.meta.events.register("before-send.rekognition", send)
        return client

    def _detect(self, jpeg: bytes) -> Answer:
        try:
            reply: Any = self._client.detect_labels(
                Image={"Bytes": jpeg}, MaxLabels=MAX_RESULTS, MinConfidence=0
            )
            return _answer_in(reply)
        except _ReplyTooLargeError as error:
            raise _failure(Reason.BAD_REPLY) from error
        except aws.ClientError as error:
            raise _failure_of_reply(error.response) from error
        except (aws.BotoCoreError, HTTPError, OSError) as error:
            was_sent = not isinstance(error, _NOT_CONNECTED)
            raise _failure(_reason_without_reply(error), was_sent=was_sent) from error
        except _UNREADABLE as error:
            raise _failure(Reason.BAD_REPLY) from error

    async def _rehearse(self) -> None:
        """A call that costs nothing, so that connection, credentials and models are there early.

        Whatever goes wrong here will go wrong in a real call again, or will have passed by then.
        """
        try:
            await self._in_thread(
                self._rehearse_in_thread, min(GREETING_SECONDS, self._limits.timeout_seconds)
            )
        except Exception as error:
            _log.warning("provider_not_reached", provider=self.name, problem=type(error).__name__)

    def _rehearse_in_thread(self) -> None:
        _current.rehearses = True
        try:
            self._client.detect_labels(Image={"Bytes": b"none"})
        finally:
            _current.rehearses = False


PROVIDER: Final[type[Provider]] = Rekognition


def _config(limits: CallLimits) -> Config:
    return Config(
        connect_timeout=min(CONNECT_SECONDS, limits.timeout_seconds),
        read_timeout=limits.timeout_seconds,
        max_pool_connections=limits.concurrency,
        retries={"total_max_attempts": 1, "mode": "standard"},
    )


# One call: timeouts of sockets bound silence only, so it is cut off from outside when time is up.

_current = threading.local()
_ownership = threading.Lock()


class _Call:
    """One function in a thread, and the connection that it holds at the moment."""

    def __init__(self) -> None:
        self._connection: _Cuttable | None = None
        self._is_over = False

    def run(self, function: Callable[[], T]) -> T:
        _current.call = self
        try:
            return function()
        finally:
            _current.call = None
            self._connection = None

    def take(self, connection: "_Cuttable") -> None:
        with _ownership:
            if self._is_over:
                raise TimeoutError
            self._connection = connection
            connection.call = self

    def cut(self) -> None:
        """Ends whatever the thread waits for. Nothing happens to a connection passed on since."""
        with _ownership:
            self._is_over = True
            connection = self._connection
            if connection is None or connection.call is not self or connection.sock is None:
                return
            with suppress(OSError):
                # The plain method: TLS's own would change the state under the reading thread.
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


class _Cuttable:
    """A connection that tells the call of its thread when it works for it."""

    sock: Any
    call: _Call | None = None

    def connect(self) -> None:
        self._serve()
        super().connect()  # type: ignore[misc]

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self._serve()
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def _serve(self) -> None:
        call: _Call | None = getattr(_current, "call", None)
        if call is not None:
            call.take(self)


class _Connection(_Cuttable, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _SecureConnection(_Cuttable, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _ReplyTooLargeError(Exception):
    pass


class _Body(io.BytesIO):
    """A reply that has been read, in the form that botocore reads."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()


class _BoundedSend:
    """Sends for botocore, which by itself would read a reply of any size into memory."""

    def __init__(self, http: Any) -> None:
        self._http = http

    def __call__(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:
        if getattr(_current, "rehearses", False):
            self._send(AWSRequest("GET", request.url).prepare())
            return AWSResponse(request.url, 200, HTTPHeaders(), _Body(b'{"Labels": []}'))
        return self._send(request)

    def _send(self, request: AWSPreparedRequest) -> AWSResponse:
        request.stream_output = True
        response = self._http.send(request)
        body = response.raw.read(MAX_REPLY_BYTES + 1)
        if len(body) > MAX_REPLY_BYTES:
            response.raw.close()
            raise _ReplyTooLargeError
        return AWSResponse(response.url, response.status_code, response.headers, _Body(body))


# Replies


def _answer_in(reply: Any) -> Answer:
    """Raises one of _UNREADABLE."""
    labels = reply["Labels"]
    if not isinstance(labels, list):
        raise TypeError("Labels is not a list")
    version = reply.get("LabelModelVersion")
    return Answer(
        [_label_of(label) for label in labels[:MAX_LABELS]],
        version[:MAX_VERSION_CHARACTERS] if isinstance(version, str) else None,
    )


def _label_of(label: Any) -> Label:
    name, confidence = label["Name"], label["Confidence"]
    if not isinstance(name, str):
        raise TypeError("Name is not a string")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        raise TypeError("Confidence is not a number")
    return Label(name, float(confidence))


# Failures


def _failure_of_reply(response: Any) -> ProviderError:
    metadata = response.get("ResponseMetadata", {})
    code = response.get("Error", {}).get("Code")
    reason = _REASON_OF_CODE.get(code) or _reason_of_status(metadata.get("HTTPStatusCode", 0))
    return _failure(reason, metadata.get("HTTPHeaders", {}).get("retry-after"))


def _reason_of_status(status: int) -> Reason:
    if status == 429:
        return Reason.THROTTLED
    if status in (401, 403):
        return Reason.CREDENTIALS
    if status == 413:
        return Reason.IMAGE_REJECTED
    return Reason.UNAVAILABLE if status >= 500 else Reason.BAD_REPLY


def _reason_without_reply(error: Exception) -> Reason:
    if isinstance(error, aws.ReadTimeoutError | ReadTimeoutError):
        return Reason.TIMEOUT
    if isinstance(error, _NO_CREDENTIALS):
        return Reason.CREDENTIALS
    if isinstance(error, aws.ParamValidationError):
        return Reason.IMAGE_REJECTED
    return Reason.UNAVAILABLE


def _failure(
    reason: Reason, retry_after: str | None = None, *, was_sent: bool = True
) -> ProviderError:
    return ProviderError(
        reason,
        _SENTENCES[reason],
        retry_after_seconds=_seconds_until(retry_after),
        was_sent=was_sent,
    )


def _seconds_until(retry_after: str | None) -> float | None:
    """retry_after: the header, seconds or a date. None if it says nothing that can be used."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except (ValueError, OverflowError):
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else None
