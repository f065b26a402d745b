"""A Rekognition server on loopback: AWS JSON 1.1, one operation, scripted answers.

    with RekognitionEmulator() as rekognition:
        monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", rekognition.url)

Faults: `throttle`, `unavailable` (503), `server_error` (500), `hang`, `garbage` (200 with bytes
that are no JSON), `image_rejected`, `credentials`, `empty` (a JSON object without labels), `drip`
(a body that comes byte by byte and never ends), `drip_headers` (headers that do), `oversized`
(more than a client should take), `disconnect` (no reply at all). Besides, any "Code" or
"Code@status" of an AWS error ("ImageTooLargeException", "SlowDown@503").
"""

import base64
import binascii
import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pyvips

from tests.emulators.script import Call, Script

MAX_IMAGE_BYTES = 5_242_880
MIN_SIDE_PX = 80
MAX_SIDE_PX = 10_000
MAX_LABELS = 1_000
DEFAULT_MIN_CONFIDENCE = 55.0
OVERSIZED_BYTES = 8 * 1024 * 1024
DRIP_SECONDS = 0.05

_TARGET = "RekognitionService.DetectLabels"
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_ERRORS = {
    "throttle": "ProvisionedThroughputExceededException@400",
    "unavailable": "ServiceUnavailableException@503",
    "server_error": "InternalServerError@500",
    "image_rejected": "InvalidImageFormatException@400",
    "credentials": "UnrecognizedClientException@400",
}
_SPECIAL = frozenset(
    {"hang", "garbage", "empty", "drip", "drip_headers", "oversized", "disconnect"}
)


class RekognitionEmulator(Script):
    """Listens between `with` and its end, on `port` or one that is free."""

    def __init__(self, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self._server = _Server(("127.0.0.1", port), self, tls)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="rekognition-emulator"
        )

    @property
    def connections(self) -> int:
        """How many have been made to it in all."""
        return self._server.connections

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._end()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()


_POLL_SECONDS = 0.02


class _Server(ThreadingHTTPServer):
    # Joined when the server closes.
    daemon_threads = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], script: RekognitionEmulator, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(address, _Handler)
        self.tls = tls
        self.script = script
        self.connections = 0
        self._open: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            # Shakes hands when it is first read, so in its own thread.
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""

    def hang_up(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _RefusedError(Exception):
    """An AWS error: its code, its HTTP status, its message."""

    def __init__(self, code: str, status: int = 400, message: str = "As the test wished.") -> None:
        super().__init__(code)
        self.code = code
        self.status = status
        self.message = message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        """What real endpoints say to anything that is not a call."""
        self._send(404, b"<UnknownOperationException/>", content_type="application/xml")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = self._request_in(body)
        except _RefusedError as error:
            self._send_error(error)
            return
        call = Call(time.monotonic(), request["image"], request["parameters"])
        with self.server.script._received(call) as fault:
            self.server.script._await_turn(fault, self._is_gone)
            self._answer(call, fault)

    def _request_in(self, body: bytes) -> dict[str, Any]:
        if self.headers.get("X-Amz-Target") != _TARGET:
            raise _RefusedError("UnknownOperationException")
        if not self.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 "):
            raise _RefusedError("MissingAuthenticationTokenException")
        try:
            parameters = json.loads(body)
            image = base64.b64decode(parameters.pop("Image")["Bytes"], validate=True)
        except (ValueError, LookupError, TypeError, binascii.Error) as error:
            raise _RefusedError("SerializationException") from error
        return {"image": image, "parameters": parameters}

    def _answer(self, call: Call, fault: str | None) -> None:
        if fault in ("drip", "drip_headers"):
            self._drip(headers=fault == "drip_headers")
            return
        if fault == "disconnect":
            self.close_connection = True
            return
        try:
            self._send(200, self._reply_to(call, fault))
        except _RefusedError as error:
            self._send_error(error)

    def _reply_to(self, call: Call, fault: str | None) -> bytes:
        if fault is not None and fault not in _SPECIAL:
            code, _, status = _ERRORS.get(fault, fault).partition("@")
            raise _RefusedError(code, int(status or 400))
        _check_image(call.image)
        if fault == "garbage":
            return b"\xff\xfe\x00 not JSON"
        if fault == "empty":
            return b"{}"
        if fault == "oversized":
            return b" " * OVERSIZED_BYTES
        script = self.server.script
        if script.reply is not None:
            return script.reply
        labels = [
            _label(*label) for label in _chosen(script.labels_of(call.image), call.parameters)
        ]
        return json.dumps({"Labels": labels, "LabelModelVersion": "3.0"}).encode()

    def _drip(self, *, headers: bool) -> None:
        self.close_connection = True
        self.send_response(200)
        if not headers:
            self.send_header("Content-Length", str(OVERSIZED_BYTES))
            self.end_headers()
        self.flush_headers()
        with suppress(OSError):
            while not self.server.script._closing.wait(DRIP_SECONDS) and not self._is_gone():
                self.wfile.write(b"x")
                self.wfile.flush()

    def _send_error(self, error: _RefusedError) -> None:
        body = json.dumps({"__type": error.code, "Message": error.message}).encode()
        self._send(error.status, body, retry_after=self.server.script.retry_after)

    def _send(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str = "application/x-amz-json-1.1",
        retry_after: float | None = None,
    ) -> None:
        with suppress(OSError):
            self.send_response(HTTPStatus(status))
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("x-amzn-RequestId", "00000000-0000-0000-0000-000000000000")
            if retry_after is not None:
                self.send_header("Retry-After", f"{retry_after:g}")
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def _is_gone(self) -> bool:
        """The client has hung up: there is an end to read, and clients here do not pipeline."""
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return not socket.socket.recv(self.connection, 1, flags)
        except BlockingIOError:
            return False
        except OSError:
            return True


def _check_image(image: bytes) -> None:
    if len(image) > MAX_IMAGE_BYTES:
        raise _RefusedError("ImageTooLargeException", 400, "Image size is too large.")
    if not image.startswith(_MAGIC):
        raise _RefusedError("InvalidImageFormatException", 400, "Request has invalid image format")
    try:
        pixels = pyvips.Image.new_from_buffer(image, "")
        pixels.avg()
    except pyvips.Error as error:
        raise _RefusedError("InvalidImageFormatException") from error
    if max(pixels.width, pixels.height) > MAX_SIDE_PX:
        raise _RefusedError("ImageTooLargeException", 400, "Image dimensions are too large.")
    if min(pixels.width, pixels.height) < MIN_SIDE_PX:
        raise _RefusedError(
            "InvalidParameterException", 400, "Request has invalid parameters: image too small"
        )


def _chosen(labels: list[tuple[str, float]], parameters: dict[str, Any]) -> list[tuple[str, float]]:
    floor = parameters.get("MinConfidence", DEFAULT_MIN_CONFIDENCE)
    count = parameters.get("MaxLabels", MAX_LABELS)
    if not 0 <= floor <= 100 or not 0 <= count <= MAX_LABELS:
        raise _RefusedError("InvalidParameterException")
    # Written so that a confidence that is no number passes: tests send those.
    passing = [label for label in labels if not label[1] < floor]
    return sorted(passing, key=lambda label: -label[1])[:count]


def _label(name: str, confidence: float) -> dict[str, object]:
    return {
        "Name": name,
        "Confidence": confidence,
        "Instances": [],
        "Parents": [],
        "Aliases": [],
        "Categories": [{"Name": "Animals and Pets"}],
    }
