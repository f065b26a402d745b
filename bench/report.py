"""The findings as a table to read, as JSON to quote from, and as a picture for the docs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from math import log2
from pathlib import Path

from bench.findings import Bench, Finding

HEADINGS = ("What", "Against", "Loupe", "Other", "Median", "Rounds", "Floor", "Aim", "Reached")


def write(out: Path, bench: Bench, findings: Sequence[Finding]) -> None:
    """results.md, results.json and results.svg."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(as_text(bench, findings))
    (out / "results.json").write_text(_as_json(bench, findings))
    (out / "results.svg").write_text(as_picture(findings))


def _as_json(bench: Bench, findings: Sequence[Finding]) -> str:
    content = {
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "versions": bench.versions,
        "left_out": bench.left_out,
        "findings": [asdict(each) | {"verdict": each.verdict} for each in findings],
    }
    return json.dumps(content, indent=2) + "\n"


# --- Table ---------------------------------------------------------------------------------------


def as_text(bench: Bench, findings: Sequence[Finding]) -> str:
    """A Markdown table, aligned, with what was measured and what was left out below it."""
    lines = _table([HEADINGS, *map(_cells, findings)])
    lines += ["", f"Medians of {bench.rounds} rounds of {bench.seconds} s.", ""]
    lines += [f"- {name}: {version}" for name, version in bench.versions.items()]
    lines += [f"- Left out: {name}. {why}" for name, why in bench.left_out.items()]
    return "\n".join(lines) + "\n"


def _cells(finding: Finding) -> tuple[str, ...]:
    unit, goal = finding.unit, finding.goal
    bound = "at most " if goal.lower_is_better else ""
    return (
        finding.measure,
        finding.against or "-",
        finding.loupe or "-",
        finding.other or "-",
        quantity(finding.value, unit),
        f"{finding.lowest:.2f} to {finding.highest:.2f}",
        bound + quantity(goal.floor, unit, 3),
        bound + quantity(goal.aim, unit, 3),
        finding.verdict,
    )


def quantity(value: float, unit: str, digits: int | None = None) -> str:
    """digits: significant ones; without, two decimals."""
    number = f"{value:.2f}" if digits is None else f"{value:.{digits}g}"
    return number + ("x" if unit == "x" else f" {unit}")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "| " + " | ".join(map(str.ljust, row, widths)) + " |"
        for row in (rows[0], ["-" * width for width in widths], *rows[1:])
    ]


# --- Picture -------------------------------------------------------------------------------------

ROW_PX = 26
TOP_PX = 40
LEFT_PX = 420
DOUBLING_PX = 70  # the scale is logarithmic: so wide is a factor of two
DOUBLINGS = 3  # each way from the aim
RIGHT_PX = 170
COLOURS = {"aim": "#2f9e6e", "floor": "#d9a03a", "below": "#cf5a4a"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#444}line{stroke:#8888;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


def as_picture(findings: Sequence[Finding]) -> str:
    """An SVG: a bar from the aim to each median, to the right where it is better than the aim."""
    width = LEFT_PX + 2 * DOUBLINGS * DOUBLING_PX + RIGHT_PX
    height = TOP_PX + ROW_PX * len(findings) + 20
    aim_px = LEFT_PX + DOUBLINGS * DOUBLING_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">',
        f"<style>{STYLE}</style>",
        f'<text x="{aim_px}" y="20" text-anchor="middle">aim</text>',
        f'<text x="{LEFT_PX}" y="20">worse</text>',
        f'<text x="{width - RIGHT_PX}" y="20" text-anchor="end">better</text>',
        f'<line x1="{aim_px}" x2="{aim_px}" y1="28" y2="{height - 12}"/>',
        *(_bar(finding, TOP_PX + ROW_PX * row) for row, finding in enumerate(findings)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bar(finding: Finding, top_px: int) -> str:
    """The thin line across it is the floor."""
    aim_px = LEFT_PX + DOUBLINGS * DOUBLING_PX
    end_px, floor_px = _place_px(finding, finding.value), _place_px(finding, finding.goal.floor)
    left_px, right_px = sorted((aim_px, end_px))
    against = f" / {finding.against}" if finding.against else ""
    text_px = top_px + 13
    return (
        f'<text x="8" y="{text_px}">{escape(finding.measure + against)}</text>'
        f'<rect x="{left_px}" y="{top_px}" width="{max(2, right_px - left_px)}" height="16" '
        f'fill="{COLOURS[finding.verdict]}"/>'
        f'<line x1="{floor_px}" x2="{floor_px}" y1="{top_px - 3}" y2="{top_px + 19}"/>'
        f'<text x="{LEFT_PX + 2 * DOUBLINGS * DOUBLING_PX + 12}" y="{text_px}">'
        f"{quantity(finding.value, finding.unit)}, "
        f"aim {quantity(finding.goal.aim, finding.unit, 3)}"
        "</text>"
    )


def _place_px(finding: Finding, value: float) -> int:
    """Where a value stands, at most at an end of the scale."""
    share = max(value, 1e-9) / finding.goal.aim
    doublings = log2(1 / share if finding.goal.lower_is_better else share)
    return round(LEFT_PX + (DOUBLINGS + max(-DOUBLINGS, min(DOUBLINGS, doublings))) * DOUBLING_PX)
