"""No secret shows in a log, an error or a metric, whatever goes wrong near it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import structlog
from sqlalchemy.engine import make_url

from app.extensions.schemas import AWS
from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests import canaries
from tests.conftest import Serve
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.s3 import S3Emulator
from tests.files.helpers import PICTURE, UPLOAD, anonymous, on_sqlite_only, refused
from tests.files.support import asking, wait_until
from tests.server import LoupeServer

PROJECT = Path(__file__).resolve().parent.parent
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl"
SHOWING = [
    DEVELOPMENT_PRIVATE_KEY,
    canaries.AWS_SECRET_KEY,
    canaries.POSTGRES_PASSWORD,
    "Basic cHJpdmF0ZV9zb21ldGhpbmc6",
    "https://user:hunter2@example.com/a.jpg",
    f"token {JWT}",
    "AWS4-HMAC-SHA256 Credential=a, Signature=0123456789abcdef0123456789abcdef",
    "/demo/a.jpg?ik-s=0123456789abcdef0123456789abcdef01234567",
    "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
]


# --- the watch itself --------------------------------------------------------------------------


@pytest.mark.parametrize("text", SHOWING)
def test_watch_sees_a_secret_in_a_line_of_ours(text: str) -> None:
    with canaries.expected_leaks() as leaks:
        structlog.get_logger("app").info("an event", where=text)
    assert any("a log line" in leak for leak in leaks)


def test_watch_sees_a_secret_in_a_librarys_line() -> None:
    with canaries.expected_leaks() as leaks:
        logging.getLogger("some.library").warning("sent %s", canaries.AWS_SECRET_KEY)
    assert leaks


def test_watch_sees_a_secret_in_a_traceback() -> None:
    with canaries.expected_leaks() as leaks:
        try:
            raise RuntimeError(f"cannot connect with {canaries.POSTGRES_PASSWORD}")
        except RuntimeError as error:
            structlog.get_logger("app").error("it failed", exc_info=error)
    assert any("Traceback" in leak for leak in leaks)


def test_watch_sees_a_secret_in_an_answer_and_in_a_servers_log(
    shared_server: LoupeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with canaries.expected_leaks() as leaks, monkeypatch.context() as telling:
        telling.setattr("app.errors.HELP", canaries.AWS_SECRET_KEY)
        shared_server.client.get("/v1/files?limit=0")
    assert any("the answer 400 to GET /v1/files" in leak for leak in leaks)
    log = tmp_path / "server.log"
    log.write_text(f"key={DEVELOPMENT_PRIVATE_KEY}\n")
    with canaries.expected_leaks() as leaks:
        canaries.check_logs_below(tmp_path)
    log.unlink()
    assert any("server.log" in leak for leak in leaks)


def test_a_test_during_which_a_secret_shows_fails() -> None:
    canaries.check("somewhere", canaries.AWS_SECRET_KEY)
    with pytest.raises(AssertionError, match="a secret showed"):
        canaries.require_silence()
    canaries.require_silence()


def test_masked_urls_and_ordinary_lines_are_no_leak() -> None:
    for text in (
        "postgresql+psycopg://loupe:***@127.0.0.1/loupe",
        "postgresql+psycopg://loupe:…@127.0.0.1/loupe",
        "http://127.0.0.1:8000/demo/a@b.jpg",
        "Basic authentication is needed",
    ):
        canaries.check("somewhere", text)


# --- failures with secrets nearby ---------------------------------------------------------------


def events(lines: list[str]) -> set[str]:
    return {json.loads(line)["event"] for line in lines}


@on_sqlite_only
def test_a_traceback_during_a_request_holds_no_key(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> NoReturn:
        raise RuntimeError("out of order")

    with canaries.written_lines() as lines, monkeypatch.context() as breaking:
        breaking.setattr(server.resources.db, "scan", broken)
        refused(server.client.get("/v1/files"), 500)
    [line] = [line for line in lines if "out of order" in line]
    assert json.loads(line)["event"] == "unexpected error"
    assert "Traceback" in line
    assert "authorization" not in line.lower()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_storage_that_denies_shows_no_key(serve: Serve, s3: S3Emulator) -> None:
    server = serve(storage_url=f"s3://{s3.create_bucket()}")
    s3.faults["put"] = "denied"
    with canaries.written_lines() as lines:
        refused(server.upload(PICTURE), 503)
    assert "storage unavailable" in events(lines)


@on_sqlite_only
def test_a_provider_that_refuses_our_credentials_shows_no_key(
    serve: Serve, rekognition: RekognitionEmulator
) -> None:
    rekognition.fault = "credentials"
    server = serve(aws_auto_tagging="rekognition", sync_budget_seconds=30)
    with canaries.written_lines() as lines:
        answer = server.upload(PICTURE, extensions=asking(AWS)).json()
        assert "provider" in server.client.get("/metrics").text
    assert answer["extensionStatus"] == {AWS: "failed"}
    assert "provider call failed" in events(lines)


def test_refused_credentials_signatures_and_urls_are_not_repeated(
    shared_server: LoupeServer,
) -> None:
    token = canaries.planted("canary-token-of-an-upload-81")
    signature = canaries.planted("0123456789abcdef0123456789abcdef01234567")
    wrong = canaries.planted("private_canary_of_a_stranger")
    form = {"file": "aGVsbG8=", "fileName": "a.jpg"}
    signed = {
        "publicKey": DEVELOPMENT_PUBLIC_KEY,
        "token": token,
        "signature": signature,
        "expire": "9999999999",
    }
    url = "https://user:hunter2@example.com/a.jpg"
    with canaries.written_lines() as lines, anonymous(shared_server) as client:
        refused(client.get("/v1/files", auth=(wrong, "")), 403)
        refused(client.post(UPLOAD, files=_parts(form | signed)), 400)
        refused(client.post(UPLOAD.replace("v1", "v2"), files=_parts(form | {"token": JWT})), 400)
        for fields in ({"file": url}, {"webhookUrl": url}):
            refused(shared_server.client.post(UPLOAD, files=_parts(form | fields)), 400)
        # A request's line is written once its answer has been sent.
        wait_until(lambda: len([each for each in lines if '"status":40' in each]) == 5, "5 lines")


def _parts(form: dict[str, str]) -> dict[str, tuple[None, str]]:
    return {name: (None, value) for name, value in form.items()}


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
def test_a_database_that_refuses_shows_no_password(database_url: str, tmp_path: Path) -> None:
    stranger = make_url(database_url).set(username="stranger")
    nobody = stranger.set(host="127.0.0.1", port=1)
    for url in (stranger, nobody):
        assert url.password == canaries.POSTGRES_PASSWORD
        environment = {
            **os.environ,
            "LOUPE_DATA_DIR": str(tmp_path),
            "LOUPE_DATABASE_URL": url.render_as_string(hide_password=False),
            "LOUPE_GOOGLE_AUTO_TAGGING": "off",
            "LOUPE_AWS_AUTO_TAGGING": "off",
            "LOUPE_PORT": "0",
        }
        stopped = subprocess.run(
            [sys.executable, "-m", "app", "serve"],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert stopped.returncode != 0
        assert stopped.stderr
        canaries.check("what a server without its database printed", stopped.stderr)


def test_httpx_and_the_watch_agree_on_what_basic_credentials_are() -> None:
    request = httpx.Request("GET", "http://127.0.0.1")
    sent = next(httpx.BasicAuth(DEVELOPMENT_PRIVATE_KEY, "").auth_flow(request))
    with canaries.expected_leaks() as leaks:
        canaries.check("a header", sent.headers["authorization"])
    assert leaks
