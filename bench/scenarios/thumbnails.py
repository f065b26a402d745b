"""The media library's thumbnail of 12 megapixels, rendered each time, beside picture servers."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx

from bench import peers
from bench.findings import Bench, Finding, Goal, ratio
from bench.load import RENDERING_CONNECTIONS, Load, interleave
from bench.loupe import file_path, fill, migrate, serving, sqlite_url

GOALS = {
    "bare sharp": Goal(0.90, 1.0),
    "ipx": Goal(1.05, 1.15),
    "thumbor": Goal(0.95, 1.05),
}
FILES = 20_000  # more than all rounds ask for: no blob is rendered twice
FORMATS = {"JPEG": "image/jpeg", "WebP": "image/webp"}
WIDTH_PX = 300


def thumbnail_path(number: int) -> str:
    return f"/demo/tr:n-media_library_thumbnail{file_path(number)}"


def run(bench: Bench) -> Iterator[Finding]:
    picture = bench.pictures["3m"]
    migrate(bench.directory)
    fill(sqlite_url(bench.directory), FILES, picture, bench.directory)
    paths = bench.directory / "paths"
    paths.write_text("".join(f"{thumbnail_path(number)}\n" for number in range(1, FILES + 1)))
    with ExitStack() as stack:
        loupe = stack.enter_context(serving(bench.directory)).url
        servers = _start_peers(bench, stack, picture.parent)
        for name, mime in FORMATS.items():
            if _format_of(loupe, mime) != mime:
                bench.left_out[f"thumbnails in {name}"] = f"Loupe does not answer with {mime}."
                continue
            yield from _compare(bench, name, _loads(loupe, paths, servers, mime, picture.name))


def _start_peers(bench: Bench, stack: ExitStack, pictures: Path) -> dict[str, str]:
    """URLs by name."""
    known = {"bare sharp": peers.sharp, "ipx": peers.ipx, "thumbor": peers.thumbor}
    started = {}
    for name, start in known.items():
        peer = peers.if_installed(start(bench.directory, pictures), name, bench.left_out)
        url = stack.enter_context(peer)
        if url is not None:
            started[name] = url
    return started


def _format_of(loupe: str, mime: str) -> str:
    answer = httpx.get(
        loupe + thumbnail_path(FILES), headers={"Accept": mime}, timeout=30, trust_env=False
    )
    return answer.raise_for_status().headers["content-type"]


def _loads(loupe: str, paths: Path, servers: dict[str, str], mime: str, picture: str) -> list[Load]:
    kind = mime.removeprefix("image/")
    quality = peers.THUMBNAIL_QUALITY
    targets = {
        "bare sharp": f"/{picture}?width={WIDTH_PX}&format={kind}&quality={quality}",
        "ipx": f"/w_{WIDTH_PX},f_{kind},q_{quality}/{picture}",
        "thumbor": f"/unsafe/{WIDTH_PX}x0/filters:quality({quality}):format({kind})/{picture}",
    }
    ours = {"PATHS": str(paths), "ACCEPT": mime}
    return [
        Load("Loupe", loupe, settings=ours, connections=RENDERING_CONNECTIONS),
        *(
            Load(name, url + targets[name], connections=RENDERING_CONNECTIONS)
            for name, url in servers.items()
        ),
    ]


def _compare(bench: Bench, name: str, loads: list[Load]) -> Iterator[Finding]:
    readings = interleave(loads, bench.rounds, bench.seconds)
    for against, goal in GOALS.items():
        if against in readings:
            measure = f"thumbnails of 12 MP in {name}, uncached"
            ours, theirs = readings["Loupe"], readings[against]
            yield ratio("thumbnails", measure, against, goal, ours, theirs)
