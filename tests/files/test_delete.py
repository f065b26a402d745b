"""Deleting: the file with all its versions and bytes, once."""

from collections import Counter
from typing import Any, NoReturn

import pytest
from sqlalchemy import func, select

from app.files.models import files, versions
from tests import pictures
from tests.files.helpers import at_once, nothing_left, on_sqlite_only, refused, upload_as
from tests.server import LoupeServer

NOT_FOUND = "The requested file does not exist."


def test_a_deleted_file_is_gone_with_all_its_versions_and_bytes(server: LoupeServer) -> None:
    other = upload_as(server, "other.jpg", folder="/a")
    with nothing_left(server):
        file_id = upload_as(server, "a.jpg", folder="/a")["fileId"]
        upload_as(server, "a.jpg", pictures.png(), folder="/a")
        upload_as(server, "a.jpg", b"text", folder="/a")
        answer = server.client.delete(f"/v1/files/{file_id}")
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["x-ik-requestid"]
    for method, path in (("GET", "/details"), ("PATCH", "/details"), ("DELETE", "")):
        body: dict[str, Any] | None = {} if method == "PATCH" else None
        again = server.client.request(method, f"/v1/files/{file_id}{path}", json=body)
        refused(again, 404, NOT_FOUND)
    assert [file["fileId"] for file in server.client.get("/v1/files").json()] == [other["fileId"]]
    assert server.client.get("/demo/a/a.jpg").status_code == 404


def test_the_name_of_a_deleted_file_is_free(server: LoupeServer) -> None:
    old = upload_as(server, "a.jpg")["fileId"]
    server.client.delete(f"/v1/files/{old}")
    new = upload_as(server, "a.jpg", overwriteFile="false")
    assert new["fileId"] != old
    assert new["versionInfo"]["name"] == "Version 1"


def test_a_file_is_deleted_once_by_20_clients(server: LoupeServer) -> None:
    file_id = upload_as(server, "a.jpg")["fileId"]
    answers = at_once([lambda: server.client.delete(f"/v1/files/{file_id}")] * 20)
    assert Counter(answer.status_code for answer in answers) == {204: 1, 404: 19}


def test_deleting_while_overwriting_leaves_no_version_without_a_file(
    server: LoupeServer,
) -> None:
    file_id = upload_as(server, "a.jpg")["fileId"]
    overwriting = [lambda: upload_as(server, "a.jpg", b"text")["fileId"]] * 6
    deleting = [lambda: server.client.delete(f"/v1/files/{file_id}").status_code] * 2
    at_once([*overwriting[:3], *deleting, *overwriting[3:]])
    owned = select(func.count()).select_from(versions).join(files, files.c.id == versions.c.file_id)
    [[joined]] = server.rows(owned)
    [[all_versions]] = server.rows(select(func.count()).select_from(versions))
    assert joined == all_versions
    blobs = server.resources.settings.storage_dir / "blobs"
    kept = {path.name for path in blobs.rglob("*") if path.is_file()}
    assert kept == {row.blob_key for row in server.rows(select(versions.c.blob_key))}


@on_sqlite_only
def test_bytes_that_cannot_be_deleted_do_not_keep_the_file(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> NoReturn:
        raise OSError("read-only file system")

    file_id = upload_as(server, "a.jpg")["fileId"]
    with monkeypatch.context() as breaking:
        breaking.setattr(server.resources.storage, "delete", fail)
        assert server.client.delete(f"/v1/files/{file_id}").status_code == 204
    refused(server.client.get(f"/v1/files/{file_id}/details"), 404, NOT_FOUND)
