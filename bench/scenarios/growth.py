"""Details and lists on PostgreSQL when the library is a hundred times larger."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.findings import Bench, Finding, Goal, ms_each, ratio
from bench.load import Load, interleave
from bench.loupe import AUTHORIZATION, file_id, fill, migrate, serving
from tests.postgres import Postgres, is_available, running_postgres

SMALL = 10_000
ASKED = 5_000
GOAL = Goal(2, 1.2, lower_is_better=True)


def run(bench: Bench) -> Iterator[Finding]:
    if not is_available():
        bench.left_out["PostgreSQL"] = "Its server's binaries are not installed."
        return
    with running_postgres() as server, ExitStack() as stack:
        urls = {
            count: stack.enter_context(_library(bench, server, count))
            for count in (SMALL, bench.files)
        }
        for measure, loads in _loads(bench, urls).items():
            readings = interleave(loads, bench.rounds, bench.seconds)
            small, large = (readings[load.name] for load in loads)
            against = f"{SMALL:,} files"
            measure = f"{measure} at {bench.files:,} files"
            yield ratio("growth", measure, against, GOAL, large, small, ms_each)


@contextmanager
def _library(bench: Bench, server: Postgres, count: int) -> Iterator[str]:
    """The URL of a server on so many files."""
    directory = bench.directory / str(count)
    directory.mkdir()
    database = server.create(f"files_{count}")
    migrate(directory, LOUPE_DATABASE_URL=database)
    fill(database, count, bench.pictures["100k"])
    with serving(directory, LOUPE_DATABASE_URL=database) as loupe:
        yield loupe.url


def _loads(bench: Bench, urls: dict[int, str]) -> dict[str, list[Load]]:
    """By what is measured, one for each library."""
    by_measure: dict[str, list[Load]] = {"details of one file": [], "lists of 100 files": []}
    for count, url in urls.items():
        settings = {"AUTHORIZATION": AUTHORIZATION}
        paths = {"PATHS": str(_details_paths(bench.directory / f"{count}-paths", count))}
        name = f"{count} files"
        by_measure["details of one file"].append(Load(name, url, settings=settings | paths))
        by_measure["lists of 100 files"].append(
            Load(name, f"{url}/v1/files?limit=100", settings=settings)
        )
    return by_measure


def _details_paths(file: Path, count: int) -> Path:
    """Of files from all over the library."""
    step = count // ASKED
    ids = (file_id(number * step) for number in range(1, ASKED + 1))
    file.write_text("".join(f"/v1/files/{each}/details\n" for each in ids))
    return file
