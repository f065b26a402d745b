"""Where the time of one request goes: `python -m bench.profile --py-spy PATH`, or `make profile`.

Runs Loupe under load and samples with py-spy which thread of the main process holds the GIL, and
where. A sample belongs to the layer that its innermost known frame names, and what the kernel
counted as a thread's user time is shared out by its samples. Work without the GIL, such as hashing,
counts with whatever else the thread does.
"""

import argparse
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import process
from bench.load import Load, measure, require_wrk, warm_up
from bench.loupe import AUTHORIZATION, Loupe, file_id, fill, migrate, serving, sqlite_url
from bench.pictures import make_pictures
from bench.process import PROJECT, ThreadSeconds
from bench.scenarios.upload import loupe_upload

SAMPLES_PER_SECOND = 100
FILES = 10_000
THREADS = {
    "MainThread": "event loop's thread",
    "sqlite-write": "writer thread",
    "sqlite-scan": "thread for long reads",
}
POOL = "all other threads"
# Tried in this order on each frame, from the innermost outwards.
LAYERS = (
    ("commit, savepoints", r"do_commit|do_\w*savepoint|say_begin"),
    ("SQLAlchemy: run", r"sqlalchemy/(engine|dialects)|sqlalchemy/ext"),
    ("SQLAlchemy: build and compile", r"sqlalchemy/"),
    ("image header", r"pyvips/|app/images|cffi"),
    ("form", r"multipart\.py|app/files/form"),
    ("staging: hash and write", r"app/files/staging"),
    ("storage: sync and rename", r"app/storage/"),
    ("validation", r"pydantic|app/files/(schemas|names)"),
    ("authentication", r"app/auth"),
    ("logs", r"structlog/|app/logs|logging/"),
    ("metrics", r"prometheus_client/|app/metrics"),
    ("middlewares", r"app/http|uvicorn/middleware"),
    ("uvicorn", r"uvicorn/"),
    ("FastAPI and Starlette", r"fastapi/|starlette/|anyio/"),
    ("response: JSON", r"app/errors|orjson"),
    ("file objects", r"app/files/(objects|urls)"),
    ("hops between threads", r"concurrent/futures|asyncio/threads|threading\.py|queue"),
    ("transactions", r"app/db|app/files/service"),
    ("event loop", r"asyncio/|uvloop"),
)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all servers are ended
    require_wrk()
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="profile-", dir=options.out) as work:
        directory = Path(work)
        migrate(directory)
        pictures = make_pictures(directory)
        fill(sqlite_url(directory), FILES, pictures["100k"])
        with serving(directory) as loupe:
            for name in options.only or ("upload", "details", "list"):
                load = _load(name, loupe, pictures["100k"])
                _profile(name, load, loupe, options.py_spy, options.seconds, directory)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--py-spy", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=("upload", "details", "list"))
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=PROJECT / "data" / "bench")
    return parser.parse_args()


def _load(name: str, loupe: Loupe, picture: Path) -> Load:
    if name == "upload":
        return loupe_upload(loupe.url, picture)
    path = (
        f"/v1/files/{file_id(FILES // 2)}/details" if name == "details" else "/v1/files?limit=100"
    )
    return Load("Loupe", loupe.url + path, settings={"AUTHORIZATION": AUTHORIZATION})


def _profile(
    name: str, load: Load, loupe: Loupe, py_spy: Path, seconds: int, directory: Path
) -> None:
    warm_up(load)
    samples = directory / f"{name}.txt"
    what = ["--pid", str(loupe.pid), "--format", "raw", "--output", str(samples), "--threads"]
    # Without stopping it for each sample, which would cost every thread system calls.
    how = ["--gil", "--nonblocking", "--duration", str(seconds), "--rate", str(SAMPLES_PER_SECOND)]
    with subprocess.Popen(
        [py_spy, "record", *what, *how],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as sampling:
        before = process.thread_seconds(loupe.pid)
        reading = measure(load, seconds, 1)
        after = process.thread_seconds(loupe.pid)
        sampling.wait()
    requests = reading.per_second * seconds
    used = _milliseconds_each(before, after, requests)
    total = sum(sum(each) for each in used.values())
    print(f"\n{name}: {total:.2f} ms of CPU a request, {reading.per_second:,.0f}/s\n")
    for line in _lines(samples.read_text().splitlines(), used):
        print(line)


def _milliseconds_each(
    before: ThreadSeconds, after: ThreadSeconds, requests: float
) -> ThreadSeconds:
    """User and system time of each thread for one request, in milliseconds."""

    def each(thread: int, kind: int) -> float:
        return (after[thread][kind] - before.get(thread, (0, 0))[kind]) / requests * 1000

    return {thread: (each(thread, 0), each(thread, 1)) for thread in after}


def _lines(stacks: Sequence[str], used: ThreadSeconds) -> Iterator[str]:
    """stacks: `thread (ID): NAME;outermost;...;innermost COUNT`."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*THREADS.values(), POOL)}
    names: dict[int, str] = {}
    for stack in stacks:
        frames, _, count = stack.rpartition(" ")
        thread, *inner = frames.split(";")
        number = int(re.findall(r"\d+", thread)[0])
        names[number] = _thread_name(thread)
        counts[names[number]][_layer(inner)] += int(count)
    for name, layers in counts.items():
        user = sum(used[thread][0] for thread in used if names.get(thread, POOL) == name)
        system = sum(used[thread][1] for thread in used if names.get(thread, POOL) == name)
        yield f"  {name}: {user + system:.3f} ms"
        yield f"    {'system calls':<40} {system:6.3f} ms"
        for layer, samples in layers.most_common():
            yield f"    {layer:<40} {user * samples / layers.total():6.3f} ms"


def _thread_name(thread: str) -> str:
    return next((name for part, name in THREADS.items() if part in thread), POOL)


def _layer(frames: Sequence[str]) -> str:
    for frame in reversed(frames):
        for layer, pattern in LAYERS:
            if re.search(pattern, frame):
                return layer
    return "the rest"


if __name__ == "__main__":
    main()
