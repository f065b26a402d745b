"""Rekognition: boto3 against a server on loopback."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import pyvips

from app.extensions.provider import Answer, CallLimits, Label, NotConfigured, ProviderError, Reason
from app.extensions.providers import rekognition as rekognition_module
from app.extensions.providers.rekognition import Rekognition, _seconds_until
from app.images import ImagePool, ProviderCopy
from tests.emulators.certificate import self_signed
from tests.emulators.rekognition import RekognitionEmulator


def jpeg_of(width_px: int, height_px: int) -> bytes:
    content: bytes = pyvips.Image.black(width_px, height_px).jpegsave_buffer()
    return content


def picture(content: bytes | None = None) -> ProviderCopy:
    return ProviderCopy(
        jpeg=jpeg_of(100, 90) if content is None else content,
        width_px=100,
        height_px=90,
        source_width_px=100,
        source_height_px=90,
        transparent_share=0.0,
    )


def run(
    use: Callable[[Rekognition], Awaitable[Any]],
    *,
    timeout_seconds: float = 10,
    concurrency: int = 4,
) -> Any:
    """What `use` returns, given a provider that is open."""

    async def main() -> Any:
        limits = CallLimits(timeout_seconds, concurrency)
        provider = Rekognition("aws-auto-tagging", limits, ImagePool())
        try:
            await provider.open()
            return await use(provider)
        finally:
            await provider.close()

    return asyncio.run(main())


def answer_to(content: bytes | None = None, **limits: Any) -> Answer:
    answer: Answer = run(lambda provider: provider.detect_labels(picture(content)), **limits)
    return answer


def labels_of(content: bytes | None = None, **limits: Any) -> list[Label]:
    return answer_to(content, **limits).labels


def failure_of(content: bytes | None = None, **limits: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        labels_of(content, **limits)
    return caught.value


def our_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("rekognition_")]


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A complete and private set-up, in which no metadata service is asked."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_REKOGNITION", raising=False)


@pytest.fixture
def rekognition(monkeypatch: pytest.MonkeyPatch) -> Iterator[RekognitionEmulator]:
    with RekognitionEmulator() as emulator:
        monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", emulator.url)
        yield emulator


def test_confidence_is_as_given_and_all_labels_are_asked_for(
    rekognition: RekognitionEmulator,
) -> None:
    rekognition.labels = [(f"Label {number}", 99.12345 - number) for number in range(99)]
    assert labels_of() == [Label(*label) for label in rekognition.labels]
    assert rekognition.calls[0].parameters == {"MaxLabels": 1_000, "MinConfidence": 0}


def test_image_goes_out_unchanged_in_one_call(rekognition: RekognitionEmulator) -> None:
    sent = picture().jpeg
    labels_of(sent)
    (call,) = rekognition.calls
    assert call.image == sent


def test_first_call_uses_the_connection_made_at_open(rekognition: RekognitionEmulator) -> None:
    async def twice(provider: Rekognition) -> int:
        opened = rekognition.connections
        await provider.detect_labels(picture())
        await provider.detect_labels(picture())
        return opened

    assert run(twice) == 1
    assert rekognition.connections == 1
    assert len(rekognition.calls) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("throttle", Reason.THROTTLED),
        ("ThrottlingException", Reason.THROTTLED),
        ("LimitExceededException", Reason.THROTTLED),
        ("SlowDown@503", Reason.THROTTLED),
        ("Anything@429", Reason.THROTTLED),
        ("unavailable", Reason.UNAVAILABLE),
        ("server_error", Reason.UNAVAILABLE),
        ("Anything@502", Reason.UNAVAILABLE),
        ("disconnect", Reason.UNAVAILABLE),
        ("image_rejected", Reason.IMAGE_REJECTED),
        ("ImageTooLargeException", Reason.IMAGE_REJECTED),
        ("InvalidParameterException", Reason.IMAGE_REJECTED),
        ("Anything@413", Reason.IMAGE_REJECTED),
        ("credentials", Reason.CREDENTIALS),
        ("AccessDeniedException", Reason.CREDENTIALS),
        ("ExpiredTokenException", Reason.CREDENTIALS),
        ("InvalidSignatureException", Reason.CREDENTIALS),
        ("SignatureDoesNotMatch@403", Reason.CREDENTIALS),
        ("Anything@403", Reason.CREDENTIALS),
        ("Anything@400", Reason.BAD_REPLY),
        ("Anything@302", Reason.BAD_REPLY),
        ("garbage", Reason.BAD_REPLY),
        ("empty", Reason.BAD_REPLY),
        ("oversized", Reason.BAD_REPLY),
    ],
)
def test_failure_has_its_reason_and_is_not_tried_again(
    rekognition: RekognitionEmulator, fault: str, reason: Reason
) -> None:
    rekognition.fault = fault
    failure = failure_of()
    assert failure.reason is reason
    assert failure.retry_after_seconds is None
    assert failure.was_sent
    assert rekognition.url not in failure.message
    assert len(rekognition.calls) == 1


@pytest.mark.parametrize("fault", ["throttle", "unavailable"])
def test_retry_after_is_handed_on(rekognition: RekognitionEmulator, fault: str) -> None:
    rekognition.fault, rekognition.retry_after = fault, 12.5
    assert failure_of().retry_after_seconds == 12.5


@pytest.mark.parametrize("header", [None, "", "soon", "nan", "inf", "-1", "0", "1e999", "\u0664x"])
def test_retry_after_that_says_nothing_is_none(header: str | None) -> None:
    assert _seconds_until(header) is None


def test_retry_after_may_be_a_date() -> None:
    in_a_minute = datetime.now(UTC) + timedelta(seconds=60)
    assert 50 < (_seconds_until(format_datetime(in_a_minute, usegmt=True)) or 0) <= 60
    assert _seconds_until(format_datetime(in_a_minute - timedelta(hours=1))) is None


def test_answer_names_the_model(rekognition: RekognitionEmulator) -> None:
    assert answer_to().model_version == "3.0"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("null", None), ("5", None), ('""', ""), ('"' + "x" * 5_000 + '"', "x" * 100)],
)
def test_odd_name_of_a_model_spoils_no_answer(
    rekognition: RekognitionEmulator, sent: str, kept: str | None
) -> None:
    label = '{"Name": "Cat", "Confidence": 5}'
    rekognition.reply = f'{{"Labels": [{label}], "LabelModelVersion": {sent}}}'.encode()
    assert answer_to() == Answer([Label("Cat", 5.0)], kept)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"[]",
        b"null",
        b'"Labels"',
        b"[" * 100_000,
        b'{"Labels": null}',
        b'{"Labels": {"Name": "Cat"}}',
        b'{"Labels": "ab"}',
        b'{"Labels": 5}',
        b'{"Labels": [null]}',
        b'{"Labels": [5]}',
        b'{"Labels": [{}]}',
        b'{"Labels": [{"Name": "Cat"}]}',
        b'{"Labels": [{"Confidence": 5}]}',
        b'{"Labels": [{"Name": 5, "Confidence": 5}]}',
        b'{"Labels": [{"Name": null, "Confidence": 5}]}',
        b'{"Labels": [{"Name": ["Cat"], "Confidence": 5}]}',
        b'{"Labels": [{"Name": "Cat", "Confidence": "high"}]}',
        b'{"Labels": [{"Name": "Cat", "Confidence": true}]}',
        b'{"Labels": [{"Name": "Cat", "Confidence": {}}]}',
        b'{"Labels": [{"Name": "Cat", "Confidence": 1' + b"0" * 400 + b"}]}",
        b'{"Labels": [{"Name": "Cat", "Confidence": 5, "Instances": 5}]}',
        b'{"Labels": [{"Name": "Cat", "Confidence": 5}',
    ],
)
def test_reply_of_the_wrong_structure_is_a_bad_reply(
    rekognition: RekognitionEmulator, reply: bytes
) -> None:
    rekognition.reply = reply
    assert failure_of().reason is Reason.BAD_REPLY


def test_hostile_labels_come_through_for_the_caller_to_clean(
    rekognition: RekognitionEmulator,
) -> None:
    names = ["\u202e\0" + "x" * 100_000, "", "Nan", "Infinite", "Negative"]
    confidences = ["50", "NaN", "1e400", "-1e400", "-5"]
    labels = [
        f'{{"Name": {json.dumps(name)}, "Confidence": {confidence}}}'
        for name, confidence in zip(names, confidences, strict=True)
    ]
    rekognition.reply = f'{{"Labels": [{", ".join(labels)}]}}'.encode()
    assert [label.name for label in labels_of()] == names


def test_list_without_end_is_cut(rekognition: RekognitionEmulator) -> None:
    label = '{"Name": "x", "Confidence": 50}'
    rekognition.reply = f'{{"Labels": [{", ".join([label] * 50_000)}]}}'.encode()
    assert len(labels_of(timeout_seconds=60)) == rekognition_module.MAX_LABELS


def test_no_label_at_all_is_an_answer(rekognition: RekognitionEmulator) -> None:
    rekognition.labels = []
    assert labels_of() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        jpeg_of(100, 90)[:100],
        jpeg_of(79, 200),
        jpeg_of(10_001, 80),
        jpeg_of(100, 90) + b"\0" * 5_242_880,
        pyvips.Image.black(100, 90).gifsave_buffer(),
    ],
    ids=["empty", "text", "truncated", "small", "wide", "heavy", "GIF"],
)
def test_image_beyond_the_limits_is_rejected(
    rekognition: RekognitionEmulator, content: bytes
) -> None:
    assert failure_of(content).reason is Reason.IMAGE_REJECTED


@pytest.mark.parametrize("fault", ["hang", "drip", "drip_headers"])
def test_call_ends_at_the_deadline_and_so_does_its_thread(
    rekognition: RekognitionEmulator, fault: str
) -> None:
    rekognition.fault = fault

    async def time_out(provider: Rekognition) -> float:
        before = time.monotonic()
        with pytest.raises(ProviderError) as caught:
            await provider.detect_labels(picture())
        assert caught.value.reason is Reason.TIMEOUT
        await asyncio.to_thread(rekognition.wait_until_idle)
        return time.monotonic() - before

    assert run(time_out, timeout_seconds=0.3) < 5
    assert our_threads() == []


def test_calls_that_timed_out_do_not_keep_the_threads(rekognition: RekognitionEmulator) -> None:
    rekognition.faults.extend(["drip_headers", "drip"])

    async def go_on(provider: Rekognition) -> Answer:
        calls = (provider.detect_labels(picture()) for _ in range(2))
        failures = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(failure, "reason", None) for failure in failures] == [Reason.TIMEOUT] * 2
        await asyncio.to_thread(rekognition.wait_until_idle)
        return await provider.detect_labels(picture())

    assert len(run(go_on, timeout_seconds=1, concurrency=2).labels) == 2


def test_cancelling_ends_the_call_at_the_server(rekognition: RekognitionEmulator) -> None:
    rekognition.fault = "hang"

    async def cancel(provider: Rekognition) -> None:
        task = asyncio.create_task(provider.detect_labels(picture()))
        await asyncio.to_thread(rekognition.wait_for_calls, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(rekognition.wait_until_idle)

    run(cancel, timeout_seconds=60)


def test_close_ends_calls_that_hang(rekognition: RekognitionEmulator) -> None:
    rekognition.fault = "hang"

    async def leave(provider: Rekognition) -> "asyncio.Task[Answer]":
        task = asyncio.create_task(provider.detect_labels(picture()))
        await asyncio.to_thread(rekognition.wait_for_calls, 1)
        await provider.close()
        with pytest.raises(ProviderError):
            await task
        return task

    before = time.monotonic()
    run(leave, timeout_seconds=60)
    assert time.monotonic() - before < 10
    assert our_threads() == []


def test_cut_leaves_a_connection_alone_that_serves_another_call(
    rekognition: RekognitionEmulator,
) -> None:
    async def take_turns(provider: Rekognition) -> None:
        for _ in range(20):
            await asyncio.gather(*(provider.detect_labels(picture()) for _ in range(2)))

    run(take_turns)
    assert len(rekognition.calls) == 40
    assert rekognition.connections <= 4


def test_calls_run_side_by_side(rekognition: RekognitionEmulator) -> None:
    rekognition.hold()

    async def several(provider: Rekognition) -> list[Answer]:
        calls = asyncio.gather(*(provider.detect_labels(picture()) for _ in range(4)))
        await asyncio.to_thread(rekognition.wait_for_calls, 4)
        rekognition.release()
        return await calls

    assert [len(answer.labels) for answer in run(several)] == [2, 2, 2, 2]
    assert rekognition.max_in_flight == 4


@pytest.fixture
def secure_rekognition(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[RekognitionEmulator]:
    certificate, key = self_signed()
    (tmp_path / "roots.pem").write_bytes(certificate)
    (tmp_path / "chain.pem").write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem")
    with RekognitionEmulator(tls=context) as emulator:
        monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", emulator.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "roots.pem"))
        yield emulator


def test_one_tls_connection_serves_open_and_calls(secure_rekognition: RekognitionEmulator) -> None:
    assert len(labels_of()) == 2
    assert secure_rekognition.connections == 1


@pytest.mark.parametrize("fault", ["hang", "drip", "drip_headers"])
def test_call_over_tls_ends_at_the_deadline_and_so_does_its_thread(
    secure_rekognition: RekognitionEmulator, fault: str
) -> None:
    secure_rekognition.fault = fault
    before = time.monotonic()
    assert failure_of(timeout_seconds=0.5).reason is Reason.TIMEOUT
    assert time.monotonic() - before < 5
    assert our_threads() == []


def test_server_whose_certificate_is_not_trusted_is_unavailable(
    secure_rekognition: RekognitionEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE")
    assert failure_of().reason is Reason.UNAVAILABLE
    assert secure_rekognition.calls == []


def test_server_that_was_down_at_open_is_used_when_it_comes_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", f"http://127.0.0.1:{port}")

    async def come_up(provider: Rekognition) -> Answer:
        with pytest.raises(ProviderError) as caught:
            await provider.detect_labels(picture())
        assert caught.value.reason is Reason.UNAVAILABLE
        assert not caught.value.was_sent
        with RekognitionEmulator(port=port):
            return await provider.detect_labels(picture())

    assert len(run(come_up).labels) == 2


def test_server_that_accepts_and_says_nothing_does_not_hold_up_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", url)
        before = time.monotonic()
        assert failure_of(timeout_seconds=0.2).reason is Reason.TIMEOUT
        assert time.monotonic() - before < 5


# What has to be configured


def test_no_credentials_is_not_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NotConfigured, match="credentials"):
        labels_of()


def test_no_region_is_not_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(NotConfigured, match="region"):
        labels_of()


def test_unknown_profile_is_not_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NotConfigured, match="nobody"):
        labels_of()


def test_endpoint_that_is_no_url_is_not_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", "nowhere")
    with pytest.raises(NotConfigured, match="nowhere"):
        labels_of()


def test_silent_metadata_service_holds_up_no_loop_and_is_not_configured_at_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    beats = 0

    async def main() -> None:
        nonlocal beats
        provider = Rekognition("aws-auto-tagging", CallLimits(1, 1), ImagePool())
        opening = asyncio.create_task(provider.open())
        while not opening.done():
            beats += 1
            await asyncio.sleep(0.01)
        with pytest.raises(NotConfigured):
            await opening
        await provider.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        asyncio.run(main())
    assert beats >= 5


def test_credentials_that_cannot_be_had_fail_the_call_and_not_the_start(
    rekognition: RekognitionEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    profile = "[profile sso]\nsso_account_id = 1\nsso_role_name = r\nsso_session = s\n"
    session = "[sso-session s]\nsso_region = eu-central-1\nsso_start_url = https://example.com\n"
    (tmp_path / "config").write_text(profile + session)
    monkeypatch.setenv("AWS_PROFILE", "sso")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert failure_of().reason is Reason.CREDENTIALS
    assert rekognition.calls == []
