"""Where the time of one request goes: `python -m bench.profile --py-spy PATH`, or `make profile`.

Runs Loupe under load and samples its main process with py-spy. Each sample belongs to the layer
that its innermost known frame names; shares become milliseconds of CPU by what the kernel counted.
"""

import argparse
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import process
from bench.load import Load, measure, require_wrk, warm_up
from bench.loupe import AUTHORIZATION, Loupe, file_id, fill, migrate, serving, sqlite_url
from bench.pictures import make_pictures
from bench.process import PROJECT
from bench.scenarios.upload import loupe_upload

SAMPLES_PER_SECOND = 100
FILES = 10_000
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
    how = ["--duration", str(seconds), "--rate", str(SAMPLES_PER_SECOND)]
    with subprocess.Popen(
        [py_spy, "record", *what, *how],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as sampling:
        before = process.cpu_seconds(loupe.pid)
        reading = measure(load, seconds, 1)
        used = process.cpu_seconds(loupe.pid) - before
        sampling.wait()
    milliseconds = used / (reading.per_second * seconds) * 1000
    print(f"\n{name}: {milliseconds:.2f} ms of CPU a request, {reading.per_second:,.0f}/s\n")
    for line in _by_layer(samples.read_text().splitlines(), milliseconds):
        print(line)


def _by_layer(stacks: Sequence[str], milliseconds: float) -> list[str]:
    """stacks: `thread;outermost;...;innermost COUNT`."""
    layers: Counter[str] = Counter()
    for stack in stacks:
        frames, _, count = stack.rpartition(" ")
        layers[_layer(frames.split(";"))] += int(count)
    return [
        f"  {layer:<44} {milliseconds * count / layers.total():6.3f} ms"
        for layer, count in layers.most_common()
    ]


def _layer(frames: Sequence[str]) -> str:
    where = "writer thread: " if "sqlite-write" in frames[0] else ""
    for frame in reversed(frames[1:]):
        for layer, pattern in LAYERS:
            if re.search(pattern, frame):
                return where + layer
    return where + "the rest"


if __name__ == "__main__":
    main()
