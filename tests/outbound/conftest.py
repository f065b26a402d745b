"""Receivers that play the public internet and what is private."""

from collections.abc import Iterator

import pytest

from tests.emulators.receiver import Receiver
from tests.outbound.support import (
    PUBLIC,
)


@pytest.fixture
def public() -> Iterator[Receiver]:
    with Receiver(PUBLIC) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def canary() -> Iterator[Receiver]:
    with Receiver("127.0.0.1") as receiver:
        yield receiver
