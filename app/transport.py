"""An answer leaves in one write: uvicorn writes its header, then its body, and for each the system
would send a packet and wake the client, which can do nothing with a header alone."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class OneWriteProtocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        pairing: Any = PairingTransport(transport, self.loop)
        super().connection_made(pairing)


class PairingTransport:
    """Holds a write back until the next one, which goes with it, or the event loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._held is None:
            self._held = data
            self._loop.call_soon(self._release)
        else:
            self._transport.writelines((self._held, data))
            self._held = None

    def _release(self) -> None:
        if self._held is not None and not self.is_closing():
            self._transport.write(self._held)
        self._held = None

    def close(self) -> None:
        self._release()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
