"""What a client reads when something goes wrong: always JSON with `message` and `help`."""

from typing import Any, NoReturn

import pytest
import structlog.testing
from sqlalchemy import select

from app.errors import field_path, first_problem
from app.extensions.models import runs
from tests.conftest import Serve
from tests.files.helpers import (
    UPLOAD,
    RawConnection,
    nothing_left,
    on_sqlite_only,
    patch,
    patch_raw,
    refused,
    traces,
    upload,
)
from tests.server import LoupeServer

NO_FILE = "a" * 24
UNEXPECTED = "Something went wrong on our side. It has been logged."


def _broken(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the secret of the database")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, None),
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/v2/files", 404, None),
        ("GET", f"/v1/files/{NO_FILE}", 405, None),
        ("POST", "/api/v9/files/upload", 404, None),
        ("PUT", UPLOAD, 405, None),
        ("POST", "/v1/files", 405, None),
        ("DELETE", "/healthz", 405, None),
        ("TRACE", "/v1/files", 405, None),
        ("GET", f"/v1/files/{NO_FILE}/details", 404, "The requested file does not exist."),
        ("PATCH", f"/v1/files/{NO_FILE}/details", 404, "The requested file does not exist."),
        ("DELETE", f"/v1/files/{NO_FILE}", 404, "The requested file does not exist."),
    ],
)
def test_every_refusal_has_message_help_and_request_id(
    shared_server: LoupeServer, method: str, path: str, status: int, message: str | None
) -> None:
    body: dict[str, Any] | None = {} if method == "PATCH" else None
    with nothing_left(shared_server):
        refused(shared_server.client.request(method, path, json=body), status, message)


@pytest.mark.parametrize(
    "file_id",
    [
        "x",
        "A" * 24,
        "a" * 23,
        "a" * 25,
        "g" * 24,
        "%00",
        "a" * 23 + "%0A",
        "%F0%9F%98%80",
        "١" * 24,
    ],
)
@pytest.mark.parametrize(
    ("method", "ending"), [("GET", "/details"), ("PATCH", "/details"), ("DELETE", "")]
)
def test_a_malformed_file_id_is_400(
    shared_server: LoupeServer, method: str, ending: str, file_id: str
) -> None:
    body: dict[str, Any] | None = {} if method == "PATCH" else None
    answer = shared_server.client.request(method, f"/v1/files/{file_id}{ending}", json=body)
    refused(answer, 400, "Your request contains invalid fileId parameter.")


@on_sqlite_only
def test_an_unexpected_error_is_500_with_a_fixed_text(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = upload(server)["fileId"]
    with structlog.testing.capture_logs() as logs, monkeypatch.context() as breaking:
        breaking.setattr(server.resources.db, "read", _broken)
        breaking.setattr(server.resources.db, "write", _broken)
        breaking.setattr(server.resources.db, "scan", _broken)
        for answer in (
            server.client.get(f"/v1/files/{file_id}/details"),
            server.client.get("/v1/files"),
            patch(server, file_id, {"tags": ["a"]}),
            server.client.delete(f"/v1/files/{file_id}"),
            server.upload(b"content", headers_are="ignored"),
        ):
            refused(answer, 500, UNEXPECTED)
    errors = [line for line in logs if line["event"] == "unexpected error"]
    assert len(errors) == 5
    assert all(str(line["exc_info"]) == "the secret of the database" for line in errors)
    assert server.client.get(f"/v1/files/{file_id}/details").status_code == 200


@on_sqlite_only
def test_a_storage_that_fails_leaves_no_row_and_no_staged_file(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def put(*_: Any) -> NoReturn:
        raise OSError("the disk is gone")

    with nothing_left(server), monkeypatch.context() as breaking:
        breaking.setattr(server.resources.storage, "put", put)
        refused(server.upload(b"content"), 500, UNEXPECTED)


@on_sqlite_only
def test_a_database_that_refuses_leaves_no_staged_file_and_no_row(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = traces(server)
    with monkeypatch.context() as breaking:
        breaking.setattr(server.resources.db, "write", _broken)
        refused(server.upload(b"content"), 500, UNEXPECTED)
    left = traces(server) - before
    # Whether the row stands is not known then, so the blob has to stay.
    assert [name.split("/")[0] for name in left] == ["file blobs"]


@on_sqlite_only
def test_not_ready_is_503_while_healthy(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as breaking:
        breaking.setattr(server.resources.db, "scan", _broken)
        message = refused(server.client.get("/readyz"), 503)
        assert "secret" not in message
        assert server.client.get("/healthz").json() == {"status": "ok"}
    assert server.client.get("/readyz").json()["status"] == "ok"


@on_sqlite_only
def test_not_ready_without_a_storage_to_write_to(serve: Serve) -> None:
    server = serve()
    staging = server.resources.storage.staging_dir
    staging.rename(staging.with_name("elsewhere"))
    refused(server.client.get("/readyz"), 503)
    staging.with_name("elsewhere").rename(staging)
    assert server.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"text"', "object"),
        (b'{"tags": ["a"], "tags": ["b"]}', "twice"),
        (b'{"description": NaN}', "NaN"),
        (b'{"description": "\xff"}', "UTF-8"),
        (b'{"tags": ["\xed\xa0\x80"]}', "UTF-8"),
        (b'{"description": "\\ud800"}', "surrogate"),
        (b'{"customMetadata": {"\\udfff": 1}}', "surrogate"),
        (b'{"publish": {"isPublished": true, "\\ud800": 1}}', "surrogate"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 50_000, "deep"),
        (b'{"tags": [[[[[[[[["a"]]]]]]]]]}', "deep"),
        (b'["' + b'\\"' * 500_000, "JSON"),
        (b"1" * 10_000, "JSON"),
        (b'{"description": "' + b"x" * 1_048_576 + b'"}', "1048576"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:40]),
)
def test_a_body_that_is_not_good_json_is_400_at_once(
    shared_server: LoupeServer, body: bytes, named: str
) -> None:
    file_id = upload(shared_server)["fileId"]
    with nothing_left(shared_server):
        assert named in refused(patch_raw(shared_server, file_id, body), 400)
    assert not shared_server.rows(select(runs).where(runs.c.file_id == file_id))


def test_bad_queries_are_400_and_not_422(shared_server: LoupeServer) -> None:
    for query in ("skip=x", "limit=1.5", "limit=", "skip=1e3", "limit=true"):
        message = refused(shared_server.client.get(f"/v1/files?{query}"), 400)
        assert query.partition("=")[0] in message


def test_head_of_an_endpoint_has_no_body(shared_server: LoupeServer) -> None:
    answer = shared_server.client.head("/v1/files")
    assert answer.status_code == 405
    assert answer.headers["x-ik-requestid"]
    assert answer.content == b""


def test_a_request_that_is_not_http_gets_400_and_the_connection_closed(
    shared_server: LoupeServer,
) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"nonsense\r\n\r\n"):
        with RawConnection(shared_server.url) as connection:
            connection.send(garbage)
            assert b" 400 " in connection.read_to_end()


def test_first_problem_names_the_field_as_it_was_sent() -> None:
    problem = {"loc": ("body", "extensions", 1, "maxTags"), "msg": "Value error, Should be less."}
    assert first_problem([problem]) == (
        "Your request contains invalid value for extensions[1].maxTags: should be less."
    )
    assert first_problem([{"loc": (), "msg": "Odd"}]).startswith(
        "Your request contains invalid value for the body"
    )
    assert field_path(("a", 0, 1, "b")) == "a[0][1].b"
