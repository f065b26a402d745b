"""Measures Loupe beside its limit and its peers: `python -m bench`, which `make bench` runs."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import report
from bench.findings import Bench, Finding
from bench.load import require_wrk
from bench.pictures import make_pictures
from bench.process import PROJECT, BenchFailed
from bench.scenarios import SCENARIOS
from bench.versions import versions


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all servers are ended
    options.out.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    try:
        require_wrk()
        # On the disk of the checkout: in a folder in memory no sync would cost anything.
        with TemporaryDirectory(prefix="work-", dir=options.out) as work:
            bench, findings = _measure_all(options, Path(work), failures)
    except BenchFailed as error:
        sys.exit(f"bench: {error}")
    report.write(options.out, bench, findings)
    print(f"\n{report.as_text(bench, findings)}")
    print(f"Also in {options.out}: results.md, results.json, results.svg")
    if failures:
        sys.exit("\n".join(f"bench: {name} failed. {why}" for name, why in failures.items()))


def _absolute(path: str) -> Path:
    """Peers are started in folders of their own."""
    return Path(path).resolve()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, help="these scenarios")
    parser.add_argument("--rounds", type=int, default=4, help="how often each load has its turn")
    parser.add_argument("--seconds", type=int, default=5, help="for each turn")
    parser.add_argument("--files", type=int, default=1_000_000, help="in the large library")
    parser.add_argument("--out", type=_absolute, default=PROJECT / "data" / "bench")
    return parser.parse_args()


def _measure_all(
    options: argparse.Namespace, work: Path, failures: dict[str, str]
) -> tuple[Bench, Sequence[Finding]]:
    """failures: of scenarios, by name; the others go on."""
    (work / "pictures").mkdir()
    pictures = make_pictures(work / "pictures")
    bench = Bench(options.rounds, options.seconds, options.files, work, pictures, versions())
    findings: list[Finding] = []
    for name in options.only or SCENARIOS:
        try:
            findings.extend(_measure(name, bench, work / name))
        except BenchFailed as error:
            failures[name] = str(error)
            print(f"    failed: {error}", flush=True)
    return bench, findings


def _measure(name: str, bench: Bench, directory: Path) -> Iterator[Finding]:
    print(f"==> {name}", flush=True)
    directory.mkdir()
    bench.directory = directory
    for finding in SCENARIOS[name](bench):
        value = report.quantity(finding.value, finding.unit)
        against = f", against {finding.against}" if finding.against else ""
        print(f"    {finding.measure}{against}: {value} ({finding.verdict})", flush=True)
        yield finding


if __name__ == "__main__":
    main()
