"""Loupe as the demo runs it: its own processes, on a free loopback port, in a folder of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from demo.narration import DemoFailed, say

PROJECT = Path(__file__).resolve().parent.parent
PRIVATE_KEY = "private_loupe_development"
PUBLIC_KEY = "public_loupe_development"
MIGRATE_SECONDS = 60.0
READY_SECONDS = 60.0
STOP_SECONDS = 30.0
LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class Loupe:
    """A running server. client: speaks to it with the private key."""

    url: str
    log: Path
    client: httpx.Client
    process: "subprocess.Popen[bytes]"

    def check_alive(self) -> None:
        """Raises DemoFailed."""
        status = self.process.poll()
        if status is not None:
            raise DemoFailed(f"The server ended with status {status}.\n{log_end(self.log)}")


def environment(data_dir: Path, port: int, settings: dict[str, str]) -> dict[str, str]:
    """Without the settings of whoever runs the demo."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOUPE_")}
    return {
        **kept,
        "LOUPE_DATA_DIR": str(data_dir),
        "LOUPE_PORT": str(port),
        **settings,
    }


def migrate(env: dict[str, str]) -> None:
    """Raises DemoFailed."""
    command = [sys.executable, "-m", "app", "migrate"]
    try:
        done = subprocess.run(
            command, env=env, cwd=PROJECT, capture_output=True, text=True, timeout=MIGRATE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise DemoFailed(f"The schema was not ready within {MIGRATE_SECONDS:g} s.") from None
    if done.returncode != 0:
        raise DemoFailed(f"The schema could not be made.\n{done.stderr.strip()}")


@contextmanager
def running(env: dict[str, str], log: Path) -> Iterator[Loupe]:
    """Starts the server and waits until it is ready; ends it afterwards. Raises DemoFailed."""
    url = f"http://127.0.0.1:{env['LOUPE_PORT']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            env=env,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=url, auth=(PRIVATE_KEY, ""), timeout=30, trust_env=False) as c:
            loupe = Loupe(url, log, c, process)
            _wait_until_ready(loupe)
            yield loupe
    finally:
        _end(process)


def _wait_until_ready(loupe: Loupe) -> None:
    started = told = time.monotonic()
    while not _is_ready(loupe):
        loupe.check_alive()
        now = time.monotonic()
        if now - started > READY_SECONDS:
            raise DemoFailed(
                f"The server was not ready within {READY_SECONDS:g} s.\n{log_end(loupe.log)}"
            )
        if now - told >= 2:
            told = now
            say(f"... {now - started:.0f} s")
        time.sleep(0.1)


def _is_ready(loupe: Loupe) -> bool:
    try:
        return loupe.client.get("/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def log_end(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"The end of its log, {log}:", *(f"  {line}" for line in lines)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
