"""Staging directories: who may remove what, and that nobody removes what is being written."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.storage.disk import StagingDirectory

ROOT = Path(__file__).parents[2]
HOUR = timedelta(hours=1)
STAGE_AND_WAIT = """
import pathlib, sys, time
from app.storage.disk import StagingDirectory
staging = StagingDirectory(pathlib.Path(sys.argv[1]))
staging.open()
(staging.path / "half").write_bytes(b"half a fi")
print(staging.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "staging"


@contextmanager
def opened(shared: Path) -> Iterator[StagingDirectory]:
    staging = StagingDirectory(shared)
    staging.open()
    yield staging
    staging.close()


@contextmanager
def writer(shared: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Another process, and the file that it stages."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE_AND_WAIT, str(shared)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process, Path(process.stdout.readline().strip()) / "half"
        finally:
            process.kill()
            process.wait(30)


def make_old(path: Path) -> None:
    two_hours_ago = time.time() - 7200
    os.utime(path, (two_hours_ago, two_hours_ago))


def remove_older_than_an_hour(staging: StagingDirectory) -> None:
    staging.remove_dead()
    staging.remove_older(datetime.now(UTC) - HOUR)


def test_processes_stage_apart_in_one_file_system_and_leave_nothing(shared: Path) -> None:
    with opened(shared) as one, opened(shared) as other:
        assert one.path != other.path
        assert one.path.parent == other.path.parent == shared
        assert one.path.stat().st_dev == shared.parent.stat().st_dev
    assert list(shared.iterdir()) == []


def test_what_a_killed_process_staged_goes_when_another_starts(shared: Path) -> None:
    with writer(shared) as (process, staged):
        assert staged.read_bytes() == b"half a fi"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert staged.exists()
        with opened(shared) as staging:
            assert set(shared.iterdir()) == {staging.path, Path(f"{staging.path}.lock")}


def test_what_a_killed_process_staged_goes_with_the_next_sweep(shared: Path) -> None:
    with opened(shared) as staging, writer(shared) as (process, staged):
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        remove_older_than_an_hour(staging)
        assert not staged.parent.exists()


def test_what_a_living_process_stages_stays_until_it_is_old(shared: Path) -> None:
    with writer(shared) as (_, staged), opened(shared) as staging:
        remove_older_than_an_hour(staging)
        assert staged.exists()
        make_old(staged)
        make_old(staged.parent)
        make_old(Path(f"{staged.parent}.lock"))
        remove_older_than_an_hour(staging)
        assert not staged.exists()
        assert staged.parent.exists()
        assert Path(f"{staged.parent}.lock").exists()


def test_a_frozen_process_is_a_living_one(shared: Path) -> None:
    with writer(shared) as (process, staged):
        process.send_signal(signal.SIGSTOP)
        with opened(shared):
            assert staged.exists()
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("left", ["directory", "lock"])
def test_half_of_a_dead_directory_is_removed_too(shared: Path, left: str) -> None:
    """As a death while making or removing one leaves it."""
    shared.mkdir()
    if left == "directory":
        (shared / "0123").mkdir()
    else:
        (shared / "0123.lock").touch()
    with opened(shared):
        assert [path.name for path in shared.iterdir() if path.name.startswith("0123")] == []


def test_a_lock_that_is_taken_for_abandoned_while_it_is_made_is_made_anew(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process looks exactly between the making of the file and its locking."""
    flock = fcntl.flock
    looked: list[int] = []

    def look_first(descriptor: int, operation: int) -> None:
        if not looked:
            looked.append(descriptor)
            StagingDirectory(shared).remove_dead()
            assert list(shared.iterdir()) == []
        flock(descriptor, operation)

    shared.mkdir()
    monkeypatch.setattr(fcntl, "flock", look_first)
    with opened(shared) as staging:
        assert looked
        StagingDirectory(shared).remove_dead()
        assert set(shared.iterdir()) == {staging.path, Path(f"{staging.path}.lock")}


def test_many_that_start_and_sweep_at_once_keep_what_is_theirs(shared: Path) -> None:
    def open_and_sweep(_: int) -> bool:
        with opened(shared) as staging:
            staged = staging.path / "file"
            staged.write_bytes(b"x")
            staging.remove_dead()
            return staged.exists()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(open_and_sweep, range(200)))
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_where_nothing_can_be_locked_only_age_tells(
    shared: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with opened(shared) as staging:
        assert staging.path == shared
        old, young = shared / "old", shared / "young"
        for path in (old, young):
            path.touch()
        make_old(old)
        with opened(shared):
            assert old.exists()
        remove_older_than_an_hour(staging)
        assert list(shared.iterdir()) == [young]
