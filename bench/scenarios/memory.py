"""Resident memory: what an upload and four renderings add, and what an idle process takes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from app.settings import DEVELOPMENT_PRIVATE_KEY
from bench import process
from bench.emulators import Emulators, emulating
from bench.findings import Bench, Finding, Goal, absolute, median_and_spread
from bench.loupe import Loupe, fill, migrate, serving, sqlite_url
from bench.process import PROJECT, BenchFailed
from bench.scenarios.thumbnails import thumbnail_path

MB = 1_000_000
RENDERINGS = 4


def run(bench: Bench) -> Iterator[Finding]:
    migrate(bench.directory)
    fill(sqlite_url(bench.directory), RENDERINGS, bench.pictures["3m"], bench.directory)
    uploads = [_growth(bench, _one_upload) for _ in range(bench.rounds)]
    yield absolute(
        "memory", "growth for one upload of 3 MB", Goal(2, 1, lower_is_better=True), uploads, "MB"
    )
    renderings = [_growth(bench, _four_renderings) for _ in range(bench.rounds)]
    yield absolute(
        "memory",
        "growth for four thumbnails of 12 MP at once, children counted",
        Goal(120, 60, lower_is_better=True),
        renderings,
        "MB",
    )
    yield _idle(bench)


def _growth(bench: Bench, work: Callable[[Bench, httpx.Client], None]) -> float:
    """Megabytes that the peaks of all of a new server's processes lie above where they began."""
    with serving(bench.directory) as loupe, _client(loupe) as client:
        _upload(client, bench.pictures["100k"])  # what the first upload imports stays
        before = {pid: process.resident_bytes(pid) for pid in process.family(loupe.pid)}
        for pid in before:
            process.forget_peak(pid)
        work(bench, client)
        peaks = {pid: process.peak_bytes(pid) for pid in process.family(loupe.pid)}
    return sum(peak - before.get(pid, 0) for pid, peak in peaks.items()) / MB


def _client(loupe: Loupe) -> httpx.Client:
    auth = (DEVELOPMENT_PRIVATE_KEY, "")
    return httpx.Client(base_url=loupe.url, auth=auth, timeout=60, trust_env=False)


def _upload(client: httpx.Client, picture: Path) -> None:
    client.post(
        "/api/v1/files/upload",
        files={"file": ("bench.jpg", picture.read_bytes())},
        data={"fileName": "bench.jpg"},
    ).raise_for_status()


def _one_upload(bench: Bench, client: httpx.Client) -> None:
    _upload(client, bench.pictures["3m"])


def _four_renderings(bench: Bench, client: httpx.Client) -> None:
    paths = [thumbnail_path(number) for number in range(1, RENDERINGS + 1)]
    with ThreadPoolExecutor(RENDERINGS) as threads:
        for answer in threads.map(client.get, paths):
            answer.raise_for_status()


def _idle(bench: Bench) -> Finding:
    with emulating(bench.directory) as vendors:
        with serving(bench.directory, **vendors.loupe_settings) as loupe:
            ours = process.resident_bytes(loupe.pid)
        bare = _bare_bytes(bench, vendors)
    return Finding(
        "memory",
        "the idle main process",
        "a script with its imports and clients",
        Goal(1.35, 1.15, lower_is_better=True),
        *median_and_spread([ours / bare]),
        loupe=f"{ours / MB:.0f} MB",
        other=f"{bare / MB:.0f} MB",
    )


def _bare_bytes(bench: Bench, vendors: Emulators) -> int:
    """Raises BenchFailed."""
    script = subprocess.Popen(
        [sys.executable, "-m", "bench.limit.idle", vendors.vision, sqlite_url(bench.directory)],
        cwd=PROJECT,
        env=vendors.aws_settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with script:
        assert script.stdout is not None
        if not script.stdout.readline().startswith(b"ready"):
            raise BenchFailed("The script with Loupe's imports did not start.")
        return process.resident_bytes(script.pid)
