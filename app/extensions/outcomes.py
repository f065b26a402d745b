"""How one attempt at a run can end."""

from dataclasses import dataclass

from app.extensions.provider import Reason
from app.extensions.tags import AITag


@dataclass(frozen=True, slots=True)
class Succeeded:
    """tags: already selected by the run's own limits."""

    tags: list[AITag]
    provider: str | None = None
    elapsed_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Final."""

    reason: Reason
    message: str
    provider: str | None = None
    elapsed_ms: int | None = None


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Not now; the run stays pending until its deadline."""

    reason: Reason
    message: str
    retry_after_seconds: float | None = None
    provider: str | None = None
    elapsed_ms: int | None = None


@dataclass(frozen=True, slots=True)
class NotNow:
    """No call was made, so it does not count as an attempt.

    extends_deadline: the wait does not count against the run's deadline either.
    """

    seconds: float
    reason: Reason
    message: str
    extends_deadline: bool = False
    provider: str | None = None
    elapsed_ms: int | None = None


Outcome = Succeeded | Failed | TryAgain | NotNow
