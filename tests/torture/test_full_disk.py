"""A disk that is full: uploads are refused, reads live on, and space brings uploads back."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import schema
from tests import pictures
from tests.torture.harness import AUTH, ServerProcess, report, running, staged_files

DISK_BYTES = 12 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def upload(server: ServerProcess, content: bytes) -> httpx.Response:
    return httpx.post(
        f"{server.url}/api/v1/files/upload",
        files={"file": ("a.jpg", content)},
        data={"fileName": "a.jpg"},
        auth=AUTH,
        timeout=30,
    )


def test_full_disk_refuses_uploads_serves_reads_and_recovers(small_disk: Path) -> None:
    url = f"sqlite:///{small_disk / 'loupe.db'}"
    schema.upgrade(url)
    server = ServerProcess(small_disk, url, LOUPE_DISK_RESERVE_BYTES="0")
    with running(server):
        first = upload(server, pictures.jpeg()).json()
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            file.write(b"x" * (free - 200_000))
        big = pictures.jpeg() + os.urandom(1_000_000)
        refusals = [upload(server, big) for _ in range(10)]
        assert {answer.status_code for answer in refusals} == {503}
        assert all("retry-after" in answer.headers for answer in refusals)
        assert all(set(answer.json()) == {"message", "help"} for answer in refusals)
        reads = [httpx.get(first["url"], timeout=30).status_code for _ in range(50)]
        assert set(reads) == {200}
        filler.unlink()
        deadline = time.monotonic() + 5
        while (status := upload(server, big).status_code) != 200:
            assert time.monotonic() < deadline
        assert status == 200
        report("full disk", refused=len(refusals), reads=len(reads))
    assert staged_files(small_disk) == []


def test_upload_below_the_reserve_is_refused_before_its_body_is_read(small_disk: Path) -> None:
    url = f"sqlite:///{small_disk / 'loupe.db'}"
    schema.upgrade(url)
    server = ServerProcess(small_disk, url, LOUPE_DISK_RESERVE_BYTES=str(10**9))
    with running(server):
        refused = upload(server, pictures.jpeg())
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert httpx.get(f"{server.url}/v1/files", auth=AUTH, timeout=30).json() == []
