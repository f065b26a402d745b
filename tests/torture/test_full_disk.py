"""A disk that is full: uploads are refused, reads live on, and space brings uploads back."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests import pictures
from tests.strace import attached
from tests.torture.harness import (
    ServerProcess,
    has_content,
    report,
    running,
    size,
    staged_files,
    wait_for,
)
from tests.torture.uploads import upload

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

DISK_BYTES = 24 * 1024 * 1024
RECOVERY_SECONDS = 5
REFUSALS = size(5, 50)
READS = size(10, 500)
# Large enough for its first block to be written before its end has come.
CONTENT = pictures.jpeg() + os.urandom(1_500_000)
NOTHING_STORES = "fsync,rename,pwrite64,fdatasync"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """To the last byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while free_bytes := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize:
            file.write(bytes(min(free_bytes, 1024 * 1024)))
    yield
    filler.unlink()


@pytest.mark.parametrize("on_disk", ["files", "database", "both"])
def test_full_disk_refuses_uploads_serves_reads_and_recovers(
    small_disk: Path, tmp_path: Path, database_url: str, on_disk: str
) -> None:
    if on_disk != "files":
        shutil.move(tmp_path / "loupe.db", small_disk)
        database_url = f"sqlite:///{small_disk}/loupe.db"
    files = tmp_path / "files" if on_disk == "database" else small_disk / "files"
    server = ServerProcess(
        tmp_path,
        database_url,
        LOUPE_STORAGE_URL=f"file://{files}",
        LOUPE_DISK_RESERVE_BYTES="0",
    )
    with running(server):
        _check_while_full(server, partial(filled, small_disk), f"full disk with {on_disk}")


@pytest.mark.strace
def test_calls_that_find_no_room_refuse_uploads_serve_reads_and_recover(
    tmp_path: Path, database_url: str
) -> None:
    """Where no disk can be made for it: every call that stores something fails for want of room."""
    server = ServerProcess(tmp_path, database_url, LOUPE_DISK_RESERVE_BYTES="0")
    with running(server):
        full = partial(attached, server, NOTHING_STORES, "error=ENOSPC")
        _check_while_full(server, full, "no room")


def _check_while_full(
    server: ServerProcess, full: Callable[[], AbstractContextManager[object]], name: str
) -> None:
    stored = upload(server, CONTENT, "before.jpg").raise_for_status().json()
    with full():
        refusals = [upload(server, CONTENT, f"{number}.jpg") for number in range(REFUSALS)]
        reads = [has_content(stored, CONTENT) for _ in range(READS)]
        is_answering = httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
    freed_at = time.monotonic()
    assert {answer.status_code for answer in refusals} == {503}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refusals)
    assert all(set(answer.json()) == {"message", "help"} for answer in refusals)
    assert all(reads)
    assert is_answering
    seconds = _seconds_to_recover(server, freed_at)
    assert staged_files(server.directory) == []
    report(name, refused=len(refusals), reads=len(reads), recovered_within_seconds=seconds)


def _seconds_to_recover(server: ServerProcess, freed_at: float) -> float:
    """Until the beginning of the first upload that is stored."""
    begun_at = freed_at
    while upload(server, CONTENT, "after.jpg").status_code != 200:
        begun_at = time.monotonic()
        assert begun_at - freed_at < RECOVERY_SECONDS
    wait_for(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200, "ready")
    return round(begun_at - freed_at, 1)


def test_upload_below_the_reserve_is_refused_before_its_body_is_read(
    tmp_path: Path, database_url: str
) -> None:
    server = ServerProcess(tmp_path, database_url, LOUPE_DISK_RESERVE_BYTES=str(10**18))
    with running(server):
        refused = upload(server, CONTENT)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert staged_files(tmp_path) == []
