"""What a scenario finds: a median over the rounds, with its spread, beside what it should be."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.load import Reading


@dataclass(frozen=True, slots=True)
class Goal:
    """floor: what is promised. aim: what is wanted. Ratios, unless the finding has a unit."""

    floor: float
    aim: float
    lower_is_better: bool = False

    def verdict(self, value: float) -> str:
        sign = -1 if self.lower_is_better else 1
        if sign * value >= sign * self.aim:
            return "aim"
        return "floor" if sign * value >= sign * self.floor else "below"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table. value: the median of the rounds. against: empty for an absolute value.

    unit: `x` for a ratio of Loupe to the other, else what the value is counted in.
    loupe, other: the two figures behind a ratio, with their units.
    """

    scenario: str
    measure: str
    against: str
    goal: Goal
    value: float
    lowest: float
    highest: float
    unit: str = "x"
    loupe: str = ""
    other: str = ""

    @property
    def verdict(self) -> str:
        return self.goal.verdict(self.value)


@dataclass(slots=True)
class Bench:
    """What a scenario is given, and where it notes what it met.

    directory: a folder of its own, empty, gone afterwards. pictures: `100k`, `3m` -> JPEG.
    """

    rounds: int
    seconds: int
    files: int
    directory: Path
    pictures: Mapping[str, Path]
    versions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def short_seconds(self) -> int:
        """For what writes half a gigabyte a second."""
        return min(self.seconds, 3)


def per_second(reading: Reading) -> float:
    return reading.per_second


def ms_each(reading: Reading) -> float:
    """Milliseconds from one answer to the next."""
    return 1000 / reading.per_second


def p99_ms(reading: Reading) -> float:
    return reading.p99_ms


Figure = Callable[[Reading], float]
FORMATS: Mapping[Figure, str] = {
    per_second: "{:,.0f}/s",
    ms_each: "{:,.2f} ms",
    p99_ms: "{:,.1f} ms",
}


def ratio(
    scenario: str,
    measure: str,
    against: str,
    goal: Goal,
    loupe: Sequence[Reading],
    other: Sequence[Reading],
    figure: Figure = per_second,
) -> Finding:
    """Loupe's figure over the other's, round by round."""
    each = [figure(ours) / figure(theirs) for ours, theirs in zip(loupe, other, strict=True)]
    shown = [
        FORMATS[figure].format(statistics.median(map(figure, readings)))
        for readings in (loupe, other)
    ]
    return Finding(
        scenario, measure, against, goal, *median_and_spread(each), loupe=shown[0], other=shown[1]
    )


def absolute(
    scenario: str, measure: str, goal: Goal, values: Sequence[float], unit: str
) -> Finding:
    return Finding(scenario, measure, "", goal, *median_and_spread(values), unit=unit)


def median_and_spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
