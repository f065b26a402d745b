"""Servers in processes of their own, on loopback, and what the kernel says of them."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

PROJECT = Path(__file__).resolve().parent.parent
READY_SECONDS = 120.0
STOP_SECONDS = 20.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# Thread -> seconds of user and of system time.
ThreadSeconds = dict[int, tuple[float, float]]


class BenchFailed(Exception):
    """One sentence: what could not be measured, and why."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    log: Path,
    ready_url: str,
    environment: Mapping[str, str] | None = None,
    directory: Path = PROJECT,
) -> Iterator[int]:
    """Its process id, once `ready_url` answers. Raises BenchFailed.

    environment: on top of what every server needs, and of nothing else.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], "HOME": str(log.parent), **(environment or {})},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, ready_url, log)
        yield process.pid
    finally:
        _end(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    def is_ready() -> bool:
        if process.poll() is not None:
            raise BenchFailed(f"{process.args!r} ended:\n{log.read_text(errors='replace')[-1000:]}")
        try:
            return httpx.get(url, timeout=5, trust_env=False).status_code < 500
        except httpx.TransportError:
            return False

    wait_for(is_ready, f"{url} to answer", READY_SECONDS)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it has started: they are in one session of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Raises BenchFailed."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed(f"Waited {timeout_seconds:g} s for {what}.")
        time.sleep(0.05)


# --- What the kernel says. Source: proc(5) -------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [child for t in threads for child in (t / "children").read_text().split()]
    return [pid, *(each for child in children for each in family(int(child)))]


def resident_bytes(pid: int) -> int:
    return _memory(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """The largest resident size since the start, or since `forget_peak`."""
    return _memory(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _memory(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise BenchFailed(f"/proc/{pid}/status says nothing of {name}.")


def cpu_seconds(pid: int) -> float:
    """User and system time of one process."""
    return sum(_user_and_system(Path(f"/proc/{pid}/stat")))


def thread_seconds(pid: int) -> ThreadSeconds:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {int(thread.name): _user_and_system(thread / "stat") for thread in threads}


def _user_and_system(stat: Path) -> tuple[float, float]:
    after_name = stat.read_text().rpartition(")")[2].split()
    return int(after_name[11]) / TICKS_PER_SECOND, int(after_name[12]) / TICKS_PER_SECOND
