"""The process's own time: wall time at start plus monotonic time since, so that a wall clock
that is set back or forward neither bursts nor stalls anything that is due."""

import time
from datetime import UTC, datetime, timedelta


class Clock:
    def __init__(self) -> None:
        self._started_at = datetime.now(UTC)
        self._started_monotonic = time.monotonic()

    def now(self) -> datetime:
        """For leases and schedules."""
        return self._started_at + timedelta(seconds=time.monotonic() - self._started_monotonic)

    def wall(self) -> datetime:
        """For what other machines compare with their own clocks: signatures and expiry."""
        return datetime.now(UTC)
