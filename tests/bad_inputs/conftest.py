"""A server in a process of its own, whose memory and log can be looked at."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.harness import ServerProcess, running


@pytest.fixture(scope="package")
def process(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path
) -> Iterator[ServerProcess]:
    """With both extensions on the local tagger, and all the time they may need."""
    directory = tmp_path_factory.mktemp("process")
    shutil.copy(sqlite_template, directory / "loupe.db")
    server = ServerProcess(
        directory, f"sqlite:///{directory / 'loupe.db'}", LOUPE_SYNC_BUDGET_SECONDS="60"
    )
    with running(server):
        yield server
