"""The same thumbnail again and again, beside nginx and Starlette sending it as a file."""

from collections.abc import Iterator
from contextlib import ExitStack

import httpx

from bench import limit, peers
from bench.findings import Bench, Finding, Goal
from bench.load import Load
from bench.loupe import fill, migrate, serving, sqlite_url
from bench.scenarios.library import compare
from bench.scenarios.thumbnails import thumbnail_path

GOALS = {"nginx": Goal(0.10, 0.25), "Starlette's FileResponse": Goal(4, 10)}


def run(bench: Bench) -> Iterator[Finding]:
    migrate(bench.directory)
    fill(sqlite_url(bench.directory), 1, bench.pictures["3m"], bench.directory)
    with ExitStack() as stack:
        url = stack.enter_context(serving(bench.directory)).url + thumbnail_path(1)
        file = bench.directory / "thumbnail.jpg"
        file.write_bytes(httpx.get(url, timeout=30, trust_env=False).raise_for_status().content)
        bare = stack.enter_context(
            limit.serving("server", bench.directory, LIMIT_THUMBNAIL=str(file))
        )
        loads = [Load("Loupe", url), Load("Starlette's FileResponse", f"{bare}/thumbnail")]
        nginx = stack.enter_context(
            peers.if_installed(peers.nginx(bench.directory, file), "nginx", bench.left_out)
        )
        if nginx is not None:
            loads.append(Load("nginx", nginx))
        yield from compare(bench, "cached", "thumbnails of 12 MP, cached", loads, GOALS)
