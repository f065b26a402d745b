"""Both vendors' emulators in a process of their own, which ends with SIGTERM.

`python -m bench.emulators VISION REKOGNITION DELAY`: their ports, and the seconds before an answer.
A label of Vision's is named after the moment of the answer, so that whoever gets it knows its age.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process import free_port, running
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator

PREFIX = "answered at "


class _TimedVision(VisionEmulator):
    def _response_to(self, request: Any, fault: str | None) -> Any:
        self.calls.clear()  # else every picture would be kept
        self.labels = [(f"{PREFIX}{time.monotonic()}", 99.0), *self.labels[1:]]
        return super()._response_to(request, fault)


class _ForgetfulRekognition(RekognitionEmulator):
    def _await_turn(self, fault: str | None, is_gone: Any) -> None:
        self.calls.clear()
        super()._await_turn(fault, is_gone)


@dataclass(frozen=True, slots=True)
class Emulators:
    """Where both listen."""

    vision: str
    rekognition: str

    @property
    def loupe_settings(self) -> dict[str, str]:
        """Both providers on, without stored answers."""
        return {
            "LOUPE_GOOGLE_AUTO_TAGGING": "vision",
            "LOUPE_AWS_AUTO_TAGGING": "rekognition",
            "LOUPE_VISION_ENDPOINT": self.vision,
            "LOUPE_VISION_INSECURE": "true",
            "LOUPE_RESULT_TTL_DAYS": "0",
            **self.aws_settings,
        }

    @property
    def aws_settings(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_REKOGNITION": self.rekognition,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "eu-central-1",
        }


@contextmanager
def emulating(directory: Path, delay_seconds: float = 0) -> Iterator[Emulators]:
    vision, rekognition = free_port(), free_port()
    url = f"http://127.0.0.1:{rekognition}"
    with running(
        [sys.executable, "-m", "bench.emulators", *map(str, (vision, rekognition, delay_seconds))],
        log=directory / "emulators.log",
        ready_url=url,
    ):
        yield Emulators(f"127.0.0.1:{vision}", url)


def main(vision_port: str, rekognition_port: str, delay_seconds: str) -> None:
    # Before the servers' threads are made: they must not get the signal either.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with (
        _TimedVision(port=int(vision_port)) as vision,
        _ForgetfulRekognition(port=int(rekognition_port)) as rekognition,
    ):
        vision.delay_seconds = rekognition.delay_seconds = float(delay_seconds)
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main(*sys.argv[1:])
