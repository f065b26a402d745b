"""Of everything that a figure depends on."""

import platform
import sqlite3
import subprocess
from importlib.metadata import version
from os import cpu_count
from pathlib import Path

import pyvips

from bench import peers
from bench.process import PROJECT

PACKAGES = ("uvicorn", "starlette", "fastapi", "sqlalchemy", "orjson", "pyvips")


def versions() -> dict[str, str]:
    return {
        "Machine": f"{_processor()}, {cpu_count()} cores, Linux {platform.release()}",
        "Loupe": _commit(),
        "Python": platform.python_version(),
        "Libraries": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "SQLite": sqlite3.sqlite_version,
        "libvips": ".".join(str(pyvips.version(part)) for part in range(3)),
        "wrk": _said_by("wrk", "-v"),
        **peers.versions(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    return _said_by("git", "-C", str(PROJECT), "describe", "--always", "--dirty") or "unknown"


def _said_by(*command: str) -> str:
    """The first line; empty where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return ""
    return (done.stdout or done.stderr).split("\n", 1)[0].strip()
