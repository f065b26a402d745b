"""`make demo`, as a newcomer sees it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path

import httpx
import pytest

import demo.__main__ as running_demo
from app.webhooks.signing import signature_headers
from demo.narration import DemoFailed, show
from demo.receiver import WebhookReceiver, is_genuine
from demo.server import environment, free_port, migrate, running

PROJECT = Path(__file__).resolve().parent.parent
SECRET = "whsec_c2VjcmV0IG9mIHRoZSBkZW1v"


def assert_nothing_is_left(output: str, temporary: Path) -> None:
    assert list(temporary.iterdir()) == []
    url = re.search(r"ready +(http://127\.0\.0\.1:\d+)", output)
    assert url is not None, output
    with pytest.raises(httpx.ConnectError):
        httpx.get(url[1], timeout=5)


def test_the_demo_shows_an_answer_in_time_and_one_by_webhook(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--once"],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path), "LOUPE_PORT": "nonsense of the caller's"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"google-auto-tagging": "success", "aws-auto-tagging": "pending"' in done.stdout
    assert "signature  valid" in done.stdout
    assert '"service": "aws-auto-tagging"' in done.stdout
    assert '"aws-auto-tagging": "success", "google-auto-tagging": "success"' in done.stdout
    assert done.stderr == ""
    assert_nothing_is_left(done.stdout, tmp_path)


@pytest.fixture
def sigterm_is_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_is_restored")
def test_a_demo_that_goes_wrong_says_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "text.jpg").write_text("no picture at all")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(running_demo, "SAMPLE", tmp_path / "text.jpg")
    monkeypatch.setattr(sys, "argv", ["demo", "--once"])
    with pytest.raises(SystemExit, match=r"The demo failed\. Expected the upload's"):
        running_demo.main()
    assert_nothing_is_left(capsys.readouterr().out, tmp_path / "temporary")


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    env = environment(tmp_path, free_port(), {"LOUPE_WEBHOOK_ON": "never"})
    with (
        pytest.raises(DemoFailed, match=r"ended with status 1(.|\n)*LOUPE_WEBHOOK_ON"),
        running(env, tmp_path / "log"),
    ):
        pass


def test_a_schema_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    env = environment(tmp_path, free_port(), {"LOUPE_DATABASE_URL": "mysql://x"})
    with pytest.raises(DemoFailed, match="LOUPE_DATABASE_URL"):
        migrate(env)


def signed(body: bytes, when: datetime) -> Message:
    headers = Message()
    for name, value in signature_headers(SECRET, "evt_1", body, when).items():
        headers[name] = value
    return headers


def test_the_receiver_takes_only_what_is_signed_just_now_over_these_bytes() -> None:
    body, now = b'{"service": "google-auto-tagging"}', datetime.now(UTC)
    assert is_genuine(SECRET, signed(body, now), body)
    assert not is_genuine(SECRET, signed(body, now), body + b" ")
    assert not is_genuine(SECRET + "x", signed(body, now), body)
    assert not is_genuine(SECRET, signed(body, now - timedelta(minutes=6)), body)
    assert not is_genuine(SECRET, Message(), body)


def test_the_receiver_hands_on_what_it_gets() -> None:
    body = json.dumps({"service": "aws-auto-tagging"}).encode()
    headers = signature_headers(SECRET, "evt_1", body, datetime.now(UTC))
    with WebhookReceiver(SECRET) as receiver:
        assert receiver.wait(0) is None
        assert (
            httpx.post(receiver.url, content=body, headers=headers, timeout=30).status_code == 200
        )
        assert httpx.post(receiver.url, content=body, timeout=30).status_code == 200
        genuine, forged = receiver.wait(30), receiver.wait(30)
    assert genuine is not None
    assert (genuine.event_id, genuine.is_genuine) == ("evt_1", True)
    assert genuine.body == {"service": "aws-auto-tagging"}
    assert forged is not None
    assert not forged.is_genuine


def test_json_is_shown_as_json_with_short_values_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {
        "AITags": [{"name": "é" * 20, "confidence": 1.5, "source": "x" * 20}] * 3,
        "short": {"a": None, "b": []},
    }
    show(value)
    text = capsys.readouterr().out
    assert json.loads(text) == value
    assert len(text.splitlines()) == 8
    assert all(len(line) <= 96 for line in text.splitlines())


@pytest.mark.parametrize("target", ["demo", "run", "worker", "migrate", "test", "check", "format"])
def test_make_knows_the_target_and_lists_it(target: str) -> None:
    listed = subprocess.run(["make"], cwd=PROJECT, capture_output=True, text=True, timeout=30)
    assert f"  make {target} " in listed.stdout
    plan = subprocess.run(
        ["make", "--dry-run", target], cwd=PROJECT, capture_output=True, text=True, timeout=30
    )
    assert plan.returncode == 0, plan.stderr


def test_ctrl_c_ends_a_demo_that_stays(tmp_path: Path) -> None:
    """In a copy, since it keeps its data in the checkout."""
    shutil.copytree(PROJECT / "demo", tmp_path / "demo")
    for name in ("app", "alembic"):
        (tmp_path / name).symlink_to(PROJECT / name)
    log = tmp_path / "terminal"  # which may show the key that the demo uses
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "demo"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    try:
        while "-F webhookUrl=" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
    assert log.read_text().rstrip().endswith("Ended.")
    assert (tmp_path / "data" / "demo" / "loupe.db").exists()
