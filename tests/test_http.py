"""What every request passes through: ids, logs, CORS, trailing slashes, refused bodies, docs."""

import contextlib
import json
import time
from typing import Any
from uuid import UUID

import httpx
import pytest
import structlog.testing

from app.extensions.schemas import EXTENSIONS, AutoTagging
from app.files.schemas import UploadFields
from app.http import DROP_IDLE_SECONDS, DROP_SECONDS
from app.ids import new_id
from tests.conftest import Serve
from tests.files.helpers import (
    BOUNDARY,
    PICTURE,
    UPLOAD,
    RawConnection,
    accepted,
    anonymous,
    form_body,
    form_part,
    nothing_left,
    on_sqlite_only,
    patch,
    refused,
    upload,
    upload_as,
)
from tests.files.support import wait_until
from tests.server import LoupeServer

ORIGIN = {"Origin": "https://shop.example"}


# --- request ids and logs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/v1/files", 200),
        ("OPTIONS", UPLOAD, 204),
        ("POST", UPLOAD, 400),
        ("GET", "/nothing", 404),
        ("GET", "/demo/nothing.jpg", 404),
        ("PUT", "/v1/files", 405),
    ],
)
def test_every_response_has_an_id_of_its_own(
    shared_server: LoupeServer, method: str, path: str, status: int
) -> None:
    answers = [shared_server.client.request(method, path) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [status, status]
    first, second = (UUID(answer.headers["x-ik-requestid"]) for answer in answers)
    assert first != second


def test_a_request_has_one_log_line_with_neither_query_nor_key(shared_server: LoupeServer) -> None:
    """It is written after the answer: that of an earlier request may still come."""
    path = f"/v1/files/{new_id()}/details"

    def own_lines() -> list[Any]:
        return [each for each in logs if each["event"] == "request" and each["path"] == path]

    with structlog.testing.capture_logs() as logs:
        shared_server.client.get(f"{path}?name=secret&signature=abc")
        wait_until(own_lines, "its log line")
    [line] = own_lines()
    assert (line["method"], line["status"]) == ("GET", 404)
    assert 0 <= line["elapsed_ms"] < 60_000
    assert "secret" not in str(logs)
    assert "private_" not in str(logs)


# --- CORS -------------------------------------------------------------------------------------


def test_a_browser_may_upload_from_any_page(shared_server: LoupeServer) -> None:
    asking = {
        **ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, x-requested-with",
    }
    with anonymous(shared_server) as client:
        answer = client.options(UPLOAD, headers=asking)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-requested-with" in answer.headers["access-control-allow-headers"].lower()
    assert answer.headers["x-ik-requestid"]


def test_a_page_can_read_answers_and_refusals(shared_server: LoupeServer) -> None:
    file, name = {"file": ("a.jpg", PICTURE)}, {"fileName": "a.jpg"}
    good = shared_server.client.post(UPLOAD, files=file, data=name, headers=ORIGIN)
    bad = shared_server.client.post(UPLOAD, headers=ORIGIN)
    wrong = shared_server.client.put(UPLOAD, headers=ORIGIN)
    assert [answer.status_code for answer in (good, bad, wrong)] == [200, 400, 405]
    for answer in (good, bad, wrong):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-expose-headers"].lower() == "x-ik-requestid"


def test_options_without_an_origin_says_what_is_allowed(shared_server: LoupeServer) -> None:
    answer = shared_server.client.options(UPLOAD)
    assert answer.status_code == 204
    assert answer.content == b""
    assert "POST" in answer.headers["allow"]


def test_only_uploads_are_open_to_other_pages(shared_server: LoupeServer) -> None:
    answer = shared_server.client.get("/v1/files", headers=ORIGIN)
    assert "access-control-allow-origin" not in answer.headers


# --- trailing slashes -------------------------------------------------------------------------


@on_sqlite_only
def test_trailing_slashes_are_served_without_a_redirect(server: LoupeServer) -> None:
    file, name = {"file": ("a.jpg", PICTURE)}, {"fileName": "a.jpg"}
    file_id = accepted(server.client.post(f"{UPLOAD}/", files=file, data=name))["fileId"]
    details = f"/v1/files/{file_id}/details"
    assert accepted(server.client.get(f"{details}/")) == accepted(server.client.get(details))
    patched = accepted(server.client.patch(f"{details}/", json={"tags": ["a"]}))
    assert patched["tags"] == ["a"]
    listed = server.client.get("/v1/files/?limit=5&tags=a")
    assert [file["fileId"] for file in listed.json()] == [file_id]
    assert server.client.delete(f"/v1/files/{file_id}/").status_code == 204


# --- bodies that are refused early ------------------------------------------------------------


def test_the_answer_to_an_early_refusal_is_seen_and_not_a_reset(
    shared_server: LoupeServer,
) -> None:
    """The client goes on sending for a while, as one does that reads only afterwards."""
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_upload_head(f"Content-Length: {100_000_000}")
        for _ in range(64):
            connection.send(b"x" * 65536)
        received = connection.read_to_end()
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["message"] == (
        "Your request contains invalid file parameter. The file size exceeds limits."
    )


def test_a_refused_client_that_sends_no_more_is_let_go(shared_server: LoupeServer) -> None:
    started = time.monotonic()
    with RawConnection(shared_server.url) as connection:
        connection.send_upload_head(f"Content-Length: {100_000_000}")
        connection.send(b"x" * 1000)
        assert connection.read_to_end().startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - started < DROP_IDLE_SECONDS + 5


def test_a_refused_client_that_sends_for_seconds_still_sees_its_answer(
    shared_server: LoupeServer,
) -> None:
    """As one behind a slow line, that reads only when it has sent everything."""
    seconds = 2.5 * DROP_IDLE_SECONDS
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_upload_head("Content-Length: 100000000")
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            connection.send(b"x" * 1000)
            time.sleep(0.05)
        assert connection.read_answer().status == 413


def test_a_refused_client_that_never_stops_is_cut_off(shared_server: LoupeServer) -> None:
    started = time.monotonic()
    with RawConnection(shared_server.url) as connection:
        connection.send_upload_head("Transfer-Encoding: chunked", "Content-Encoding: gzip")
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < DROP_SECONDS + 10:
                connection.send(b"100\r\n" + b"x" * 256 + b"\r\n")
                time.sleep(0.001)
    assert time.monotonic() - started < DROP_SECONDS + 10


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Authorization: Basic !!!"], 401),
        (["Authorization: Basic cHJpdmF0ZV94Og=="], 403),
        (["Content-Encoding: gzip"], 415),
        (["Content-Type: application/json"], 400),
    ],
)
def test_what_the_headers_decide_is_answered_before_the_body_ends(
    shared_server: LoupeServer, headers: list[str], status: int
) -> None:
    own = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
    own["Authorization"] = "Basic " + httpx.BasicAuth(
        shared_server.resources.keys.pairs[0].private, ""
    )._auth_header.removeprefix("Basic ")
    own |= dict(header.split(": ") for header in headers)
    lines = [f"POST {UPLOAD} HTTP/1.1", "Host: loupe", "Content-Length: 1000000"]
    lines += [f"{name}: {value}" for name, value in own.items()]
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send("\r\n".join([*lines, "", ""]).encode())
        connection.send(b"x" * 100_000)
        assert connection.read_answer().status == status


def test_a_connection_serves_on_after_a_refusal_whose_body_was_whole(
    shared_server: LoupeServer,
) -> None:
    body = form_body(form_part("file", b"content", "a.txt"))
    request = (f"Content-Length: {len(body)}",)
    with RawConnection(shared_server.url) as connection:
        for _ in range(2):
            connection.send_upload_head(*request)
            connection.send(body)
            assert connection.read_answer().status == 400


# --- health and documentation -----------------------------------------------------------------


@on_sqlite_only
def test_health_needs_no_key_and_readiness_names_the_providers(serve: Serve) -> None:
    server = serve(google_auto_tagging="local")
    with anonymous(server) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "providers": {"google-auto-tagging": "local", "aws-auto-tagging": "extension_off"},
    }


def _openapi(server: LoupeServer) -> dict[str, Any]:
    with anonymous(server) as client:
        return accepted(client.get("/openapi.json"))


def test_docs_show_openapi_without_a_key(shared_server: LoupeServer) -> None:
    with anonymous(shared_server) as client:
        page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text


def test_openapi_lists_every_endpoint_with_its_answers(shared_server: LoupeServer) -> None:
    document = _openapi(shared_server)
    assert document["openapi"].startswith("3.1")
    assert document["info"]["title"] == "Loupe"
    endpoints = {
        (method, path) for path, operations in document["paths"].items() for method in operations
    }
    assert endpoints >= {
        ("post", UPLOAD),
        ("get", "/v1/files"),
        ("get", "/v1/files/{file_id}/details"),
        ("patch", "/v1/files/{file_id}/details"),
        ("delete", "/v1/files/{file_id}"),
        ("get", "/healthz"),
        ("get", "/readyz"),
    }
    for method, path in endpoints:
        operation = document["paths"][path][method]
        assert operation["responses"], path
        assert operation.get("description"), path
        assert "422" not in operation["responses"], path


def test_openapi_names_every_upload_field(shared_server: LoupeServer) -> None:
    operation = _openapi(shared_server)["paths"][UPLOAD]["post"]
    schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    known = {field.alias or name for name, field in UploadFields.model_fields.items()}
    assert set(schema["properties"]) >= {"file", *known}
    assert set(schema["required"]) == {"file", "fileName"}


def test_every_reference_in_openapi_leads_somewhere(shared_server: LoupeServer) -> None:
    document = _openapi(shared_server)

    def references(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for item in node for found in references(item)]
        if not isinstance(node, dict):
            return []
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for item in node.values() for found in references(item)]

    found = references(document)
    assert found
    for reference in found:
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in target, reference
            target = target[part]


def test_the_examples_in_openapi_have_the_keys_that_the_server_sends(
    shared_server: LoupeServer,
) -> None:
    paths = _openapi(shared_server)["paths"]

    def example(path: str, method: str) -> Any:
        answer = paths[path][method]["responses"]["200"]
        return answer["content"]["application/json"]["example"]

    uploaded = upload(shared_server, tags="a") | {"AITags": []}
    assert set(uploaded) == set(example(UPLOAD, "post")) - {"extensionStatus"}
    details = shared_server.details(uploaded["fileId"])
    for shown in (
        example("/v1/files/{file_id}/details", "get"),
        example("/v1/files/{file_id}/details", "patch"),
        example("/v1/files", "get")[0],
    ):
        # FastAPI leaves out of the examples what is null.
        assert set(details) - {"customCoordinates", "embeddedMetadata"} == set(shown) - {
            "extensionStatus"
        }


def test_the_request_examples_in_openapi_work(shared_server: LoupeServer) -> None:
    paths = _openapi(shared_server)["paths"]
    body = paths["/v1/files/{file_id}/details"]["patch"]["requestBody"]
    [update] = body["content"]["application/json"]["schema"]["examples"]
    file_id = upload(shared_server)["fileId"]
    answer = accepted(patch(shared_server, file_id, update))
    assert answer["tags"] == update["tags"]
    form = paths[UPLOAD]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    [extensions] = form["properties"]["extensions"]["examples"]
    assert "extensionStatus" in upload(shared_server, extensions=extensions)
    assert AutoTagging.model_validate(json.loads(extensions)[0]).name in EXTENSIONS


def test_names_of_all_scripts_travel_in_headers_and_answers(shared_server: LoupeServer) -> None:
    answer = upload_as(shared_server, "fóto-世界-फ़ोटो.jpg")
    assert answer["name"] == "fóto-世界-फ़ोटो.jpg".replace("फ़", "फ\u093c")
    refused(shared_server.client.get("/v1/files/世界/details"), 400)
