"""Starts the limit servers: what Loupe is measured against when there is no product to install."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.process import free_port, running


@contextmanager
def serving(name: str, directory: Path, **settings: str) -> Iterator[str]:
    """The URL of `bench.limit.<name>` under uvicorn, as fast as it runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    with running(
        [sys.executable, "-m", "uvicorn", f"bench.limit.{name}:app", "--port", str(port), *options],
        log=directory / f"{name}.log",
        ready_url=f"{url}/ready",
        environment={"LIMIT_DIR": str(directory), **settings},
    ):
        yield url
