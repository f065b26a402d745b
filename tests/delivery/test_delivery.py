"""`GET` and `HEAD /{imagekitId}/{path}`: the stored bytes, to anybody, and nothing else."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests import pictures
from tests.conftest import Serve
from tests.delivery.support import (
    NOT_FOUND,
    is_not_found,
    is_refused,
    put,
    raw_exchange,
    visit,
    with_transformation,
)
from tests.server import LoupeServer

HTML = b"<!doctype html><html><body><script>alert(1)</script></body></html>"
THUMBNAIL = "n-media_library_thumbnail"


def patch(server: LoupeServer, file_id: str, **body: Any) -> dict[str, Any]:
    answer = server.client.patch(f"/v1/files/{file_id}/details", json=body)
    assert answer.status_code == 200, answer.text
    details: dict[str, Any] = answer.json()
    return details


@pytest.mark.parametrize(
    ("make", "name", "content_type", "is_inline"),
    [
        (pictures.jpeg, "a.jpg", "image/jpeg", True),
        (pictures.png, "a.jpg", "image/png", True),
        (pictures.webp, "a", "image/webp", True),
        (pictures.gif, "a.gif", "image/gif", True),
        (pictures.avif, "a.avif", "image/avif", True),
        (pictures.tiff, "a.tif", "image/tiff", True),
        (pictures.svg, "a.svg", "image/svg+xml", True),
        (pictures.jpeg_with_html_tail, "a.html", "image/jpeg", True),
        (pictures.truncated_jpeg, "a.jpg", "image/jpeg", True),
        (lambda: HTML, "a.html", "text/html; charset=utf-8", False),
        (lambda: HTML, "a.jpg", "application/octet-stream", False),
        (lambda: HTML, "a", "application/octet-stream", False),
        (lambda: b"\0" + HTML, "a.html", "application/octet-stream", False),
        (lambda: HTML + b"\0", "a.jpg", None, False),
        (pictures.svg, "a.html", "text/html; charset=utf-8", False),
        (lambda: b"alert(1)", "a.js", "text/javascript; charset=utf-8", False),
        (lambda: b"a {}", "a.css", "text/css; charset=utf-8", False),
        (lambda: b"{}", "a.json", "application/json", False),
        (pictures.pdf, "a.pdf", None, False),
        (pictures.random_bytes, "a.exe", "application/octet-stream", False),
        (pictures.text, "a.jpg", "application/octet-stream", False),
    ],
)
def test_the_stored_bytes_come_with_the_type_of_their_content(
    shared_server: LoupeServer,
    make: Callable[[], bytes],
    name: str,
    content_type: str | None,
    is_inline: bool,
) -> None:
    uploaded = put(shared_server, make(), name)
    answer = visit(uploaded["url"])
    assert answer.status_code == 200
    assert answer.content == make()
    assert answer.headers["content-length"] == str(len(make()))
    if content_type is not None:
        assert answer.headers["content-type"] == content_type
    disposition = answer.headers.get("content-disposition", "inline")
    assert disposition.split(";")[0] == ("inline" if is_inline else "attachment")
    mime = shared_server.details(uploaded["fileId"])["mime"]
    assert answer.headers["content-type"].split(";")[0] == mime


def is_guarded(headers: httpx.Headers) -> bool:
    """The browser guesses no type, runs nothing, and may show it on any page."""
    directives = {part.strip() for part in headers["content-security-policy"].split(";")}
    return (
        headers["x-content-type-options"] == "nosniff"
        and {"sandbox", "default-src 'none'"} <= directives
        and headers["access-control-allow-origin"] == "*"
        and headers["cross-origin-resource-policy"] == "cross-origin"
    )


def test_every_kind_of_answer_is_guarded_and_revalidated(shared_server: LoupeServer) -> None:
    url = put(shared_server)["url"]
    etag = visit(url).headers["etag"]
    for answer in (
        visit(url),
        visit(url, "HEAD"),
        visit(url, range="bytes=0-1"),
        visit(url, if_none_match=etag),
        visit(f"{url}?ik-attachment=true"),
        visit(with_transformation(url, THUMBNAIL)),
    ):
        assert is_guarded(answer.headers)
        assert answer.headers["cache-control"] == "public, max-age=0, must-revalidate"
        assert answer.headers["x-ik-requestid"]
        assert answer.headers["last-modified"].endswith(" GMT")


def test_a_shared_cache_keeps_no_private_file(shared_server: LoupeServer) -> None:
    uploaded = put(shared_server, isPrivateFile="true")
    assert visit(uploaded["url"]).headers["cache-control"] == "no-store"
    thumbnail = visit(uploaded["thumbnailUrl"])
    assert thumbnail.headers["cache-control"].startswith("public")


@pytest.mark.parametrize("as_thumbnail", [False, True])
def test_what_the_client_has_is_not_sent_again(
    shared_server: LoupeServer, as_thumbnail: bool
) -> None:
    uploaded = put(shared_server)
    url = uploaded["thumbnailUrl" if as_thumbnail else "url"]
    etag = visit(url).headers["etag"]
    assert re.fullmatch(r'"[\w-]+"', etag)
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = visit(url, if_none_match=known)
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
        assert visit(url, "HEAD", if_none_match=known).status_code == 304
    for other in ('"other"', "junk", '"' + "a" * 50_000 + '"'):
        assert visit(url, if_none_match=other).status_code == 200


def test_the_etag_changes_with_the_bytes_and_only_with_them(shared_server: LoupeServer) -> None:
    first = put(shared_server, b"one", "a.txt")
    folder = first["filePath"].rpartition("/")[0]
    etag = visit(first["url"]).headers["etag"]
    patch(shared_server, first["fileId"], tags=["tagged"])
    assert visit(first["url"]).headers["etag"] == etag
    put(shared_server, b"two", "a.txt", folder=folder)
    answer = visit(first["url"], if_none_match=etag)
    assert (answer.status_code, answer.content) == (200, b"two")
    assert answer.headers["etag"] != etag


def test_a_file_and_its_thumbnail_differ_in_etag(shared_server: LoupeServer) -> None:
    uploaded = put(shared_server)
    file, thumbnail = visit(uploaded["url"]), visit(uploaded["thumbnailUrl"])
    assert file.headers["etag"] != thumbnail.headers["etag"]


@pytest.mark.parametrize("which", ["url", "thumbnailUrl"])
def test_head_is_get_without_the_bytes(shared_server: LoupeServer, which: str) -> None:
    url = put(shared_server)[which]
    got, head = visit(url), visit(url, "HEAD")

    def lasting(answer: httpx.Response) -> dict[str, str]:
        return {k: v for k, v in answer.headers.items() if k not in ("date", "x-ik-requestid")}

    assert (head.status_code, head.content) == (200, b"")
    assert lasting(head) == lasting(got)
    assert int(head.headers["content-length"]) == len(got.content)


def test_head_sends_no_byte_of_a_body(shared_server: LoupeServer) -> None:
    path = put(shared_server)["url"].removeprefix(shared_server.url)
    for target in (path, "/demo/unknown.jpg", f"{path}?tr=w-5"):
        with raw_exchange(shared_server, f"HEAD {target} HTTP/1.1".encode()) as answer:
            assert answer.fp is None or answer.fp.read() == b""


@pytest.mark.parametrize("value", ["true", "True", "TRUE"])
def test_a_download_is_asked_for_by_the_query(shared_server: LoupeServer, value: str) -> None:
    url = put(shared_server, name="Ünï 猫.jpg")["url"]
    disposition = visit(f"{url}?ik-attachment={value}").headers["content-disposition"]
    encoded = quote("Ünï_猫.jpg", safe="")
    assert disposition == f"attachment; filename=\"_n___.jpg\"; filename*=UTF-8''{encoded}"


@pytest.mark.parametrize("query", ["ik-attachment=false", "ik-attachment=", "ik-attachment"])
def test_a_picture_is_shown_unless_a_download_is_asked_for(
    shared_server: LoupeServer, query: str
) -> None:
    assert "content-disposition" not in visit(f"{put(shared_server)['url']}?{query}").headers


@pytest.mark.parametrize(
    "query",
    [
        "updatedAt=1699999999999",
        "unknown=1&unknown=2",
        "",
        "&&&",
        "%ff=%ff",
        "%00",
        "tr=",
        "&".join(f"a{number}=1" for number in range(1000)),
        "a=" + "b" * 20_000,
        "ik-s=anything&ik-t=anything",
    ],
    ids=lambda query: query[:16],
)
def test_an_unknown_query_changes_nothing(shared_server: LoupeServer, query: str) -> None:
    answer = visit(f"{put(shared_server)['url']}?{query}")
    assert (answer.status_code, answer.content) == (200, pictures.jpeg())


def test_a_version_is_addressed_by_its_id(server: LoupeServer) -> None:
    first = put(server, b"one", "a.txt", folder="/a")
    second = put(server, pictures.jpeg(), "a.txt", folder="/a")
    other = put(server, b"other", "b.txt", folder="/a")

    def version(uploaded: dict[str, Any]) -> httpx.Response:
        return visit(f"{first['url']}?ik-obj-version={uploaded['versionInfo']['id']}&updatedAt=5")

    assert version(first).content == b"one"
    assert version(second).content == pictures.jpeg()
    assert visit(first["url"]).content == pictures.jpeg()
    assert is_not_found(version(other))


@pytest.mark.parametrize("version", ["", "0" * 24, "%ff", "'", "x" * 9000, "A" * 24])
def test_an_unknown_version_is_not_found(shared_server: LoupeServer, version: str) -> None:
    assert is_not_found(visit(f"{put(shared_server)['url']}?ik-obj-version={version}"))


def test_no_part_of_a_url_is_too_odd_for_the_database(server: LoupeServer) -> None:
    url = put(server)["url"]
    for odd in (
        f"{url}?ik-obj-version=%00",
        f"{url}?ik-obj-version=a%00b",
        f"{url}%00",
        f"{url}%EF%BF%BF",
        f"{server.url}/demo/{'%E7%8C%AB' * 1000}/a.jpg",
    ):
        assert is_not_found(visit(odd))


def test_a_draft_is_not_found_until_it_is_published(server: LoupeServer) -> None:
    uploaded = put(server, isPublished="false")
    urls = (uploaded["url"], uploaded["thumbnailUrl"], with_transformation(uploaded["url"], "w-5"))
    for url in urls[:2]:
        assert is_not_found(visit(url))
        assert visit(url, "HEAD").status_code == 404
    patch(server, uploaded["fileId"], publish={"isPublished": True})
    assert [visit(url).status_code for url in urls] == [200, 200, 400]
    patch(server, uploaded["fileId"], publish={"isPublished": False})
    assert is_not_found(visit(uploaded["url"]))


def test_a_deleted_file_is_not_found(server: LoupeServer) -> None:
    uploaded = put(server)
    assert visit(uploaded["thumbnailUrl"]).status_code == 200
    assert server.client.delete(f"/v1/files/{uploaded['fileId']}").status_code == 204
    assert is_not_found(visit(uploaded["url"]))
    assert is_not_found(visit(uploaded["thumbnailUrl"]))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_file_whose_bytes_are_gone_is_not_found(server: LoupeServer, tmp_path: Path) -> None:
    uploaded = put(server)
    for blob in (tmp_path / "files" / "blobs").glob("*/*"):
        blob.unlink()
    assert is_not_found(visit(uploaded["url"]))
    assert is_not_found(visit(uploaded["thumbnailUrl"]))


@pytest.mark.parametrize(
    "path", ["unknown.jpg", "a/b/c.jpg", "", "%F0%9F%90%88", "a" * 300, "%C2%85"]
)
def test_an_unknown_path_is_not_found(shared_server: LoupeServer, path: str) -> None:
    answer = visit(f"{shared_server.url}/demo/{path}")
    assert is_not_found(answer)
    assert answer.headers["x-ik-requestid"]


@pytest.mark.parametrize("path", ["/other/a.jpg", "/dem%6f/a.jpg", "/demo%2Fa.jpg", "/", "/demo"])
def test_another_id_is_an_unknown_url(shared_server: LoupeServer, path: str) -> None:
    assert is_refused(visit(f"{shared_server.url}{path}"), 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE"])
def test_delivery_only_reads(shared_server: LoupeServer, method: str) -> None:
    url = put(shared_server)["url"]
    assert is_refused(visit(url, method), 405)
    assert visit(url).status_code == 200


@pytest.fixture(scope="module")
def known_path(shared_server: LoupeServer) -> str:
    """Of a file in a folder: what the odd paths below all try to reach."""
    return str(put(shared_server, folder="/odd/paths", name="a.jpg")["filePath"])


@pytest.mark.parametrize(
    "target",
    [
        b"/demo/../demo/odd/paths/a.jpg",
        b"/demo/odd/x/../paths/a.jpg",
        b"/demo/odd/paths/./a.jpg",
        b"/demo/%2e%2e/odd/paths/a.jpg",
        b"/demo/odd/x/%2e%2e/paths/a.jpg",
        b"/demo/..%2fodd/paths/a.jpg",
        b"/demo/../../../../../../etc/passwd",
        b"/demo/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        b"/demo//odd/paths/a.jpg",
        b"/demo/odd//paths/a.jpg",
        b"/demo/odd/paths/a.jpg/",
        b"/demo/odd/paths/a.jpg%00",
        b"/demo/odd/paths/a.jpg%00.png",
        b"/demo/%00",
        b"/demo/odd\\paths\\a.jpg",
        b"/demo/odd%5Cpaths%5Ca.jpg",
        b"/demo/odd/paths/a.jpg%0a",
        b"/demo/odd/paths/a.jpg%0d%0aX-Injected:%201",
        b"/demo/odd/paths/a%ff.jpg",
        b"/demo/%c3%28",
        b"/demo/%ed%a0%80",
        b"/demo/%",
        b"/demo/%zz/%1",
        b"/demo/odd/paths/\xc3\xa9.jpg",
        b"/demo/" + b"a/" * 4000 + b"a.jpg",
        b"/demo/" + b"x" * 8192,
        b"/demo/" + b"%e7%8c%ab" * 1000,
        b"//demo/odd/paths/a.jpg",
        b"/demo/odd/paths/a.jpg;x=1",
        b"/DEMO/odd/paths/a.jpg",
        b"/demo/ODD/paths/a.jpg",
    ],
    ids=lambda target: target[:40].decode("latin-1"),
)
@pytest.mark.usefixtures("known_path")
def test_an_odd_path_is_refused_and_reaches_nothing(
    shared_server: LoupeServer, target: bytes
) -> None:
    with raw_exchange(shared_server, b"GET " + target + b" HTTP/1.1") as answer:
        assert answer.status in (400, 404)
        assert answer.getheader("x-injected") is None
        assert answer.read()[:3] != b"\xff\xd8\xff"


def test_an_absolute_request_target_is_served(shared_server: LoupeServer, known_path: str) -> None:
    target = f"{shared_server.url}/demo{known_path}"
    with raw_exchange(shared_server, f"GET {target} HTTP/1.1".encode()) as answer:
        assert (answer.status, answer.read()) == (200, pictures.jpeg())


@pytest.mark.parametrize(
    "name",
    [
        "plain.jpg",
        "with space.jpg",
        "100%.jpg",
        "a%2Fb%20c.jpg",
        "hash#tag.jpg",
        "what?.jpg",
        "a&b=c+d;e,f:g@h!.jpg",
        "Ünïcødé.jpg",
        "猫の写真.jpg",
        "e\u0301.jpg",
        "हिन्दी.jpg",
        "emoji🐈.jpg",
        "tr:w-5.jpg",
        "..jpg",
        "...",
        ".htaccess",
        "no-extension",
        "-_.~'\"<>|*.jpg",
        "a" * 200 + ".jpg",
    ],
)
def test_every_url_that_an_answer_names_opens(shared_server: LoupeServer, name: str) -> None:
    for unique in ("false", "true"):
        fields = {"useUniqueFileName": unique, "folder": f"/{name[:50]}/Ünter öldner"}
        uploaded = put(shared_server, None, name, **fields)
        details = shared_server.details(uploaded["fileId"])
        patched = patch(shared_server, uploaded["fileId"], tags=["a"])
        listed = shared_server.client.get(
            "/v1/files", params={"path": uploaded["filePath"].rpartition("/")[0]}
        ).json()
        files = [uploaded, details, patched, *listed]
        for url in {file["url"] for file in files}:
            assert visit(url).content == pictures.jpeg()
            assert "?" not in url
            assert url.isascii()
        for url in {file.get("thumbnail") or file["thumbnailUrl"] for file in files}:
            assert visit(url).headers["content-type"] == "image/jpeg"


def test_a_large_file_arrives_whole(shared_server: LoupeServer) -> None:
    content = random.Random(1).randbytes(20_000_000)
    uploaded = put(shared_server, content, "large.bin")
    received = bytearray()
    with httpx.stream("GET", uploaded["url"], timeout=60) as answer:
        assert answer.headers["content-length"] == "20000000"
        for piece in answer.iter_raw():
            received += piece
    assert received == content


def test_a_visitor_who_leaves_keeps_no_file_open(shared_server: LoupeServer) -> None:
    url = put(shared_server, bytes(10_000_000), "large.bin")["url"]
    with httpx.stream("GET", url, timeout=60) as answer:
        assert next(answer.iter_raw())
    deadline = time.monotonic() + 10
    while blobs := open_blobs():
        assert time.monotonic() < deadline, blobs
        time.sleep(0.01)
    assert visit(url, range="bytes=0-3").content == bytes(4)


def open_blobs() -> list[str]:
    """Blobs that this process, which is also the server's, has open."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(descriptor.readlink()))
        except OSError:
            continue  # closed meanwhile
    return [target for target in targets if "/blobs/" in target]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_id_that_is_set_is_the_first_part_of_every_url(serve: Serve) -> None:
    server = serve(imagekit_id="my-id")
    uploaded = put(server, folder="/a")
    assert uploaded["url"] == f"{server.url}/my-id/a/picture.jpg"
    assert uploaded["thumbnailUrl"] == f"{server.url}/my-id/tr:{THUMBNAIL}/a/picture.jpg"
    assert visit(uploaded["url"]).content == pictures.jpeg()
    assert is_refused(visit(f"{server.url}/demo/a/picture.jpg"), 404)


def test_a_404_says_so_in_words(shared_server: LoupeServer) -> None:
    assert visit(f"{shared_server.url}/demo/unknown").json()["message"] == NOT_FOUND
