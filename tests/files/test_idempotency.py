"""Uploads that are repeated under one `Idempotency-Key`: the first answer again, and one file."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, func, select, update

from app.db import Tx
from app.extensions.schemas import AWS, GOOGLE
from app.files.idempotency import KEPT_SECONDS, MAX_KEY_CHARACTERS, uploads
from app.files.models import files, versions
from app.settings import DEVELOPMENT_PRIVATE_KEY
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.vision import VisionEmulator
from tests.files.helpers import (
    PICTURE,
    UPLOAD,
    accepted,
    anonymous,
    at_once,
    nothing_left,
    on_sqlite_only,
    post_form,
    refused,
    traces,
    upload,
)
from tests.files.support import asking, run_of, wait_for_status, wait_until, wait_until_final
from tests.files.test_upload import stored_bytes
from tests.server import LoupeServer
from tests.test_auth import FILE, signed
from tests.torture.harness import ServerProcess, running

OTHER_CONTENT = (
    "Your request contains an Idempotency-Key that was used with another file or other parameters."
)
STILL_RUNNING = "The first request with this Idempotency-Key is still running."


def send(
    server: LoupeServer,
    key: str | bytes,
    content: bytes = PICTURE,
    client: httpx.Client | None = None,
    /,
    **fields: str,
) -> httpx.Response:
    return (client or server.client).post(
        UPLOAD,
        files={"file": ("a.jpg", content)},
        data={"fileName": "a.jpg", **fields},
        headers={b"Idempotency-Key": key if isinstance(key, bytes) else key.encode()},
    )


def count(server: LoupeServer, table: Any) -> int:
    return int(server.rows(select(func.count()).select_from(table))[0][0])


def age(server: LoupeServer, **by: float) -> None:
    """As if so much time had gone by since the uploads under a key."""

    def change(tx: Tx) -> None:
        for row in tx.execute(select(uploads)).all():
            older = {
                name: getattr(row, name) - timedelta(**by)
                for name in ("claimed_until", "expires_at")
            }
            tx.execute(update(uploads).where(uploads.c.key == row.key).values(older))

    server.write(change)


# --- the first answer again -------------------------------------------------------------------


def test_a_repeat_gets_the_same_bytes_and_stores_nothing(server: LoupeServer) -> None:
    fields = {
        "tags": "z,a",
        "description": "Ünïcode 👍",
        "responseFields": "tags,isPrivateFile,customMetadata",
    }
    first = send(server, "one", **fields)
    accepted(first)
    for _ in range(3):
        with nothing_left(server):
            again = send(server, "one", **fields)
        accepted(again)
        assert again.content == first.content
    assert again.headers["x-ik-requestid"] != first.headers["x-ik-requestid"]
    assert stored_bytes(server, first.json()["fileId"]) == PICTURE


def test_a_repeat_gets_the_first_answer_whatever_became_of_the_file(server: LoupeServer) -> None:
    first = send(server, "one")
    file_id = accepted(first)["fileId"]
    patched = server.client.patch(f"/v1/files/{file_id}/details", json={"tags": ["new"]})
    accepted(patched)
    assert send(server, "one").content == first.content
    assert server.client.delete(f"/v1/files/{file_id}").status_code == 204
    assert send(server, "one").content == first.content
    assert count(server, files) == 0


def test_a_repeat_of_a_tagged_upload_gets_its_tags_and_calls_nobody(
    vision: VisionEmulator, serve: Serve
) -> None:
    vision.labels = [("Zebra", 100.0), ("Cat", 97.25)]
    server = serve(google_auto_tagging="vision", sync_budget_seconds=30)
    first = send(server, "one", extensions=asking(GOOGLE))
    assert accepted(first)["extensionStatus"] == {GOOGLE: "success"}
    assert first.json()["AITags"]
    with nothing_left(server):
        assert send(server, "one", extensions=asking(GOOGLE)).content == first.content
    assert len(vision.calls) == 1


def test_a_repeat_says_pending_as_the_first_answer_did_and_tells_nothing_twice(
    vision: VisionEmulator, serve: Serve
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=0.25)
    with Receiver() as receiver:
        fields = {"extensions": asking(GOOGLE), "webhookUrl": receiver.url}
        vision.hold()
        first = send(server, "one", **fields)
        assert accepted(first)["extensionStatus"] == {GOOGLE: "pending"}
        assert send(server, "one", **fields).content == first.content
        vision.release()
        wait_for_status(server, first.json()["fileId"], GOOGLE, "success")
        assert send(server, "one", **fields).content == first.content
        wait_until_final(server)
        assert len(receiver.requests) == len(vision.calls) == 1


def test_a_repeat_by_url_fetches_nothing(server: LoupeServer) -> None:
    with Receiver() as remote:
        form = {"file": remote.serve("/a.jpg", PICTURE), "fileName": "a.jpg"}
        headers = {"Idempotency-Key": "one"}
        first = post_form(server, form, headers=headers)
        accepted(first)
        with nothing_left(server, remote):
            assert post_form(server, form, headers=headers).content == first.content
            other = form | {"file": remote.serve("/b.jpg", PICTURE)}
            refused(post_form(server, other, headers=headers), 400, OTHER_CONTENT)
    assert stored_bytes(server, first.json()["fileId"]) == PICTURE


@on_sqlite_only
def test_a_repeat_is_known_after_a_restart(serve: Serve) -> None:
    server = serve()
    first = send(server, "one")
    accepted(first)
    server.stop()
    restarted = serve(public_url=server.url)
    restarted.client.base_url = httpx.URL(f"http://127.0.0.1:{restarted.resources.settings.port}")
    assert send(restarted, "one").content == first.content
    assert count(restarted, files) == 1


# --- what is no repeat ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (PICTURE + b" ", {"tags": "a"}),
        (PICTURE, {}),
        (PICTURE, {"tags": "a,b"}),
        (PICTURE, {"tags": "a", "fileName": "b.jpg"}),
        (PICTURE, {"tags": "a", "unknown": "field"}),
        (PICTURE, {"tags": "a", "overwriteFile": "true"}),
    ],
    ids=["bytes", "no tags", "other tags", "other name", "unknown field", "default spelled out"],
)
def test_the_same_key_for_something_else_is_400(
    server: LoupeServer, content: bytes, fields: dict[str, str]
) -> None:
    first = send(server, "one", tags="a")
    accepted(first)
    with nothing_left(server):
        refused(send(server, "one", content, **fields), 400, OTHER_CONTENT)
    assert send(server, "one", tags="a").content == first.content


def test_each_private_key_has_its_own_keys(serve: Serve) -> None:
    server = serve(private_keys="private_a,private_b", public_keys="public_a,public_b")
    with (
        httpx.Client(base_url=server.url, auth=("private_a", "")) as a,
        httpx.Client(base_url=server.url, auth=("private_b", "")) as b,
    ):
        first = send(server, "one", PICTURE, a)
        second = send(server, "one", PICTURE, b, tags="of another")
        assert accepted(first)["fileId"] != accepted(second)["fileId"]
        assert send(server, "one", PICTURE, a).content == first.content
    assert count(server, files) == 2


def test_a_key_is_forgotten_after_24_hours_and_not_before(server: LoupeServer) -> None:
    first = send(server, "one")
    accepted(first)
    age(server, seconds=KEPT_SECONDS - 600)
    assert send(server, "one").content == first.content
    age(server, seconds=601)
    second = accepted(send(server, "one", b"other content"))
    assert second["fileId"] != first.json()["fileId"]
    assert count(server, files) == 2
    assert count(server, uploads) == 1


def test_a_refused_upload_leaves_its_key_free(server: LoupeServer) -> None:
    taken = upload(server, fileName="taken.jpg", useUniqueFileName="false")
    for status, fields in (
        (400, {"fileName": ".."}),
        (400, {"extensions": "[{}]"}),
        (400, {"webhookUrl": "ftp://example.com"}),
        (400, {"fileName": taken["name"], "useUniqueFileName": "false", "overwriteFile": "false"}),
    ):
        with nothing_left(server):
            refused(send(server, "one", **fields), status)
    accepted(send(server, "one"))


def test_a_client_side_upload_has_no_use_for_a_key(server: LoupeServer) -> None:
    headers = {"Idempotency-Key": "one"}
    with anonymous(server) as client:
        answers = [
            accepted(post_form(server, FILE | signed(), client=client, headers=headers))
            for _ in range(2)
        ]
    assert answers[0]["fileId"] != answers[1]["fileId"]
    assert count(server, uploads) == 0


@pytest.mark.parametrize(
    "key",
    [
        b"x" * MAX_KEY_CHARACTERS,
        bytes(range(0x80, 0x100)),
        b'"quoted"',
        b"a b\tcd",
        b"'; DROP TABLE files --",
        b"%00%0a",
        "Ünïcode".encode(),
    ],
    ids=lambda key: repr(key)[:24],
)
def test_any_bytes_make_a_key(server: LoupeServer, key: bytes) -> None:
    first = send(server, key)
    accepted(first)
    assert send(server, key).content == first.content
    assert accepted(send(server, key[:-1]))["fileId"] != first.json()["fileId"]


def test_a_key_beyond_255_characters_is_400(server: LoupeServer) -> None:
    with nothing_left(server):
        message = refused(send(server, "x" * (MAX_KEY_CHARACTERS + 1)), 400)
    assert "Idempotency-Key" in message


def test_an_empty_key_is_none(server: LoupeServer) -> None:
    answers = [accepted(send(server, "")) for _ in range(2)]
    assert answers[0]["fileId"] != answers[1]["fileId"]
    assert count(server, uploads) == 0


def test_keys_differ_in_case(server: LoupeServer) -> None:
    assert accepted(send(server, "a"))["fileId"] != accepted(send(server, "A"))["fileId"]


# --- at the same time -------------------------------------------------------------------------


def test_50_at_once_under_one_key_store_one_file(server: LoupeServer) -> None:
    before = traces(server)
    answers = at_once([lambda: send(server, "one")] * 50)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 409}
    stored = {answer.content for answer in answers if answer.status_code == 200}
    assert len(stored) == 1
    for answer in answers:
        if answer.status_code == 409:
            refused(answer, 409, STILL_RUNNING)
            assert answer.headers["retry-after"] == "1"
    assert {send(server, "one").content} == stored
    left = traces(server) - before
    assert (left["table files"], left["table file_versions"]) == (1, 1)
    assert sum(number for name, number in left.items() if name.startswith("file ")) == 1


def test_two_uploads_at_once_under_one_key_never_mix(server: LoupeServer) -> None:
    contents = [b"one" * 1000, b"two" * 1000]
    answers = at_once(
        [
            lambda content=content: send(server, "one", content)  # type: ignore[misc]
            for content in contents * 10
        ]
    )
    assert {answer.status_code for answer in answers} <= {200, 400, 409}
    assert count(server, files) == 1
    [stored] = {answer.content for answer in answers if answer.status_code == 200}
    [version] = server.rows(select(versions.c.id))
    winner = contents.index(stored_bytes(server, version.id))
    assert send(server, "one", contents[winner]).content == stored
    refused(send(server, "one", contents[1 - winner]), 400, OTHER_CONTENT)


def test_a_repeat_while_the_first_still_runs_is_409(vision: VisionEmulator, serve: Serve) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=30)
    fields = {"extensions": asking(GOOGLE)}
    vision.hold()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(send, server, "one", **fields)
        vision.wait_for_calls(1)
        with nothing_left(server):
            again = send(server, "one", **fields)
            refused(again, 409, STILL_RUNNING)
            assert int(again.headers["retry-after"]) > 0
            refused(send(server, "one"), 400, OTHER_CONTENT)
        vision.release()
        assert accepted(first.result(60))["extensionStatus"] == {GOOGLE: "success"}
    assert send(server, "one", **fields).content == first.result().content
    assert len(vision.calls) == 1


# --- first requests that never answered -------------------------------------------------------


def test_an_answer_that_could_not_be_kept_is_made_when_the_claim_has_run_out(
    vision: VisionEmulator, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction that decides the first answer fails, as in a process that dies before it."""
    server = serve(google_auto_tagging="vision", sync_budget_seconds=0.25)
    write = server.resources.db.write
    settled = threading.Event()

    async def fail_to_settle(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "settle" and not settled.is_set():
            settled.set()
            raise RuntimeError("no answer")
        return await write(function, *args, **kwargs)

    vision.hold()
    with Receiver() as receiver:
        fields = {"extensions": asking(GOOGLE), "webhookUrl": receiver.url, "tags": "a"}
        monkeypatch.setattr(server.resources.db, "write", fail_to_settle)
        refused(send(server, "one", **fields), 500)
        refused(send(server, "one", **fields), 409, STILL_RUNNING)
        age(server, minutes=1)
        with nothing_left(server):
            again = send(server, "one", **fields)
        answer = accepted(again)
        assert answer["extensionStatus"] == {GOOGLE: "pending"}
        run = run_of(server, answer["fileId"])
        assert run.announced
        vision.release()
        receiver.wait_for(1)
        assert send(server, "one", **fields).content == again.content
        wait_until_final(server)
        assert len(receiver.requests) == 1
    assert count(server, files) == 1


@pytest.fixture
def process(tmp_path: Path, database_url: str) -> Iterator[ServerProcess]:
    server = ServerProcess(
        tmp_path,
        database_url,
        LOUPE_SYNC_BUDGET_SECONDS="60",
        LOUPE_LOCAL_DELAY_SECONDS="google-auto-tagging=60,aws-auto-tagging=0",
    )
    with running(server):
        yield server


def test_a_killed_upload_is_answered_from_its_row(
    process: ServerProcess, database_url: str
) -> None:
    engine = create_engine(database_url)

    def post() -> httpx.Response:
        return httpx.post(
            process.url + UPLOAD,
            files={"file": ("a.jpg", PICTURE)},
            data={"fileName": "a.jpg", "extensions": asking(AWS, GOOGLE)},
            headers={"Idempotency-Key": "one"},
            auth=(DEVELOPMENT_PRIVATE_KEY, ""),
            timeout=60,
        )

    def keys() -> list[Any]:
        with engine.connect() as connection:
            return list(connection.execute(select(uploads)))

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(post)
        [key] = wait_until(keys, "a key in the database", timeout_seconds=60)
        process.kill()
        assert isinstance(first.exception(60), httpx.TransportError)
    process.start()
    assert post().status_code == 409
    with engine.begin() as connection:
        connection.execute(
            update(uploads).values(claimed_until=key.claimed_until - timedelta(minutes=5))
        )
    again = post()
    assert again.status_code == 200, again.text
    assert again.json()["fileId"] == key.file_id
    assert again.json()["extensionStatus"][GOOGLE] == "pending"
    assert post().content == again.content
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(files)).scalar_one() == 1
    engine.dispose()
