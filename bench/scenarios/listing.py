"""A list of a hundred files, beside sqlite3 in the event loop with orjson, and beside Directus."""

from collections.abc import Iterator

from bench.findings import Bench, Finding, Goal
from bench.scenarios.library import compare, library, loads

GOALS = {"the limit": Goal(0.45, 0.70), "Directus": Goal(10, 18)}


def run(bench: Bench) -> Iterator[Finding]:
    with library(bench) as files:
        wanted = loads(files, "/v1/files?limit=100", "/files", "/files?limit=100")
        yield from compare(bench, "list", "lists of 100 files", wanted, GOALS)
