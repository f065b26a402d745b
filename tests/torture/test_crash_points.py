"""SIGKILL at each write, fsync, rename and commit of one upload: all of it or nothing."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app import schema
from tests import pictures
from tests.torture.harness import AUTH, IS_FULL, ServerProcess, report, staged_files, wait_for

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

# What an upload does: `write` fills the staged file and the sockets, `pwrite64` the database's
# log, `fsync` makes the blob and its directory durable, `fdatasync` the commit.
SYSCALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename")
POINTS = range(1, 13 if IS_FULL else 2)


@contextmanager
def killing_at(server: ServerProcess, syscall: str, number: int) -> Iterator[None]:
    """While it is entered, the server is killed as a thread of it begins its `number`th call."""
    with attached(server, f"inject={syscall}:signal=KILL:when={number}", syscall):
        yield


@contextmanager
def attached(server: ServerProcess, injection: str, syscall: str) -> Iterator[None]:
    assert server.process is not None
    log, pid = str(server.directory / "strace.log"), str(server.process.pid)
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-o", log, "-e", f"trace={syscall}", "-e", injection, "-p", pid],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _is_traced(server.process.pid), "strace to attach", 20)  # type: ignore[union-attr]
        yield
    finally:
        tracer.terminate()
        try:
            tracer.wait(5)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait(5)


def _is_traced(pid: int) -> bool:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)
    except FileNotFoundError:
        return False


def try_upload(server: ServerProcess, content: bytes) -> int | None:
    """The status; None if the server was gone before it answered."""
    try:
        answer = httpx.post(
            f"{server.url}/api/v1/files/upload",
            files={"file": ("a.jpg", content)},
            data={"fileName": "a.jpg", "folder": "/new/folder"},
            auth=AUTH,
            timeout=30,
        )
    except httpx.TransportError:
        return None
    return answer.status_code


def stored_files(server: ServerProcess) -> list[dict[str, str]]:
    listed = httpx.get(f"{server.url}/v1/files", auth=AUTH, timeout=30)
    assert listed.status_code == 200
    files: list[dict[str, str]] = listed.json()
    return files


@pytest.mark.parametrize("syscall", SYSCALLS)
def test_upload_that_is_killed_at_any_point_is_whole_or_absent(
    tmp_path: Path, syscall: str
) -> None:
    content = pictures.jpeg()
    survived = killed = 0
    for number in POINTS:
        directory = tmp_path / str(number)
        directory.mkdir()
        url = f"sqlite:///{directory / 'loupe.db'}"
        schema.upgrade(url)
        server = ServerProcess(directory, url)
        server.start()
        try:
            with killing_at(server, syscall, number):
                status = try_upload(server, content)
            was_killed = server.process is not None and server.process.poll() is not None
            if was_killed:
                killed += 1
                server.start()
            _check_all_or_nothing(server, status, content)
            survived += not was_killed
        finally:
            server.end()
        assert staged_files(directory) == []
        if not was_killed:
            break
    assert killed > 0
    report(f"crash points of {syscall}", killed=killed, survived=survived)


def _check_all_or_nothing(server: ServerProcess, status: int | None, content: bytes) -> None:
    files = stored_files(server)
    assert len(files) <= 1
    if status == 200:
        assert len(files) == 1
    for file in files:
        body = httpx.get(file["url"], timeout=30).content
        assert hashlib.sha256(body).digest() == hashlib.sha256(content).digest()
    assert try_upload(server, content) == 200
