"""Google Cloud Vision's label detection, over gRPC.

Source: Cloud Vision RPC reference, ImageAnnotator.BatchAnnotateImages.
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import google.auth
import grpc
import structlog
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import GoogleAPICallError
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import (
    DefaultCredentialsError,
    GoogleAuthError,
    TransportError,
)
from google.auth.transport.grpc import AuthMetadataPlugin
from google.auth.transport.requests import Request
from google.cloud.vision_v1 import (
    AnnotateImageRequest,
    BatchAnnotateImagesRequest,
    BatchAnnotateImagesResponse,
    Feature,
    Image,
    ImageAnnotatorAsyncClient,
)
from google.cloud.vision_v1.services.image_annotator.transports import (
    ImageAnnotatorGrpcAsyncIOTransport,
)
from google.protobuf import any_pb2  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

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
from app.settings import load_settings

_log = structlog.get_logger(__name__)

# Vision documents no upper limit and returns what it has; its own clients ask for a thousand.
MAX_RESULTS = 1_000
# Far above what was asked for. A longer list is no longer an answer, only work for the event loop.
MAX_LABELS = 10_000
MAX_REPLY_BYTES = 4 * 1024 * 1024

GREETING_SECONDS = 3.0

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    # By gRPC's own defaults a server that was down is tried again after up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REASONS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.TIMEOUT,
    grpc.StatusCode.UNAVAILABLE: Reason.UNAVAILABLE,
    grpc.StatusCode.INTERNAL: Reason.UNAVAILABLE,
    grpc.StatusCode.ABORTED: Reason.UNAVAILABLE,
    grpc.StatusCode.CANCELLED: Reason.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN: Reason.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.THROTTLED,
    grpc.StatusCode.UNAUTHENTICATED: Reason.CREDENTIALS,
    grpc.StatusCode.PERMISSION_DENIED: Reason.CREDENTIALS,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.IMAGE_REJECTED,
}
_SENTENCES = {
    Reason.TIMEOUT: "Google Vision did not answer in time.",
    Reason.UNAVAILABLE: "Google Vision could not be reached or failed.",
    Reason.THROTTLED: "Google Vision has throttled our calls.",
    Reason.CREDENTIALS: "Google Vision did not accept our credentials.",
    Reason.IMAGE_REJECTED: "Google Vision rejected the image.",
    Reason.BAD_REPLY: "Google Vision gave a reply that cannot be read.",
}


class VisionSettings(BaseSettings):
    """endpoint: host:port of a Vision gRPC server, Google's if absent. insecure: it speaks
    plaintext and wants no credentials."""

    model_config = SettingsConfigDict(env_prefix="LOUPE_VISION_", env_ignore_empty=True)

    endpoint: str | None = Field(None, pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):[0-9]{1,5}$")
    insecure: bool = False

    @model_validator(mode="after")
    def _insecure_has_endpoint(self) -> Self:
        if self.insecure and self.endpoint is None:
            raise ValueError("LOUPE_VISION_INSECURE needs LOUPE_VISION_ENDPOINT beside it")
        return self


class Vision:
    """Google Cloud Vision. Confidence is its `score`, 0-1, times 100."""

    name: ClassVar[str] = "vision"
    ANSWER_VERSION: ClassVar[int] = 1
    is_billed: ClassVar[bool] = True
    settings_class: ClassVar[type[BaseSettings]] = VisionSettings

    _client: ImageAnnotatorAsyncClient

    def __init__(self, extension: str, limits: CallLimits, images: ImagePool) -> None:
        self._settings = load_settings(VisionSettings)
        self._limits = limits
        self._channel: grpc.aio.Channel | None = None

    async def open(self) -> None:
        """Raises NotConfigured, but not for a server that is down: gRPC goes on trying."""
        credentials = _anonymous() if self._settings.insecure else await _credentials()
        self._client = ImageAnnotatorAsyncClient(
            credentials=credentials,
            client_options=ClientOptions(api_endpoint=self._settings.endpoint),
            transport=partial(ImageAnnotatorGrpcAsyncIOTransport, channel=self._connect),
        )
        if self._channel is not None:
            await self._greet(self._channel)

    async def detect_labels(self, image: ProviderCopy) -> Answer:
        """All labels for one image, in Vision's order. Raises ProviderError."""
        try:
            reply = await self._client.batch_annotate_images(
                request=_request_for(image.jpeg),
                retry=None,
                timeout=self._limits.timeout_seconds,
            )
        except GoogleAPICallError as error:
            raise _failure_of_call(error) from error
        except (DecodeError, ValueError) as error:
            # Google's client reads the details of a status while it makes the exception.
            raise _failure(Reason.BAD_REPLY) from error
        return Answer(_labels_in(reply))

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _connect(
        self,
        host: str,
        *,
        credentials: Credentials,
        ssl_credentials: grpc.ChannelCredentials | None = None,
        **_: object,
    ) -> grpc.aio.Channel:
        """The channel for Google's transport, which fixes its own options if it makes it itself."""
        if self._settings.insecure:
            self._channel = grpc.aio.insecure_channel(host, options=_CHANNEL_OPTIONS)
            return self._channel
        token_request = partial(_TokenRequest(), timeout=self._limits.timeout_seconds)
        authorisation = _Authorisation(  # type: ignore[no-untyped-call]
            credentials,
            token_request,
            default_host=ImageAnnotatorGrpcAsyncIOTransport.DEFAULT_HOST,
        )
        secure = grpc.composite_channel_credentials(
            ssl_credentials or grpc.ssl_channel_credentials(),
            grpc.metadata_call_credentials(authorisation),
        )
        self._channel = grpc.aio.secure_channel(host, secure, options=_CHANNEL_OPTIONS)
        return self._channel

    async def _greet(self, channel: grpc.aio.Channel) -> None:
        """One round trip that costs nothing, so that connection and access token are there early.

        Any answer will do: Google has no health service, and says UNIMPLEMENTED.
        """
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/grpc.health.v1.Health/Check"
        )
        try:
            await check(b"", timeout=min(GREETING_SECONDS, self._limits.timeout_seconds))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                _log.warning("provider_not_reached", provider=self.name, code=error.code().name)


PROVIDER: Final[type[Provider]] = Vision


# Credentials


class _Authorisation(AuthMetadataPlugin):
    """Google's own, but a refusal to give us a token can be told from a failure to ask for one.

    gRPC reports both as one status and only carries a text.
    """

    REFUSED: Final = "the credentials were refused"

    def __call__(
        self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback
    ) -> None:
        try:
            super().__call__(context, callback)  # type: ignore[no-untyped-call]
        except GoogleAuthError as error:
            passing = isinstance(error, TransportError) or error.retryable
            text = "the credentials could not be refreshed" if passing else self.REFUSED
            _log.warning("provider_credentials", provider=Vision.name, problem=text)
            callback((), RuntimeError(text))


class _TokenRequest(Request):
    """A token service that fails has not refused us. Not all of Google's flows tell these apart."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        response = super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]
        if response.status == HTTPStatus.TOO_MANY_REQUESTS or response.status >= 500:
            raise TransportError(  # type: ignore[no-untyped-call]
                f"The token service answered {response.status}"
            )
        return response


async def _credentials() -> Credentials:
    """Google's default credentials. Raises NotConfigured."""
    try:
        return await look_up(_default_credentials)
    except GoogleAuthError as error:
        raise NotConfigured(f"No usable Google credentials: {error}") from error


def _anonymous() -> Credentials:
    return AnonymousCredentials()  # type: ignore[no-untyped-call]


def _default_credentials() -> Credentials:
    credentials, _project = google.auth.default(
        request=Request() if _is_google_machine() else _AskOnce(),
        default_scopes=ImageAnnotatorGrpcAsyncIOTransport.AUTH_SCOPES,
    )
    return credentials


def _is_google_machine() -> bool:
    try:
        return Path("/sys/class/dmi/id/product_name").read_text().startswith("Google")
    except (OSError, ValueError):
        return False


class _AskOnce(Request):
    """A request whose failure ends the search for credentials.

    The search asks for a metadata service three times, with pauses that would hold up the start of
    every machine that has none.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]
        except TransportError as error:
            raise DefaultCredentialsError(  # type: ignore[no-untyped-call]
                "none in GOOGLE_APPLICATION_CREDENTIALS, none of gcloud's, and no metadata service"
            ) from error


# Requests and replies


def _request_for(jpeg: bytes) -> BatchAnnotateImagesRequest:
    labels = Feature(type_=Feature.Type.LABEL_DETECTION, max_results=MAX_RESULTS)
    one = AnnotateImageRequest(image=Image(content=jpeg), features=[labels])
    return BatchAnnotateImagesRequest(requests=[one])


def _labels_in(reply: BatchAnnotateImagesResponse | None) -> list[Label]:
    """reply: None where gRPC could not decode it."""
    if reply is None:
        raise _failure(Reason.BAD_REPLY)
    # The plain message beneath: Google's wrapper is slow on long lists.
    responses = BatchAnnotateImagesResponse.pb(reply).responses
    if len(responses) != 1:
        raise _failure(Reason.BAD_REPLY)
    error = responses[0].error
    if error.code:
        raise _failure(_reason_of(_CODES.get(error.code)), _unpacked(error.details))
    found = islice(responses[0].label_annotations, MAX_LABELS)
    return [Label(label.description, label.score * 100) for label in found]


# Failures


def _failure_of_call(error: GoogleAPICallError) -> ProviderError:
    text = error.message or ""
    if _Authorisation.REFUSED in text:
        return _failure(Reason.CREDENTIALS)
    if "Received message larger than max" in text:
        # Our own limit, which gRPC reports as if the server had none of something left.
        return _failure(Reason.BAD_REPLY)
    failure = _failure(_reason_of(error.grpc_status_code), error.details)
    failure.was_sent = "failed to connect to all addresses" not in text
    return failure


def _reason_of(code: grpc.StatusCode | None) -> Reason:
    return _REASONS.get(code, Reason.BAD_REPLY) if code else Reason.BAD_REPLY


def _failure(reason: Reason, details: Iterable[object] = ()) -> ProviderError:
    """details: the messages beside a status, one of which may say when to come back."""
    delays = (
        detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        for detail in details
        if isinstance(detail, RetryInfo)
    )
    retry_after_seconds = max((delay for delay in delays if delay > 0), default=None)
    return ProviderError(reason, _SENTENCES[reason], retry_after_seconds=retry_after_seconds)


def _unpacked(details: Iterable[any_pb2.Any]) -> list[RetryInfo]:
    found = []
    for detail in details:
        retry_info = RetryInfo()
        with suppress(DecodeError):
            if detail.Unpack(retry_info):
                found.append(retry_info)
    return found
