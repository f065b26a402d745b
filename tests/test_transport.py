"""Writes of an answer: in pairs, in order, and never kept for longer than a turn of the loop."""

import asyncio
from collections.abc import Iterable
from typing import Any, cast

from app.transport import PairingTransport


class Sink:
    """Stands for the event loop's transport: what it was given, one entry for each time."""

    def __init__(self) -> None:
        self.writes: list[list[bytes]] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.writes.append([data])

    def writelines(self, pieces: Iterable[bytes]) -> None:
        assert not self.is_closed
        self.writes.append(list(pieces))

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def pairing(sink: Sink) -> PairingTransport:
    return PairingTransport(cast(Any, sink), asyncio.get_running_loop())


def test_a_header_and_its_body_leave_together_and_at_once() -> None:
    async def write() -> list[list[bytes]]:
        transport = pairing(sink := Sink())
        transport.write(b"header")
        assert sink.writes == []
        transport.write(b"body")
        return sink.writes

    assert asyncio.run(write()) == [[b"header", b"body"]]


def test_what_comes_alone_leaves_in_the_next_turn() -> None:
    async def write() -> list[list[bytes]]:
        transport = pairing(sink := Sink())
        transport.write(b"header")
        await asyncio.sleep(0)
        transport.write(b"body")
        await asyncio.sleep(0)
        return sink.writes

    assert asyncio.run(write()) == [[b"header"], [b"body"]]


def test_many_writes_in_one_turn_keep_their_order_and_one_waits_at_most() -> None:
    async def write() -> list[list[bytes]]:
        transport = pairing(sink := Sink())
        for piece in (b"1", b"2", b"3", b"4", b"5"):
            transport.write(piece)
        assert sink.writes == [[b"1", b"2"], [b"3", b"4"]]
        await asyncio.sleep(0)
        return sink.writes

    assert asyncio.run(write()) == [[b"1", b"2"], [b"3", b"4"], [b"5"]]


def test_closing_sends_what_waits() -> None:
    async def write() -> Sink:
        transport = pairing(sink := Sink())
        transport.write(b"header")
        transport.close()
        await asyncio.sleep(0)
        return sink

    sink = asyncio.run(write())
    assert (sink.writes, sink.is_closed) == ([[b"header"]], True)


def test_nothing_is_sent_to_who_has_gone() -> None:
    async def write() -> Sink:
        transport = pairing(sink := Sink())
        transport.write(b"header")
        sink.is_closed = True
        await asyncio.sleep(0)
        transport.close()
        return sink

    assert asyncio.run(write()).writes == []


def test_all_else_is_the_transport_s_own() -> None:
    async def ask() -> str:
        return str(pairing(Sink()).get_extra_info("peername"))

    assert asyncio.run(ask()) == "the peername"
