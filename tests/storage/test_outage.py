"""What users see when files cannot be stored or read: 503, and nothing is left behind."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from app.extensions.models import runs
from app.files import upload
from app.files.models import files
from tests.conftest import Serve
from tests.emulators.s3 import S3Emulator
from tests.server import LoupeServer

# What the database is makes no difference here.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def _assert_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert set(answer.json()) == {"message", "help"}
    assert answer.headers["x-ik-requestid"]


def _assert_nothing_is_left(server: LoupeServer) -> None:
    for table in (files, runs):
        assert server.rows(select(func.count()).select_from(table))[0][0] == 0
    assert list(server.resources.storage.staging_dir.iterdir()) == []


@pytest.fixture
def bucket(s3: S3Emulator) -> str:
    return s3.create_bucket()


@pytest.fixture
def on_s3(s3: S3Emulator, bucket: str, serve: Serve) -> LoupeServer:
    return serve(storage_url=f"s3://{bucket}/prefix")


def test_files_are_uploaded_delivered_and_deleted_on_s3(
    on_s3: LoupeServer, s3: S3Emulator, bucket: str
) -> None:
    content = os.urandom(18_000_000)
    uploaded = on_s3.upload(content, "large.bin").json()
    assert httpx.get(uploaded["url"]).content == content
    part = httpx.get(uploaded["url"], headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, content[100:200])
    assert content in s3.objects(bucket).values()
    assert on_s3.client.delete(f"/v1/files/{uploaded['fileId']}").status_code == 204
    assert content not in s3.objects(bucket).values()


def test_an_upload_that_s3_does_not_take_gets_503(on_s3: LoupeServer, s3: S3Emulator) -> None:
    s3.faults["put"] = "denied"
    _assert_unavailable(on_s3.upload(b"content"))
    _assert_nothing_is_left(on_s3)
    s3.faults.clear()
    assert on_s3.upload(b"content").status_code == 200


def test_a_file_that_s3_does_not_give_gets_503(on_s3: LoupeServer, s3: S3Emulator) -> None:
    url = on_s3.upload(b"content", "file.txt").json()["url"]
    s3.faults["get"] = "denied"
    _assert_unavailable(httpx.get(url))
    s3.faults.clear()
    assert httpx.get(url).content == b"content"


def test_a_file_can_be_deleted_while_s3_is_down(on_s3: LoupeServer, s3: S3Emulator) -> None:
    file_id = on_s3.upload(b"content").json()["fileId"]
    s3.faults["delete"] = "denied"
    assert on_s3.client.delete(f"/v1/files/{file_id}").status_code == 204
    assert on_s3.client.get(f"/v1/files/{file_id}/details").status_code == 404


def test_a_refusal_stays_one_when_its_blob_cannot_be_deleted(
    on_s3: LoupeServer, s3: S3Emulator
) -> None:
    s3.faults["delete"] = "denied"
    once = {"useUniqueFileName": "false", "overwriteFile": "false"}
    assert on_s3.upload(b"content", **once).status_code == 200
    assert on_s3.upload(b"content", **once).status_code == 400


def test_a_server_on_s3_is_ready_only_while_s3_answers(on_s3: LoupeServer, s3: S3Emulator) -> None:
    assert on_s3.client.get("/readyz").status_code == 200
    s3.faults["head"] = "denied"
    assert on_s3.client.get("/readyz").status_code == 503


def test_after_a_failed_fsync_uploads_get_503_and_reads_go_on(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.upload(b"earlier", "file.txt").json()["url"]
    server.client.delete(f"/v1/files/{server.upload(b'other').json()['fileId']}")
    calls = []

    def fsync(descriptor: int) -> None:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        calls.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        _assert_unavailable(server.upload(b"x"))
        _assert_unavailable(server.upload(b"y"))
    assert len(calls) == 1
    _assert_unavailable(server.upload(b"z"))
    assert server.client.get("/readyz").status_code == 503
    assert httpx.get(url).content == b"earlier"
    assert server.rows(select(func.count()).select_from(files))[0][0] == 1
    assert list(server.resources.storage.staging_dir.iterdir()) == []


def test_a_staging_directory_that_is_gone_gets_503(server: LoupeServer) -> None:
    shutil.rmtree(server.resources.storage.staging_dir)
    _assert_unavailable(server.upload(b"x"))
    server.resources.storage.staging_dir.mkdir()
    assert server.upload(b"x").status_code == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_disk_that_fills_up_gets_503_until_it_has_room(small_disk: Path, serve: Serve) -> None:
    server = serve(storage_url=f"file://{small_disk}", disk_reserve_bytes=0)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_000_000))
    _assert_unavailable(server.upload(os.urandom(3_000_000)))
    _assert_nothing_is_left(server)
    filler.unlink()
    assert server.upload(os.urandom(3_000_000)).status_code == 200
    assert server.client.get("/readyz").status_code == 200


def test_an_upload_that_was_frozen_for_too_long_leaves_nothing(
    server: LoupeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(upload, "STORING_SECONDS", -3601.0)
    _assert_unavailable(server.upload(b"content"))
    _assert_nothing_is_left(server)
    blobs = [path for path in (tmp_path / "files" / "blobs").rglob("*") if path.is_file()]
    assert b"content" not in [path.read_bytes() for path in blobs]
