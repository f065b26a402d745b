"""Image bombs and malformed files: each is refused or fails, and nothing falls over."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from app import schema
from tests.torture.bombs import BOMBS
from tests.torture.harness import (
    AUTH,
    IS_FULL,
    ServerProcess,
    both_extensions,
    report,
    running,
    wait_for,
)

AT_ONCE = 4
MAX_MAIN_GROWTH_MB = 250
# What a child may allocate, and the code and files that it maps.
MAX_CHILD_MB = 2048 + 256
TOO_MANY_PIXELS = {
    "png-50000x50000",
    "png-169-megapixels",
    "png-0x0",
    "jpeg-65500x65500",
}


# Seconds of work for a child: not in the small size.
SLOW = {"png-20-texts-of-40-mib"}


class Memory:
    """The most that a process and its children have held in memory, in MB."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._watching = threading.Thread(target=self._watch)
        self.at_start = resident_mb(pid, "VmRSS")
        self.children = 0.0

    @property
    def growth(self) -> float:
        return resident_mb(self._pid, "VmHWM") - self.at_start

    def __enter__(self) -> "Memory":
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watching.join()

    def _watch(self) -> None:
        """Children are replaced after a crash, so their peaks are read while they live."""
        while not self._stop.wait(0.05):
            for child in children_of(self._pid):
                self.children = max(self.children, resident_mb(child, "VmHWM"))


def resident_mb(pid: int, field: str) -> float:
    """VmRSS: now. VmHWM: the most so far. 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    with_children = [task.read_text().split() for task in tasks if task.exists()]
    return [int(child) for children in with_children for child in children]


class Fate:
    """What became of one bomb. Its picture is asked for in every way that decodes it."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        self.name = name
        self._server = server
        self._client = httpx.Client(base_url=server.url, auth=AUTH, timeout=120)
        started = time.monotonic()
        with self._client:
            self.outcome = self._meet(BOMBS[name]())
        self.seconds = time.monotonic() - started

    def _meet(self, content: bytes) -> str:
        answer = self._client.post(
            "/api/v1/files/upload",
            files={"file": ("bomb.jpg", content)},
            data={"fileName": f"{self.name}.jpg", "extensions": both_extensions()},
        )
        self._must_live()
        if answer.status_code == 400:
            return "refused"
        assert answer.status_code == 200, (self.name, answer.status_code, answer.text)
        uploaded = answer.json()
        statuses = self._final_statuses(uploaded["fileId"])
        thumbnail = self._client.get(
            uploaded["url"].replace("/demo/", "/demo/tr:n-ik_ml_thumbnail/")
        )
        assert thumbnail.status_code in (200, 400), (self.name, thumbnail.text)
        delivered = self._client.get(uploaded["url"])
        assert delivered.status_code == 200
        assert delivered.content == content
        assert delivered.headers["x-content-type-options"] == "nosniff"
        assert not delivered.headers["content-type"].startswith("text/html")
        self._must_live()
        is_read = statuses == {"success"}
        assert is_read == (thumbnail.status_code == 200), (self.name, statuses, thumbnail.text)
        return "read" if is_read else "unreadable" if "width" in uploaded else "no image"

    def _final_statuses(self, file_id: str) -> set[str]:
        found: set[str] = set()

        def are_final() -> bool:
            details = self._client.get(f"/v1/files/{file_id}/details").json()
            found.clear()
            found.update(details["extensionStatus"].values())
            return "pending" not in found

        wait_for(are_final, f"the extensions of {self.name}", 180)
        return found

    def _must_live(self) -> None:
        process = self._server.process
        assert process is not None
        assert process.poll() is None, f"{self.name} killed the server:\n{self._server.log_tail()}"
        assert self._client.get("/readyz").status_code == 200, self.name


@contextmanager
def bombed(directory: Path) -> Iterator[ServerProcess]:
    url = f"sqlite:///{directory / 'loupe.db'}"
    schema.upgrade(url)
    with running(ServerProcess(directory, url, LOUPE_READY_MAX_DUE_AGE_SECONDS="600")) as server:
        yield server


def test_no_bomb_crashes_the_server_or_fills_its_memory(tmp_path: Path) -> None:
    names = [name for name in BOMBS if IS_FULL or name not in SLOW]
    with bombed(tmp_path) as server:
        assert server.process is not None
        pid = server.process.pid
        with Memory(pid) as memory, ThreadPoolExecutor(AT_ONCE) as pool:
            fates = list(pool.map(lambda name: Fate(server, name), names))
        assert server.process.pid == pid
        outcomes = Counter(fate.outcome for fate in fates)
        slowest = sorted(fates, key=lambda fate: -fate.seconds)[:8]
        report(
            "bombs",
            files=len(fates),
            **{name.replace(" ", "_"): number for name, number in sorted(outcomes.items())},
            crashes=0,
            main_growth_mb=round(memory.growth),
            child_peak_mb=round(memory.children),
            slowest="; ".join(f"{f.name} {f.seconds:.1f} s" for f in slowest),
        )
        assert len(fates) >= 40
        assert {fate.name for fate in fates if fate.outcome == "refused"} >= TOO_MANY_PIXELS
        assert memory.growth < MAX_MAIN_GROWTH_MB
        assert memory.children < MAX_CHILD_MB
        assert "unexpected error" not in server.log.read_text()
        assert server.stop() == 0
