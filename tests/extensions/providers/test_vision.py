"""Vision: Google's own client against a server on loopback."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import pyvips
from google.cloud.vision_v1 import (
    AnnotateImageResponse,
    BatchAnnotateImagesResponse,
    EntityAnnotation,
)
from pydantic import ValidationError

from app.extensions.provider import Answer, CallLimits, Label, NotConfigured, ProviderError, Reason
from app.extensions.providers import vision as vision_module
from app.extensions.providers.vision import Vision, VisionSettings
from app.images import ImagePool, ProviderCopy
from tests.emulators.certificate import self_signed
from tests.emulators.vision import VisionEmulator


def picture(content: bytes | None = None) -> ProviderCopy:
    jpeg = pyvips.Image.black(100, 90).jpegsave_buffer() if content is None else content
    return ProviderCopy(
        jpeg=jpeg,
        width_px=100,
        height_px=90,
        source_width_px=100,
        source_height_px=90,
        transparent_share=0.0,
    )


def run(
    use: Callable[[Vision], Awaitable[Any]], *, timeout_seconds: float = 10, concurrency: int = 4
) -> Any:
    """What `use` returns, given a provider that is open."""

    async def main() -> Any:
        provider = Vision(
            "google-auto-tagging", CallLimits(timeout_seconds, concurrency), ImagePool()
        )
        await provider.open()
        try:
            return await use(provider)
        finally:
            await provider.close()

    return asyncio.run(main())


def answer_to(content: bytes | None = None, **limits: Any) -> Answer:
    answer: Answer = run(lambda provider: provider.detect_labels(picture(content)), **limits)
    return answer


def labels_of(content: bytes | None = None, **limits: Any) -> list[Label]:
    return answer_to(content, **limits).labels


def failure_of(**limits: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        labels_of(**limits)
    return caught.value


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Iterator[VisionEmulator]:
    with VisionEmulator() as emulator:
        monkeypatch.setenv("LOUPE_VISION_ENDPOINT", emulator.endpoint)
        monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")
        yield emulator


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.delenv("LOUPE_VISION_ENDPOINT", raising=False)
    monkeypatch.delenv("LOUPE_VISION_INSECURE", raising=False)
    monkeypatch.delenv("NO_GCE_CHECK", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))


def test_score_becomes_percent_and_all_labels_are_asked_for(vision: VisionEmulator) -> None:
    vision.labels = [(f"Label {number}", 99 - number / 10) for number in range(120)]
    found = labels_of()
    assert [label.name for label in found] == [name for name, _ in vision.labels]
    assert [label.confidence for label in found] == pytest.approx(
        [percent for _, percent in vision.labels], abs=1e-4
    )
    assert vision.calls[0].parameters["features"] == [("LABEL_DETECTION", 1_000)]


def test_image_goes_out_unchanged_in_one_call_with_our_deadline(vision: VisionEmulator) -> None:
    sent = picture().jpeg
    labels_of(sent, timeout_seconds=7)
    (call,) = vision.calls
    assert call.image == sent
    assert 0 < float(str(call.parameters["timeout_seconds"])) < 8


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("throttle", Reason.THROTTLED),
        ("unavailable", Reason.UNAVAILABLE),
        ("server_error", Reason.UNAVAILABLE),
        ("ABORTED", Reason.UNAVAILABLE),
        ("CANCELLED", Reason.UNAVAILABLE),
        ("UNKNOWN", Reason.UNAVAILABLE),
        ("DEADLINE_EXCEEDED", Reason.TIMEOUT),
        ("credentials", Reason.CREDENTIALS),
        ("PERMISSION_DENIED", Reason.CREDENTIALS),
        ("image_rejected", Reason.IMAGE_REJECTED),
        ("UNIMPLEMENTED", Reason.BAD_REPLY),
        ("inner_error", Reason.IMAGE_REJECTED),
        ("inner:4", Reason.TIMEOUT),
        ("inner:7", Reason.CREDENTIALS),
        ("inner:8", Reason.THROTTLED),
        ("inner:14", Reason.UNAVAILABLE),
        ("inner:12", Reason.BAD_REPLY),
        ("garbage", Reason.BAD_REPLY),
        ("empty", Reason.BAD_REPLY),
        ("double", Reason.BAD_REPLY),
        ("oversized", Reason.BAD_REPLY),
    ],
)
def test_failure_has_its_reason_and_is_not_tried_again(
    vision: VisionEmulator, fault: str, reason: Reason
) -> None:
    vision.fault = fault
    failure = failure_of()
    assert failure.reason is reason
    assert failure.retry_after_seconds is None
    assert failure.was_sent
    assert vision.endpoint not in failure.message
    assert len(vision.calls) == 1


def test_error_of_an_unknown_code_inside_a_reply_is_a_bad_reply(vision: VisionEmulator) -> None:
    answer = AnnotateImageResponse(error={"code": 4_711, "message": "?"})
    vision.reply = BatchAnnotateImagesResponse.serialize(
        BatchAnnotateImagesResponse(responses=[answer])
    )
    assert failure_of().reason is Reason.BAD_REPLY


@pytest.mark.parametrize("fault", ["throttle", "unavailable", "inner:8"])
def test_retry_delay_of_the_vendor_is_handed_on(vision: VisionEmulator, fault: str) -> None:
    vision.fault, vision.retry_after = fault, 12.5
    assert failure_of().retry_after_seconds == 12.5


def test_retry_delay_below_zero_is_none(vision: VisionEmulator) -> None:
    vision.fault, vision.retry_after = "throttle", -5
    assert failure_of().retry_after_seconds is None


@pytest.mark.parametrize("content", [b"", b"not an image", picture().jpeg[:300]])
def test_image_that_vision_cannot_read_is_rejected(vision: VisionEmulator, content: bytes) -> None:
    with pytest.raises(ProviderError) as caught:
        labels_of(content)
    assert caught.value.reason is Reason.IMAGE_REJECTED


def test_image_beyond_the_limit_of_a_request_is_rejected(vision: VisionEmulator) -> None:
    with pytest.raises(ProviderError) as caught:
        labels_of(picture().jpeg + b"\0" * 8_000_000)
    assert caught.value.reason is Reason.IMAGE_REJECTED


def test_hostile_labels_come_through_for_the_caller_to_clean(vision: VisionEmulator) -> None:
    hostile = [("\u202e\0" + "x" * 100_000, 50.0), ("", float("inf")), ("Nan", float("nan"))]
    annotations = [EntityAnnotation(description=name, score=score) for name, score in hostile]
    answer = AnnotateImageResponse(label_annotations=annotations)
    vision.reply = BatchAnnotateImagesResponse.serialize(
        BatchAnnotateImagesResponse(responses=[answer])
    )
    assert [label.name for label in labels_of()] == [name for name, _ in hostile]


def test_list_without_end_is_cut(vision: VisionEmulator) -> None:
    plain = BatchAnnotateImagesResponse.pb(BatchAnnotateImagesResponse())
    annotations = plain.responses.add().label_annotations
    for _ in range(200_000):
        annotations.add(description="x", score=0.5)
    vision.reply = plain.SerializeToString()
    assert len(labels_of()) == vision_module.MAX_LABELS


def test_hang_ends_at_the_deadline(vision: VisionEmulator) -> None:
    vision.fault = "hang"
    before = time.monotonic()
    assert failure_of(timeout_seconds=0.2).reason is Reason.TIMEOUT
    assert time.monotonic() - before < 5
    vision.wait_until_idle()


def test_cancelling_ends_the_call_at_the_server(vision: VisionEmulator) -> None:
    vision.fault = "hang"

    async def cancel(provider: Vision) -> None:
        task = asyncio.create_task(provider.detect_labels(picture()))
        await asyncio.to_thread(vision.wait_for_calls, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(vision.wait_until_idle)

    run(cancel, timeout_seconds=60)


def test_calls_run_side_by_side(vision: VisionEmulator) -> None:
    vision.hold()

    async def several(provider: Vision) -> list[Answer]:
        calls = asyncio.gather(*(provider.detect_labels(picture()) for _ in range(4)))
        await asyncio.to_thread(vision.wait_for_calls, 4)
        vision.release()
        return await calls

    assert [len(answer.labels) for answer in run(several)] == [2, 2, 2, 2]
    assert vision.max_in_flight == 4


def test_server_that_was_down_at_open_is_used_soon_after_it_comes_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    monkeypatch.setenv("LOUPE_VISION_ENDPOINT", f"127.0.0.1:{port}")
    monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")

    async def come_up(provider: Vision) -> Answer:
        with pytest.raises(ProviderError) as caught:
            await provider.detect_labels(picture())
        assert caught.value.reason is Reason.UNAVAILABLE
        assert not caught.value.was_sent
        with VisionEmulator(port=port):
            return await until_it_answers(provider)

    before = time.monotonic()
    assert len(run(come_up).labels) == 2
    assert time.monotonic() - before < 15


async def until_it_answers(provider: Vision) -> Answer:
    for _ in range(100):
        with suppress(ProviderError):
            return await provider.detect_labels(picture())
        await asyncio.sleep(0.1)
    raise TimeoutError


def test_server_that_accepts_and_says_nothing_does_not_hold_up_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("LOUPE_VISION_ENDPOINT", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")
        monkeypatch.setattr(vision_module, "GREETING_SECONDS", 0.2)
        before = time.monotonic()
        assert failure_of(timeout_seconds=0.2).reason in (Reason.TIMEOUT, Reason.UNAVAILABLE)
        assert time.monotonic() - before < 5


def test_close_without_open_does_nothing(vision: VisionEmulator) -> None:
    asyncio.run(Vision("google-auto-tagging", CallLimits(1, 1), ImagePool()).close())


# Settings and credentials


def test_settings_are_google_by_default(no_credentials: None) -> None:
    assert VisionSettings() == VisionSettings(endpoint=None, insecure=False)


@pytest.mark.parametrize("endpoint", ["localhost", "http://localhost:1", "a b:1", ":1", "a:b"])
def test_endpoint_that_is_not_host_and_port_is_refused(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("LOUPE_VISION_ENDPOINT", endpoint)
    with pytest.raises(ValidationError, match="endpoint"):
        VisionSettings()


@pytest.mark.parametrize("endpoint", ["localhost:1", "127.0.0.1:50051", "[::1]:443"])
def test_endpoint_is_host_and_port(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("LOUPE_VISION_ENDPOINT", endpoint)
    assert VisionSettings().endpoint == endpoint


def test_insecure_needs_an_endpoint(no_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")
    with pytest.raises(ValidationError, match="LOUPE_VISION_ENDPOINT"):
        VisionSettings()


def test_no_credentials_and_no_metadata_service_is_not_configured_at_once(
    no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{port}")
    before = time.monotonic()
    with pytest.raises(NotConfigured, match="GOOGLE_APPLICATION_CREDENTIALS"):
        labels_of()
    assert time.monotonic() - before < 2.5


def test_silent_metadata_service_holds_up_no_loop_and_is_not_configured_at_last(
    no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = 0

    async def main() -> None:
        nonlocal beats
        provider = Vision("google-auto-tagging", CallLimits(1, 1), ImagePool())
        opening = asyncio.create_task(provider.open())
        while not opening.done():
            beats += 1
            await asyncio.sleep(0.01)
        with pytest.raises(NotConfigured):
            await opening

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{silent.getsockname()[1]}")
        asyncio.run(main())
    assert beats >= 5


def test_credentials_file_that_is_missing_or_broken_is_not_configured(
    no_credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with pytest.raises(NotConfigured):
        labels_of()
    file.write_text("{}")
    with pytest.raises(NotConfigured):
        labels_of()


# With TLS and a token, in a process of its own: gRPC reads its trusted roots once per process.

CLIENT = """
import asyncio, json, sys
from pathlib import Path
from app.extensions.provider import CallLimits, ProviderError
from app.extensions.providers.vision import Vision
from app.images import ImagePool, ProviderCopy

async def main():
    provider = Vision("google-auto-tagging", CallLimits(10, 1), ImagePool())
    await provider.open()
    try:
        jpeg = Path(sys.argv[1]).read_bytes()
        answer = await provider.detect_labels(ProviderCopy(jpeg, 100, 90, 100, 90, 0.0))
        return [label.name for label in answer.labels]
    except ProviderError as error:
        return str(error.reason)
    finally:
        await provider.close()

print(json.dumps(asyncio.run(main())))
"""


class TokenService:
    """Where Google's client exchanges a token of ours for one of Google's."""

    def __init__(self, status: int, body: dict[str, object]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/token"

    def __enter__(self) -> "TokenService":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, {"access_token": "abc", "expires_in": 3600, "token_type": "Bearer"}, None),
        (400, {"error": "invalid_grant"}, "provider_credentials"),
        (503, {"error": "temporarily_unavailable"}, "provider_unavailable"),
    ],
)
def test_token_is_fetched_and_sent_over_tls(
    tmp_path: Path, status: int, body: dict[str, object], outcome: str | None
) -> None:
    certificate, key = self_signed()
    (tmp_path / "roots.pem").write_bytes(certificate)
    server_credentials = grpc.ssl_server_credentials([(key, certificate)])
    sample = tmp_path / "sample.jpg"
    sample.write_bytes(picture().jpeg)
    with (
        VisionEmulator(credentials=server_credentials) as vision,
        TokenService(status, body) as tokens,
    ):
        environment = {
            "PATH": "/usr/bin:/bin",
            "GOOGLE_APPLICATION_CREDENTIALS": str(credentials_file(tmp_path, tokens.url)),
            "GOOGLE_CLOUD_PROJECT": "any",
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(tmp_path / "roots.pem"),
            "LOUPE_VISION_ENDPOINT": f"localhost:{vision.port}",
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(sample)],
            env=environment,
            cwd=Path(__file__).parents[3],
            capture_output=True,
            timeout=60,
            check=True,
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == (outcome or ["Cat", "Animal"])
    if outcome is None:
        metadata: Any = vision.calls[0].parameters["metadata"]
        assert metadata["authorization"] == "Bearer abc"


def credentials_file(folder: Path, token_url: str) -> Path:
    (folder / "subject").write_text("token of ours")
    file = folder / "credentials.json"
    file.write_text(
        json.dumps(
            {
                "type": "external_account",
                "audience": "//iam.googleapis.com/projects/1/locations/global/any",
                "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
                "token_url": token_url,
                "credential_source": {"file": str(folder / "subject")},
            }
        )
    )
    return file
