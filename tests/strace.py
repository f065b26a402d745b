"""strace: what a server calls, and calls that fail or kill it."""

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.torture.harness import ServerProcess, wait_for


@cache
def is_available() -> bool:
    """Whether it is installed and may trace a process that it did not start."""
    if shutil.which("strace") is None:
        return False
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        command = ["strace", "-q", "-o", "/dev/null", "-p", str(sleeper.pid)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
            try:
                return _attaches(tracer, sleeper.pid)
            finally:
                sleeper.kill()


def _attaches(tracer: "subprocess.Popen[bytes]", pid: int) -> bool:
    wait_for(lambda: tracer.poll() is not None or _is_traced(pid), "strace to attach or not", 20)
    return _is_traced(pid)


class Trace:
    """What was seen so far, a line for each call that was asked for."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def calls(self) -> list[str]:
        """With each descriptor's path behind it, as in `7 fsync(5</data/file>) = 0`."""
        if not self._log.exists():
            return []
        return [line for line in self._log.read_text().splitlines() if "(" in line]

    def injected(self) -> list[str]:
        return [call for call in self.calls() if "(INJECTED)" in call]


@contextmanager
def attached(
    server: ServerProcess, syscalls: str, injection: str = "", paths: Iterable[Path] = ()
) -> Iterator[Trace]:
    """While it is entered, these calls of all the server's threads are seen and tampered with.

    injection: as strace takes it, such as `error=EIO:when=2`. It counts each thread's calls apart,
    and only those on one of `paths` if there are any.
    """
    assert server.process is not None
    pid = server.process.pid
    log = server.directory / "strace.log"
    log.unlink(missing_ok=True)
    command = ["strace", "-f", "-q", "-y", "-o", str(log), "-e", f"trace={syscalls}"]
    if injection:
        command += ["-e", f"inject={syscalls}:{injection}"]
    for path in paths:
        command += ["-P", str(path)]
    with subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.DEVNULL) as tracer:
        try:
            wait_for(lambda: tracer.poll() is not None or _is_traced(pid), "strace to attach")
            yield Trace(log)
        finally:
            _detach(tracer)


def _is_traced(pid: int) -> bool:
    """Whether every thread is; one that is not yet could pass unseen."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _detach(tracer: "subprocess.Popen[bytes]") -> None:
    tracer.terminate()
    try:
        tracer.wait(20)
    except subprocess.TimeoutExpired:
        tracer.kill()
