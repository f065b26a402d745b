"""SIGKILL at each write, fsync, rename and commit of one upload: all of it or nothing."""

from pathlib import Path

import pytest

from tests import pictures
from tests.strace import attached
from tests.torture.harness import (
    IS_FULL,
    ServerProcess,
    files_named,
    has_content,
    new_seed,
    report,
    running,
    size,
    staged_files,
    wait_for,
)
from tests.torture.uploads import BLOCKS, BlockwiseUpload, next_staged_paths, try_upload

pytestmark = [
    pytest.mark.strace,
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
]

# `fsync` makes the blob and its directory durable, `pwrite64` fills the database's log,
# `fdatasync` is the commit.
CALLS = ("fsync", "rename", "pwrite64", "fdatasync")
MANY = 200


@pytest.mark.parametrize("syscall", CALLS)
def test_upload_that_is_killed_at_any_call_is_whole_or_absent(
    tmp_path: Path, database_url: str, syscall: str
) -> None:
    content = pictures.jpeg()
    killed = survived = 0
    with running(ServerProcess(tmp_path, database_url)) as server:
        for number in _numbers(syscall):
            name = f"{number}.jpg"
            with attached(server, syscall, f"signal=KILL:when={number}"):
                status = try_upload(server, content, name)
                _wait_for_end(server, status)
            _check_all_or_nothing(server, status, content, name)
            if status is not None:
                assert status == 200
                survived += 1
                break
            killed += 1
    assert killed > 0
    assert survived == (1 if IS_FULL else 0)
    report(f"crash points of {syscall}", killed=killed, survived=survived)


def _numbers(syscall: str) -> range:
    """Every call until the upload survives; in the small size one of the first."""
    if IS_FULL:
        return range(1, MANY)
    number = new_seed("crash points").randint(1, {"pwrite64": 10, "fsync": 2}.get(syscall, 1))
    return range(number, number + 1)


@pytest.mark.parametrize("blocks_before", range(size(2, BLOCKS)))
def test_upload_that_is_killed_at_any_block_is_absent_and_leaves_nothing(
    tmp_path: Path, database_url: str, blocks_before: int
) -> None:
    with running(ServerProcess(tmp_path, database_url)) as server:
        paths = next_staged_paths(server)
        with BlockwiseUpload(server, "blocks.jpg") as upload:
            upload.send_blocks(blocks_before)
            with attached(server, "write", "signal=KILL", paths):
                status = upload.finish()
                _wait_for_end(server, status)
        assert status is None
        _check_all_or_nothing(server, status, upload.content, "blocks.jpg")
    report("crash points of write", blocks_before=blocks_before)


def _wait_for_end(server: ServerProcess, status: int | None) -> None:
    """Of a server that did not answer."""
    process = server.process
    assert process is not None
    if status is None:
        wait_for(lambda: process.poll() is not None, "the killed server to end")


def _check_all_or_nothing(
    server: ServerProcess, status: int | None, content: bytes, name: str
) -> None:
    """Starts it again if it is dead."""
    assert server.process is not None
    if server.process.poll() is not None:
        server.start()
    assert staged_files(server.directory) == []
    files = files_named(server, name)
    assert len(files) <= 1
    assert files or status is None
    assert all(has_content(file, content) for file in files)
    assert try_upload(server, content, name) == 200
    [file] = files_named(server, name)
    assert has_content(file, content)
    assert staged_files(server.directory) == []
