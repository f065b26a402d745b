"""Uploads with all of Loupe's steps, beside a raw body that is synced, and beside Directus."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench import limit, peers
from bench.findings import Bench, Finding, Goal, p99_ms, ratio
from bench.load import Load, interleave
from bench.loupe import AUTHORIZATION, UPLOAD_FIELDS, migrate, serving

DIRECTUS_FIELDS = "title=bench.jpg;tags=summer,beach;description=/bench"
GOALS = {
    "100k": {"the limit": Goal(0.40, 0.60), "Directus": Goal(6, 12)},
    "3m": {"the limit": Goal(0.70, 0.85), "Directus": Goal(2, 2.8)},
}
LABELS = {"100k": "100 KB", "3m": "3 MB"}


def run(bench: Bench) -> Iterator[Finding]:
    migrate(bench.directory)
    with ExitStack() as stack:
        loupe = stack.enter_context(serving(bench.directory))
        raw = stack.enter_context(limit.serving("server", bench.directory))
        directus = stack.enter_context(
            peers.if_installed(peers.directus(bench.directory), "Directus", bench.left_out)
        )
        for size, picture in bench.pictures.items():
            loads = [loupe_upload(loupe.url, picture), raw_upload(raw, picture)]
            if directus is not None:
                loads.append(directus_upload(directus, picture))
            yield from _compare(bench, size, loads)


def _compare(bench: Bench, size: str, loads: list[Load]) -> Iterator[Finding]:
    seconds = bench.seconds if size == "100k" else bench.short_seconds
    readings = interleave(loads, bench.rounds, seconds)
    for against, goal in GOALS[size].items():
        if against in readings:
            ours, theirs = readings["Loupe"], readings[against]
            measure = f"uploads of {LABELS[size]}"
            yield ratio("upload", measure, against, goal, ours, theirs)
    if size == "100k":
        yield ratio(
            "upload",
            "p99 of uploads of 100 KB",
            "the limit",
            Goal(4, 2, lower_is_better=True),
            readings["Loupe"],
            readings["the limit"],
            p99_ms,
        )


def loupe_upload(url: str, picture: Path, fields: str = UPLOAD_FIELDS) -> Load:
    settings = {"FILE": str(picture), "FIELDS": fields, "AUTHORIZATION": AUTHORIZATION}
    return Load("Loupe", f"{url}/api/v1/files/upload", "upload.lua", settings)


def raw_upload(url: str, picture: Path) -> Load:
    return Load("the limit", f"{url}/upload", "upload.lua", {"FILE": str(picture)})


def directus_upload(url: str, picture: Path) -> Load:
    settings = {
        "FILE": str(picture),
        "FIELDS": DIRECTUS_FIELDS,
        "AUTHORIZATION": f"Bearer {peers.DIRECTUS_TOKEN}",
    }
    return Load("Directus", f"{url}/files", "upload.lua", settings)
