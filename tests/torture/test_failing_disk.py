"""EIO and ENOSPC at each call that stores: no acknowledgement of what is not safe."""

import shutil
from pathlib import Path

import httpx
import pytest

from app import schema
from tests import pictures
from tests.torture.harness import AUTH, IS_FULL, ServerProcess, report
from tests.torture.test_crash_points import attached, stored_files, try_upload

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

CALLS = ("fsync", "fdatasync", "pwrite64", "rename")
ERRORS = ("EIO", "ENOSPC")
POINTS = range(1, 9 if IS_FULL else 3)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("syscall", CALLS)
def test_upload_is_only_acknowledged_when_every_call_that_stores_it_succeeded(
    tmp_path: Path, syscall: str, error: str
) -> None:
    refused = acknowledged = 0
    for number in POINTS:
        directory = tmp_path / str(number)
        directory.mkdir()
        url = f"sqlite:///{directory / 'loupe.db'}"
        schema.upgrade(url)
        server = ServerProcess(directory, url)
        server.start()
        try:
            with attached(server, f"inject={syscall}:error={error}:when={number}", syscall):
                status = try_upload(server, pictures.jpeg())
            assert status in (200, 503), (status, server.log_tail())
            if status == 503:
                refused += 1
                assert stored_files(server) == []
            else:
                acknowledged += 1
                [file] = stored_files(server)
                assert httpx.get(file["url"], timeout=30).content == pictures.jpeg()
            is_healthy = httpx.get(f"{server.url}/readyz", timeout=30).status_code == 200
            # After a failed fsync nobody knows what is on the disk: a restart looks again.
            assert is_healthy or (status == 503 and syscall == "fsync")
        finally:
            server.end()
    assert refused > 0
    report(f"{error} at {syscall}", refused=refused, acknowledged=acknowledged)


def test_failing_commit_is_an_error_for_everyone_in_its_group(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'loupe.db'}"
    schema.upgrade(url)
    server = ServerProcess(tmp_path, url)
    server.start()
    try:
        with attached(server, "inject=fdatasync:error=EIO", "fdatasync"):
            statuses = [try_upload(server, pictures.jpeg()) for _ in range(3)]
        assert statuses == [503, 503, 503]
        assert stored_files(server) == []
        answer = httpx.post(
            f"{server.url}/api/v1/files/upload",
            files={"file": ("a.jpg", pictures.jpeg())},
            data={"fileName": "b.jpg"},
            auth=AUTH,
            timeout=30,
        )
        assert answer.status_code == 200
    finally:
        server.end()
