"""What the emulated vendors have in common: how a test says what they answer, and sees what came.

vendor.labels = [("Cat", 98.5)]     # percent, with both vendors
vendor.labels_of = function           # of the image's bytes, in place of `labels`
vendor.faults.extend(["throttle"])  # one call each, in order; then `fault`, which stands
vendor.fault_of = function            # of the image's bytes, called once for each call
vendor.delay_seconds = 0.2          # before every reply
vendor.hold(); ...; vendor.release()  # no reply leaves in between
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Call:
    """at_seconds: time.monotonic(). parameters: of the request, without the image."""

    at_seconds: float
    image: bytes
    parameters: dict[str, object] = field(default_factory=dict)


class Script:
    """Thread-safe as far as tests need: they write, the server's threads read.

    fault: stands for every call that finds no one-shot fault in `faults`. None: answers well.
    fault_of: says which fault a call gets that would have none; one call at a time.
    retry_after: seconds, sent beside any error that the vendor reports.
    reply: raw bytes of a whole successful reply, sent in place of `labels`.
    gate: replies pass while it is set.
    """

    def __init__(self) -> None:
        self.labels: list[tuple[str, float]] = [("Cat", 98.5), ("Animal", 97.25)]
        self.delay_seconds = 0.0
        self.labels_of: Callable[[bytes], list[tuple[str, float]]] = lambda image: self.labels
        self.fault_of: Callable[[bytes], str | None] = lambda image: None
        self.faults: deque[str] = deque()
        self.fault: str | None = None
        self.retry_after: float | None = None
        self.reply: bytes | None = None
        self.calls: list[Call] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._releases = 0

    def hold(self) -> None:
        """Lets no reply pass until `release()`."""
        self.gate.clear()

    def release(self) -> None:
        """Lets replies pass. Calls that hang end too."""
        self._releases += 1
        self.gate.set()

    def wait_for_calls(self, count: int, *, timeout_seconds: float = 10) -> None:
        """Returns when `count` calls have come in all. Raises TimeoutError."""
        self._wait_until(lambda: len(self.calls) >= count, timeout_seconds)

    def wait_until_idle(self, *, timeout_seconds: float = 10) -> None:
        """Returns when no call is in flight. Raises TimeoutError."""
        self._wait_until(lambda: self.in_flight == 0, timeout_seconds)

    def _wait_until(self, condition: Callable[[], bool], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_LOOK_SECONDS)

    # For the servers

    @contextmanager
    def _received(self, call: Call) -> Iterator[str | None]:
        """Counts the call while it is in flight, and says which fault is its own."""
        with self._lock:
            self.calls.append(call)
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            fault = self.faults.popleft() if self.faults else self.fault
            fault = fault or self.fault_of(call.image)
        try:
            yield fault
        finally:
            with self._lock:
                self.in_flight -= 1

    def _await_turn(self, fault: str | None, is_gone: Callable[[], bool]) -> None:
        """Returns when the reply may leave, the client has gone or the server is closing."""
        releases = self._releases
        self._closing.wait(self.delay_seconds)
        while not self._closing.is_set() and not is_gone():
            hangs = fault == "hang" and self._releases == releases
            if not hangs and self.gate.wait(_LOOK_SECONDS):
                return
            if hangs:
                self._closing.wait(_LOOK_SECONDS)

    def _end(self) -> None:
        self._closing.set()
        self.release()
