"""Uploads with both extensions, beside a bare loop of the same provider copy and the same calls."""

import json
from collections.abc import Iterator

from bench import limit
from bench.emulators import emulating
from bench.findings import Bench, Finding, Goal, ratio
from bench.load import interleave
from bench.loupe import UPLOAD_FIELDS, migrate, serving
from bench.scenarios.upload import loupe_upload, raw_upload

EXTENSIONS = [
    {"name": name, "minConfidence": 50, "maxTags": 10}
    for name in ("google-auto-tagging", "aws-auto-tagging")
]
FIELDS = f"{UPLOAD_FIELDS};extensions={json.dumps(EXTENSIONS)}"


def run(bench: Bench) -> Iterator[Finding]:
    migrate(bench.directory)
    picture = bench.pictures["100k"]
    with (
        emulating(bench.directory) as vendors,
        serving(bench.directory, **vendors.loupe_settings) as loupe,
        limit.serving(
            "tagging", bench.directory, VISION_ENDPOINT=vendors.vision, **vendors.aws_settings
        ) as bare,
    ):
        loads = [loupe_upload(loupe.url, picture, FIELDS), raw_upload(bare, picture)]
        readings = interleave(loads, bench.rounds, bench.seconds)
    yield ratio(
        "extensions",
        "uploads of 100 KB with both extensions",
        "a bare loop of the calls",
        Goal(0.5, 0.75),
        readings["Loupe"],
        readings["the limit"],
    )
