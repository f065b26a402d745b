"""A webhook receiver, as small as one can be: takes the body, checks the signature, says 200."""

import base64
import hashlib
import hmac
import json
import queue
import threading
import time
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

TOLERANCE_SECONDS = 300
MAX_BODY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Webhook:
    event_id: str
    body: dict[str, Any]
    is_genuine: bool


def is_genuine(secret: str, headers: Message, body: bytes) -> bool:
    """True if `webhook-signature` holds for these very bytes, and was made just now."""
    event_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isdigit() or abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
        return False
    signed = f"{event_id}.{timestamp}.".encode() + body
    mac = hmac.digest(secret.encode(), signed, hashlib.sha256)
    expected = f"v1,{base64.b64encode(mac).decode()}"
    return any(
        hmac.compare_digest(expected, signature)
        for signature in headers.get("webhook-signature", "").split(" ")
    )


class WebhookReceiver:
    """Listens on a free loopback port while it is entered."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._received: queue.SimpleQueue[Webhook] = queue.SimpleQueue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/webhook"

    def wait(self, seconds: float) -> Webhook | None:
        """The next one, or None when none has come in time."""
        try:
            return self._received.get(timeout=seconds)
        except queue.Empty:
            return None

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, headers: Message, body: bytes) -> None:
        genuine = is_genuine(self._secret, headers, body)
        self._received.put(Webhook(headers.get("webhook-id", ""), json.loads(body), genuine))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = min(int(self.headers.get("content-length", "0")), MAX_BODY_BYTES)
                take(self.headers, self.rfile.read(length))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the demo itself says what has come."""

        return Handler
