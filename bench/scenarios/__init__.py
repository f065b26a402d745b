"""One file per scenario: `run(bench)` starts what it needs, measures, and yields its findings."""

from collections.abc import Callable, Iterable

from bench.findings import Bench, Finding
from bench.scenarios import (
    cached,
    details,
    extensions,
    growth,
    listing,
    memory,
    stragglers,
    thumbnails,
    upload,
)

SCENARIOS: dict[str, Callable[[Bench], Iterable[Finding]]] = {
    "upload": upload.run,
    "extensions": extensions.run,
    "details": details.run,
    "list": listing.run,
    "thumbnails": thumbnails.run,
    "cached": cached.run,
    "memory": memory.run,
    "stragglers": stragglers.run,
    "growth": growth.run,
}
