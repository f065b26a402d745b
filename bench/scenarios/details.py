"""Details of one file, beside sqlite3 in the event loop with orjson, and beside Directus."""

from collections.abc import Iterator

from bench.findings import Bench, Finding, Goal
from bench.loupe import file_id
from bench.scenarios.library import compare, library, loads

GOALS = {"the limit": Goal(0.20, 0.40), "Directus": Goal(10, 20)}
NUMBER = 5_000


def run(bench: Bench) -> Iterator[Finding]:
    with library(bench) as files:
        wanted = loads(
            files,
            f"/v1/files/{file_id(NUMBER)}/details",
            f"/files/{file_id(NUMBER)}",
            f"/files/{files.directus_id}",
        )
        yield from compare(bench, "details", "details of one file", wanted, GOALS)
