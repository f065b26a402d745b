"""Load on one server by wrk, and rounds of it that take turns."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bench.process import BenchFailed

SCRIPTS = Path(__file__).with_name("wrk")
WARM_UP_SECONDS = (1, 2, 4, 8, 16)
PAUSE_SECONDS = 0.3
CONNECTIONS = 16
RENDERING_CONNECTIONS = 4


class NoAnswer(BenchFailed):
    """Not one in the time of a round."""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk asks of one server. settings: what the script reads from its environment."""

    name: str
    url: str
    script: str = "get.lua"
    settings: Mapping[str, str] = field(default_factory=dict)
    connections: int = CONNECTIONS


@dataclass(frozen=True, slots=True)
class Reading:
    """One run of wrk."""

    per_second: float
    p50_ms: float
    p99_ms: float


def measure(load: Load, seconds: int, number: int) -> Reading:
    """number: of the round, from 1. Raises BenchFailed if a request was refused or broken."""
    if urlsplit(load.url).hostname != "127.0.0.1":
        raise BenchFailed(f"{load.url} is not on loopback.")
    script = SCRIPTS / load.script
    command = ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s", "--timeout", "20s"]
    done = subprocess.run(
        [*command, "-s", script, load.url],
        env={
            "PATH": os.environ["PATH"],
            "COMMON": str(SCRIPTS / "common.lua"),
            "ROUND": str(number),
            **load.settings,
        },
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    return _reading(load, done.stdout + done.stderr)


def _reading(load: Load, output: str) -> Reading:
    found = [line.removeprefix("JSON ") for line in output.splitlines() if line.startswith("JSON ")]
    if not found:
        raise BenchFailed(f"wrk said nothing of {load.name}: {output.strip()}")
    counts = json.loads(found[0])
    failed = counts["refused"] + counts["broken"]
    if not counts["requests"]:
        raise NoAnswer(f"{load.name} answered no request in time.")
    if failed:
        raise BenchFailed(f"{load.name}: {failed} of {counts['requests']} requests failed.")
    per_second = counts["requests"] / counts["microseconds"] * 1e6
    return Reading(per_second, counts["p50_ms"], counts["p99_ms"])


def interleave(loads: Sequence[Load], rounds: int, seconds: int) -> dict[str, list[Reading]]:
    """The readings of each load by name, one a round: A B, then B A, so that a drift hits both."""
    readings: dict[str, list[Reading]] = {load.name: [] for load in loads}
    for load in loads:
        warm_up(load)
    for number in range(1, rounds + 1):
        for load in loads if number % 2 else reversed(loads):
            time.sleep(PAUSE_SECONDS)  # what the last run left in flight ends
            readings[load.name].append(measure(load, seconds, number))
    return readings


def warm_up(load: Load) -> None:
    """Until it answers: some open their decoders with the first request. Raises BenchFailed."""
    for seconds in WARM_UP_SECONDS:
        try:
            measure(load, seconds, 0)
            return
        except NoAnswer:
            continue
    raise NoAnswer(f"{load.name} answered no request at all.")


def require_wrk() -> None:
    """Raises BenchFailed."""
    if shutil.which("wrk") is None:
        raise BenchFailed("The benchmark needs wrk on the path (Debian's package is called so).")
