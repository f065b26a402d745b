"""A server in a process of its own, that can be killed, frozen and started again; and its load.

`LOUPE_TORTURE=full`, as `make torture` sets it, runs the full sizes; any other value small ones.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.settings import DEVELOPMENT_PRIVATE_KEY

ROOT = Path(__file__).resolve().parents[2]
IS_FULL = os.environ.get("LOUPE_TORTURE") == "full"
AUTH = (DEVELOPMENT_PRIVATE_KEY, "")


def size(small: int, full: int) -> int:
    """How much of something this run does."""
    return full if IS_FULL else small


def new_seed(name: str) -> random.Random:
    """A generator whose seed is printed; LOUPE_TORTURE_SEED repeats a run."""
    seed = int(os.environ.get("LOUPE_TORTURE_SEED", random.SystemRandom().randrange(2**32)))
    print(f"{name}: seed {seed}")  # noqa: T201
    return random.Random(seed)


def report(name: str, **counts: Any) -> None:
    print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))  # noqa: T201


def lasting_port() -> int:
    """A free loopback port that no outgoing connection is given while its server is down."""
    lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        port = random.SystemRandom().randrange(10_000, lowest_ephemeral)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class ServerProcess:
    """`python -m app serve` on a fixed loopback port, so that it comes back where it was.

    It has no variable of the caller's environment but PATH.
    """

    command = "serve"

    def __init__(self, directory: Path, database_url: str, **settings: str) -> None:
        self.directory = directory
        self.log = directory / "server.log"
        self.port = lasting_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "AWS_EC2_METADATA_DISABLED": "true",
            "LOUPE_PORT": str(self.port),
            "LOUPE_DATA_DIR": str(directory),
            "LOUPE_DATABASE_URL": database_url,
            "LOUPE_GOOGLE_AUTO_TAGGING": "local",
            "LOUPE_AWS_AUTO_TAGGING": "local",
            "LOUPE_WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8",
            "LOUPE_WEBHOOK_SCHEDULE": "0,0.2,0.5",
            # Attaching to a process may take long on a busy machine, in the middle of an upload.
            "LOUPE_UPLOAD_IDLE_SECONDS": "600",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *prefix: str, wait: bool = True) -> None:
        """prefix: a command that runs the server, as strace does."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "app", self.command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self, timeout_seconds: float = 180) -> None:
        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the server ended:\n{self.log_tail()}"
            try:
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(is_ready, "the server to be ready", timeout_seconds)

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self.log.read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a power cut would: no chance to say anything."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(30)

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        if self.process is None or self.process.poll() is not None:
            return -1
        self.signal(signal.SIGTERM)
        return self.process.wait(60)

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


class WorkerProcess(ServerProcess):
    """`python -m app worker`, which nobody can ask whether it is ready but its log."""

    command = "worker"

    def start(self, *prefix: str, wait: bool = True) -> None:
        self._log_before = self.log.stat().st_size if self.log.exists() else 0
        super().start(*prefix, wait=wait)

    def wait_until_ready(self, timeout_seconds: float = 60) -> None:
        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the worker ended:\n{self.log_tail()}"
            return b"worker ready" in self.log.read_bytes()[self._log_before :]

        wait_for(is_ready, "the worker to be ready", timeout_seconds)


@contextmanager
def running(server: ServerProcess) -> Iterator[ServerProcess]:
    server.start()
    try:
        yield server
    finally:
        server.end()


def wait_for(
    condition: Callable[[], bool], what: str, timeout_seconds: float = 60, pause: float = 0.05
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s for {what}"
        time.sleep(pause)


@dataclass(frozen=True)
class Acknowledged:
    """An upload that the server answered with 200."""

    file_id: str
    sha256: str
    statuses: dict[str, str]
    url: str


@dataclass
class Load:
    """Uploads different pictures from several threads until it is told to stop.

    base: a picture whose end may be followed by anything, so that each upload's bytes differ.
    every: of so many uploads one has `fields`, such as extensions, which take longer than storing.
    """

    url: str
    base: bytes
    fields: dict[str, str]
    every: int = 1
    threads: int = 4
    acknowledged: list[Acknowledged] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    cut: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._number = 0
        self._workers: list[threading.Thread] = []

    def __enter__(self) -> "Load":
        self._workers = [threading.Thread(target=self._work) for _ in range(self.threads)]
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(90)
            assert not worker.is_alive()

    def _work(self) -> None:
        with httpx.Client(auth=AUTH, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    self._upload(client)
                except httpx.TransportError:
                    with self._lock:
                        self.cut += 1
                    self._stop.wait(0.05)

    def _upload(self, client: httpx.Client) -> None:
        with self._lock:
            self._number += 1
            number = self._number
        content = self.base + f"-{number}".encode()
        answer = client.post(
            f"{self.url}/api/v1/files/upload",
            files={"file": ("a.jpg", content)},
            data={
                "fileName": f"{number}.jpg",
                "folder": f"/{number % 7}",
                **({} if number % self.every else self.fields),
            },
        )
        with self._lock:
            if answer.status_code != 200:
                self.refused.append((answer.status_code, answer.text[:200]))
                return
            body = answer.json()
            self.acknowledged.append(
                Acknowledged(
                    body["fileId"],
                    hashlib.sha256(content).hexdigest(),
                    body.get("extensionStatus", {}),
                    body["url"],
                )
            )


def both_extensions(min_confidence: int = 0, max_tags: int = 30) -> str:
    return json.dumps(
        [
            {"name": name, "minConfidence": min_confidence, "maxTags": max_tags}
            for name in ("google-auto-tagging", "aws-auto-tagging")
        ]
    )


def files_named(server: ServerProcess, name: str) -> list[dict[str, Any]]:
    listed = httpx.get(f"{server.url}/v1/files", params={"name": name}, auth=AUTH, timeout=60)
    files: list[dict[str, Any]] = listed.raise_for_status().json()
    return files


def has_content(file: Mapping[str, Any], content: bytes) -> bool:
    """file: as the API shows it."""
    return httpx.get(file["url"], timeout=60).raise_for_status().content == content


def staged_files(directory: Path) -> list[Path]:
    """What uploads have left behind below a data directory."""
    return [path for path in directory.rglob("staging/**/*") if _is_staged_file(path)]


def _is_staged_file(path: Path) -> bool:
    return path.is_file() and path.suffix != ".lock"
