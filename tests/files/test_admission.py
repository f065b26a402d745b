"""Whether an upload may begin: room on the disk, and not too many at once in one process."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from app.extensions.schemas import GOOGLE
from app.files.admission import RETRY_AFTER_SECONDS
from app.settings import Settings
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.vision import VisionEmulator
from tests.files.helpers import (
    PICTURE,
    RawConnection,
    accepted,
    anonymous,
    form_body,
    form_part,
    nothing_left,
    on_sqlite_only,
    patch,
    post_form,
    refused,
    upload,
)
from tests.files.support import asking, wait_until
from tests.server import LoupeServer

NO_ROOM = "There is no room for uploads at the moment. Please try again later."
TOO_MANY = "Too many uploads are under way. Please try again later."
MORE_THAN_ANY_DISK = 2**62
NAME = form_part("fileName", b"a.bin")


def put_off(answer: httpx.Response, message: str) -> None:
    refused(answer, 503, message)
    assert int(answer.headers["retry-after"]) == RETRY_AFTER_SECONDS


def put_off_without_a_body(server: LoupeServer) -> None:
    """Though the client has sent nothing of its file yet, and never does."""
    with nothing_left(server), RawConnection(server.url) as connection:
        connection.send_upload_head("Content-Length: 10000000")
        answer = connection.read_answer()
    assert answer.status == 503
    assert answer.headers["retry-after"] == str(RETRY_AFTER_SECONDS)
    assert answer.headers["connection"] == "close"


class UploadUnderWay:
    """An upload of 2 MB that has sent all but its last 100 bytes."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self._body = form_body(NAME, form_part("file", bytes(2_000_000), "a.bin"))
        connection.send_upload_head(f"Content-Length: {len(self._body)}")
        connection.send(self._body[:-100])

    def finish(self) -> int:
        """The status of its answer."""
        self._connection.send(self._body[-100:])
        return self._connection.read_answer().status

    def hang_up(self) -> None:
        self._connection.socket.close()


def staged(server: LoupeServer) -> int:
    return len(list(server.resources.storage.staging_dir.iterdir()))


@contextmanager
def under_way(server: LoupeServer, number: int) -> Iterator[list[UploadUnderWay]]:
    with ExitStack() as stack:
        uploads = [
            UploadUnderWay(stack.enter_context(RawConnection(server.url))) for _ in range(number)
        ]
        wait_until(lambda: staged(server) == number, f"{number} staged files")
        yield uploads


def assert_all_else_goes_on(server: LoupeServer, uploaded: dict[str, Any]) -> None:
    assert httpx.get(uploaded["url"]).content == PICTURE
    assert server.client.get("/v1/files").status_code == 200
    assert server.client.get("/readyz").status_code == 200
    accepted(patch(server, uploaded["fileId"], {"tags": ["still", "writable"]}))


def test_the_limits_are_256_megabytes_and_128_uploads() -> None:
    fields = Settings.model_fields
    assert fields["disk_reserve_bytes"].default == 256_000_000
    assert fields["max_concurrent_uploads"].default == 128


# --- room on the disk -------------------------------------------------------------------------


@on_sqlite_only
def test_below_the_reserve_uploads_are_refused_before_their_body_and_all_else_goes_on(
    serve: Serve,
) -> None:
    earlier = serve()
    file_id = upload(earlier)["fileId"]
    earlier.stop()
    full = serve(
        disk_reserve_bytes=MORE_THAN_ANY_DISK, google_auto_tagging="local", sync_budget_seconds=0
    )
    uploaded = full.details(file_id)
    with nothing_left(full):
        put_off(full.upload(PICTURE), NO_ROOM)
    put_off_without_a_body(full)
    assert_all_else_goes_on(full, uploaded)
    with Receiver() as receiver:
        wanted = [{"name": GOOGLE, "minConfidence": 0, "maxTags": 3}]
        change = {"extensions": wanted, "webhookUrl": receiver.url}
        assert accepted(patch(full, file_id, change))["extensionStatus"] == {GOOGLE: "pending"}
        [told] = receiver.wait_for(1)
    assert told.json()["status"] == "SUCCESS"


@on_sqlite_only
def test_uploads_come_back_with_the_room(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    free_bytes = [255_999_999, 256_000_000]

    class Usage:
        @property
        def free(self) -> int:
            return free_bytes[0]

    monkeypatch.setattr("app.files.admission.shutil.disk_usage", lambda _: Usage())
    put_off(server.upload(PICTURE), NO_ROOM)
    free_bytes.pop(0)
    accepted(server.upload(PICTURE))


@on_sqlite_only
def test_a_wrong_key_learns_nothing_of_the_disk(serve: Serve) -> None:
    server = serve(disk_reserve_bytes=MORE_THAN_ANY_DISK)
    with anonymous(server) as client:
        headers = {"Authorization": "Basic !!!"}
        refused(post_form(server, {"fileName": "a"}, client=client, headers=headers), 401)
        answer = client.post("/api/v1/files/upload", auth=("private_wrong", ""))
        refused(answer, 403)


# --- not too many at once ---------------------------------------------------------------------


@on_sqlite_only
def test_beyond_the_limit_uploads_are_refused_before_their_body_and_all_else_goes_on(
    serve: Serve,
) -> None:
    server = serve(max_concurrent_uploads=3)
    uploaded = upload(server)
    with under_way(server, 3) as uploads:
        for _ in range(5):
            put_off_without_a_body(server)
        put_off(server.upload(PICTURE), TOO_MANY)
        assert_all_else_goes_on(server, uploaded)
        assert [each.finish() for each in uploads] == [200, 200, 200]
    accepted(server.upload(PICTURE))


@on_sqlite_only
def test_each_place_is_given_on_as_it_becomes_free(serve: Serve) -> None:
    server = serve(max_concurrent_uploads=2)
    with under_way(server, 2) as uploads:
        put_off(server.upload(PICTURE), TOO_MANY)
        assert uploads[0].finish() == 200
        accepted(server.upload(PICTURE))
        uploads[1].hang_up()
        wait_until(lambda: staged(server) == 0, "no staged file")
    with under_way(server, 2):
        put_off(server.upload(PICTURE), TOO_MANY)


@on_sqlite_only
@pytest.mark.parametrize(
    "attempt",
    [
        lambda server: server.upload(PICTURE, fileName=".."),
        lambda server: server.upload(b""),
        lambda server: server.upload(bytes(3_000_000)),
        lambda server: server.client.post("/api/v1/files/upload", content=b"nonsense"),
        lambda server: server.upload(PICTURE, extensions="[{}]"),
        lambda server: post_form(server, {"file": "http://127.0.0.1:9/", "fileName": "a"}),
    ],
    ids=["name", "empty", "too large", "no form", "extensions", "unreachable"],
)
def test_a_refused_upload_gives_its_place_back(
    serve: Serve, attempt: Callable[[LoupeServer], httpx.Response]
) -> None:
    server = serve(max_concurrent_uploads=1, max_upload_bytes=1_000_000)
    for _ in range(3):
        assert attempt(server).status_code in (400, 413)
    accepted(server.upload(PICTURE))


@on_sqlite_only
def test_an_upload_that_waits_for_its_extensions_holds_no_place(
    vision: VisionEmulator, serve: Serve
) -> None:
    """Its file is stored; what is left of it is a row and a waiting task."""
    server = serve(max_concurrent_uploads=1, google_auto_tagging="vision", sync_budget_seconds=30)
    vision.hold()
    with ThreadPoolExecutor(3) as threads:
        waiting = [
            threads.submit(server.upload, PICTURE, extensions=asking(GOOGLE)) for _ in range(1)
        ]
        vision.wait_for_calls(1)
        accepted(server.upload(b"text"))
        waiting.append(threads.submit(server.upload, PICTURE, extensions=asking(GOOGLE)))
        vision.wait_for_calls(2)
        accepted(server.upload(b"text"))
        vision.release()
        for each in waiting:
            assert accepted(each.result(60))["extensionStatus"] == {GOOGLE: "success"}
