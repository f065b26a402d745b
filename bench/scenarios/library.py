"""What details and lists have in common: one media library behind three servers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx

from bench import limit, peers
from bench.findings import Bench, Finding, Goal, ratio
from bench.load import Load, interleave
from bench.loupe import AUTHORIZATION, fill, migrate, serving, sqlite_url
from bench.scenarios.upload import DIRECTUS_FIELDS

FILES = 10_000
DIRECTUS_FILES = 200  # it is only asked for a hundred


@dataclass(frozen=True, slots=True)
class Library:
    """directus_id: of one of its files; without Directus its URL is None."""

    loupe: str
    limit: str
    directus: str | None
    directus_id: str


@contextmanager
def library(bench: Bench) -> Iterator[Library]:
    migrate(bench.directory)
    fill(sqlite_url(bench.directory), FILES, bench.pictures["100k"])
    with ExitStack() as stack:
        loupe = stack.enter_context(serving(bench.directory))
        bare = stack.enter_context(limit.serving("server", bench.directory))
        directus = stack.enter_context(
            peers.if_installed(peers.directus(bench.directory), "Directus", bench.left_out)
        )
        yield Library(loupe.url, bare, directus, _fill_directus(bench, directus))


def _fill_directus(bench: Bench, url: str | None) -> str:
    """The id of the last file."""
    if url is None:
        return ""
    content = bench.pictures["100k"].read_bytes()
    fields = dict(field.split("=", 1) for field in DIRECTUS_FIELDS.split(";"))
    headers = {"Authorization": f"Bearer {peers.DIRECTUS_TOKEN}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
        for _ in range(DIRECTUS_FILES):
            file = {"file": ("bench.jpg", content, "image/jpeg")}
            answer = client.post("/files", data=fields, files=file).raise_for_status()
    last: str = answer.json()["data"]["id"]
    return last


def compare(
    bench: Bench, scenario: str, measure: str, loads: list[Load], goals: dict[str, Goal]
) -> Iterator[Finding]:
    readings = interleave(loads, bench.rounds, bench.seconds)
    for against, goal in goals.items():
        if against in readings:
            yield ratio(scenario, measure, against, goal, readings["Loupe"], readings[against])


def get(name: str, url: str, authorization: str = "") -> Load:
    return Load(name, url, settings={"AUTHORIZATION": authorization})


def loads(library: Library, loupe: str, bare: str, directus: str) -> list[Load]:
    """The three paths, each asked of its server."""
    wanted = [
        get("Loupe", library.loupe + loupe, AUTHORIZATION),
        get("the limit", library.limit + bare),
    ]
    if library.directus is not None:
        token = f"Bearer {peers.DIRECTUS_TOKEN}"
        wanted.append(get("Directus", library.directus + directus, token))
    return wanted
