"""EIO and ENOSPC at each call that stores: no acknowledgement of what is not safe."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import pictures
from tests.strace import Trace, attached
from tests.torture.harness import (
    ServerProcess,
    files_named,
    has_content,
    report,
    running,
    size,
    staged_files,
    wait_for,
)
from tests.torture.uploads import BLOCKS, BlockwiseUpload, next_staged_paths, try_upload, upload

pytestmark = [
    pytest.mark.strace,
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
]

ERRORS = ("EIO", "ENOSPC")
CONTENT = pictures.jpeg()
MANY = 200
GROUP = 5


@pytest.fixture
def server(tmp_path: Path, database_url: str) -> Iterator[ServerProcess]:
    with running(ServerProcess(tmp_path, database_url, LOUPE_DISK_RESERVE_BYTES="0")) as server:
        yield server


def is_ready(server: ServerProcess) -> bool:
    return httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200


def blobs(server: ServerProcess) -> list[Path]:
    return [path for path in server.directory.rglob("blobs/*/*") if path.is_file()]


@pytest.mark.parametrize("syscall", ["fsync", "rename", "pwrite64", "fdatasync"])
def test_upload_is_only_acknowledged_when_every_call_that_stores_it_succeeded(
    server: ServerProcess, syscall: str
) -> None:
    counts = dict.fromkeys((f"refused_by_{error}" for error in ERRORS), 0)
    for error in ERRORS:
        for number in range(1, size(2, MANY)):
            name = f"{error}-{number}.jpg"
            with attached(server, syscall, f"error={error}:when={number}") as trace:
                status = try_upload(server, CONTENT, name)
            _check_answer(server, status, name, trace)
            counts[f"refused_by_{error}"] += status == 503
            # A failed fsync tells nothing of what is on the disk: a restart looks again.
            has_sync_failed = syscall == "fsync" and error == "EIO" and status == 503
            assert is_ready(server) is not has_sync_failed
            if has_sync_failed:
                server.stop()
                server.start()
            if not trace.injected():
                assert status == 200
                break
    assert min(counts.values()) > 0
    report(f"failing {syscall}", **counts)


def _check_answer(server: ServerProcess, status: int | None, name: str, trace: Trace) -> None:
    assert status in (200, 503), (status, server.log_tail())
    files = files_named(server, name)
    assert staged_files(server.directory) == []
    if status == 503:
        assert files == []
        return
    [file] = files
    assert has_content(file, CONTENT)
    # What may fail is copying from the log, which is safe, into the database, and syncing the name
    # of the log, which was done at the start.
    may_fail = ("loupe.db>", f"<{server.directory}>")
    assert all(any(path in call for path in may_fail) for call in trace.injected())


@pytest.mark.parametrize("error", ERRORS)
def test_upload_whose_file_cannot_be_written_is_refused_at_any_block(
    server: ServerProcess, error: str
) -> None:
    blocks = range(size(2, BLOCKS))
    for blocks_before in blocks:
        paths = next_staged_paths(server)
        with BlockwiseUpload(server, "blocks.jpg") as blockwise:
            blockwise.send_blocks(blocks_before)
            with attached(server, "write", f"error={error}", paths) as trace:
                status = blockwise.finish()
            assert len(trace.injected()) == 1, trace.calls()
        _check_answer(server, status, "blocks.jpg", trace)
        assert status == 503
        assert is_ready(server)
    assert try_upload(server, blockwise.content, "blocks.jpg") == 200
    report(f"{error} at write", refused=len(blocks))


@pytest.mark.parametrize("number", [1, 2], ids=["file", "directory"])
def test_failed_fsync_is_never_retried(server: ServerProcess, number: int) -> None:
    """Of the file that was to be stored, and of the directory that was to name it."""
    earlier = upload(server, CONTENT, "earlier.jpg").json()
    with attached(server, "fsync", f"error=EIO:when={number}") as trace:
        statuses = [try_upload(server, CONTENT, f"{each}.jpg") for each in range(3)]
        assert not is_ready(server)
    assert statuses == [503] * 3
    # One failed call, after those that succeeded before it; and no other.
    assert [("(INJECTED)" in call) for call in trace.calls()] == [False] * (number - 1) + [True]
    assert has_content(earlier, CONTENT)
    assert [try_upload(server, CONTENT, "later.jpg"), is_ready(server)] == [503, False]
    server.stop()
    server.start()
    assert try_upload(server, CONTENT, "later.jpg") == 200
    assert not files_named(server, "0.jpg")
    report("failed fsync", refused=len(statuses), synced_again=0)


def test_error_that_ends_a_group_of_writes_is_an_error_for_each_of_them(
    server: ServerProcess, tmp_path: Path
) -> None:
    names = [f"{number}.jpg" for number in range(GROUP)]
    with attached(server, "fdatasync", "error=EIO") as trace, ThreadPoolExecutor(GROUP) as threads:
        with _holding_writes_up(tmp_path / "loupe.db"):
            uploads = [threads.submit(try_upload, server, CONTENT, name) for name in names]
            wait_for(lambda: len(blobs(server)) == GROUP, "all but the rows to be stored")
        statuses = [each.result() for each in uploads]
    assert statuses == [503] * GROUP
    largest = max(each["writes"] for each in server.logged("database write failed"))
    assert largest > 1
    assert not any(files_named(server, name) for name in names)
    assert is_ready(server)
    # Whether they were committed is not known to who wrote them: the sweep decides.
    assert len(blobs(server)) == GROUP
    assert try_upload(server, CONTENT, names[0]) == 200
    report("failed commit", refused=GROUP, in_one_group=largest, failed=len(trace.injected()))


@contextmanager
def _holding_writes_up(database: Path) -> Iterator[None]:
    """What is to be written meanwhile waits, and is then written in groups."""
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()
