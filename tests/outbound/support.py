"""No URL, name or redirect reaches a private address, and no receiver holds us up or fills us.

127.0.0.2 plays the public internet: the guard lets it be reached by name and by number. A canary
listens on 127.0.0.1, which is as private as it ever was: it must see no connection.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import httpcore
import pytest

from app.outbound.addresses import AddressGuard
from app.outbound.client import Outbound, WebhookReply
from app.outbound.errors import OutboundError
from app.outbound.network import Resolver

PUBLIC = "127.0.0.2"
STRICT = AddressGuard()
GUARD = AddressGuard([ipaddress.ip_network(f"{PUBLIC}/32")])
EVERYTHING_LOCAL = AddressGuard([ipaddress.ip_network("127.0.0.0/8")])
T = TypeVar("T")


@dataclass
class Names:
    """A resolver with the answers it is given: one list per question, the last one for ever."""

    answers: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        left = self.answers.get(host)
        if not left:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return left.pop(0) if len(left) > 1 else left[0]


def names(**answers: Sequence[str]) -> Names:
    return Names({f"{name}.test": [list(addresses)] for name, addresses in answers.items()})


class CountingDialler(httpcore.AnyIOBackend):
    """Dials for real, and remembers every address it was asked for."""

    def __init__(self) -> None:
        self.dialled: list[str] = []

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as in httpcore
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        return await super().connect_tcp(host, port, timeout, local_address, socket_options)


def run(
    request: Callable[[Outbound], Awaitable[T]],
    *,
    guard: AddressGuard = GUARD,
    resolver: Resolver | None = None,
    dialler: httpcore.AsyncNetworkBackend | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> T:
    async def main() -> T:
        async with Outbound(
            guard, resolver=resolver, dialler=dialler, ssl_context=ssl_context or PLAIN
        ) as outbound:
            return await request(outbound)

    return asyncio.run(main())


PLAIN = ssl.create_default_context()


def post(url: str, body: bytes = b"{}", **options: float) -> Callable[..., Awaitable[WebhookReply]]:
    seconds = options.get("timeout_seconds", 20.0)
    return lambda outbound: outbound.post_webhook(
        url, body, {"content-type": "application/json"}, timeout_seconds=seconds
    )


def fetch(
    url: str, max_bytes: int = 1_000_000, header_seconds: float = 8, total_seconds: float = 60
) -> Callable[[Outbound], Awaitable[bytes]]:
    async def read(outbound: Outbound) -> bytes:
        async with outbound.fetch(
            url,
            max_bytes=max_bytes,
            header_timeout_seconds=header_seconds,
            total_timeout_seconds=total_seconds,
        ) as chunks:
            return b"".join([chunk async for chunk in chunks])

    return read


def failure(request: Callable[[Outbound], Awaitable[object]], **options: object) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        run(request, **options)  # type: ignore[arg-type]
    assert str(caught.value) == caught.value.message
    return caught.value


PRIVATE_V4 = [
    *("0.0.0.0", "0.0.0.1", "0.255.255.255", "10.0.0.0", "10.1.2.3", "10.255.255.255"),
    *("100.64.0.0", "100.100.100.200", "100.127.255.255", "127.0.0.1", "127.255.255.255"),
    *("168.63.129.16", "169.254.0.0", "169.254.169.254", "169.254.170.2", "169.254.255.255"),
    *("172.16.0.0", "172.31.255.255", "192.0.0.0", "192.0.0.8", "192.0.0.192", "192.0.0.255"),
    *("192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.0.0"),
    *("192.168.255.255", "192.175.48.1", "198.18.0.0", "198.19.255.255", "198.51.100.7"),
    *("203.0.113.255", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
]
PUBLIC_V4 = [
    *("1.0.0.0", "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255"),
    *("100.128.0.0", "126.255.255.255", "128.0.0.0", "168.63.129.15", "168.63.129.17"),
    *("169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0"),
    *("192.0.3.0", "192.88.98.1", "192.88.100.1", "192.167.255.255", "192.169.0.0"),
    *("198.17.255.255", "198.20.0.0", "198.51.99.1", "198.51.101.1", "203.0.112.1"),
    *("203.0.114.1", "223.255.255.255"),
]
PRIVATE_V6 = [
    *("::", "::1", "::2", "::7f00:1", "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1"),
    *("64:ff9b:1:7f00:0:100::", "64:ff9b:1:808:8:800::", "64:ff9b:1:1::808:808"),
    *("64:ff9b:1:ffff:ffff:ffff:ffff:ffff", "64:ff9b:2::808:808", "100::", "100::1"),
    *("100:0:0:1::1", "200::1", "1000::1", "1fff:ffff::1", "2001::1"),
    *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:10::1", "2001:20::1"),
    *("2001:1ff:ffff::1", "2001:db8::1", "2001:db8:ffff::1", "2620:4f:8000::1", "3fff::1"),
    *("3fff:fff:ffff::1", "4000::1", "5f00::1", "8000::1", "fc00::1", "fd00:ec2::254"),
    *("fdff::1", "fe00::1", "fe80::1", "febf::1", "fec0::1", "feff::1", "ff02::1", "ff0e::1"),
    *("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fe80::1%lo", "2a00:1450::1%eth0"),
]
PUBLIC_V6 = [
    *("2001:200::1", "2001:4860:4860::8888", "2606:4700:4700::1111", "2a00:1450:4001::5"),
    *("2003::1", "2001:db7:ffff::1", "2001:db9::1", "3ffe:ffff::1", "3fff:1000::1"),
]


def mapped(address: str) -> str:
    return f"::ffff:{address}"


def nat64(address: str) -> str:
    return f"64:ff9b::{address}"


def local_nat64(address: str) -> str:
    return f"64:ff9b:1::{address}"


def six_to_four(address: str) -> str:
    high, low = divmod(int(ipaddress.IPv4Address(address)), 65536)
    return f"2002:{high:x}:{low:x}::1"


WRAPPINGS = (mapped, nat64, local_nat64, six_to_four)
PRIVATE_WRAPPED = [wrap(address) for wrap in WRAPPINGS for address in PRIVATE_V4]
PUBLIC_WRAPPED = [wrap(address) for wrap in WRAPPINGS for address in PUBLIC_V4]

LOOPBACK_SPELLINGS = [
    *("127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "0x0", "00", "2130706433", "0x7f000001"),
    *("0x7f.1", "0x7F.0.0.1", "0177.0x0.1", "017700000001", "127.0.0.1."),
    *("127。0。0。1", "127．0．0．1", "127｡0｡0｡1", "0X7F.1"),
]
LOOPBACK_SPELLINGS_V6 = [
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::FFFF:7F00:1]", "[::127.0.0.1]", "[0:0:0:0:0:ffff:7f00:0001]"),
]
PRIVATE_LITERALS = [
    *("10.0.0.1", "169.254.169.254", "0251.0376.43518", "0xa9fea9fe", "2852039166"),
    *("168.63.129.16", "192.168.0.1", "192.168.1", "100.64.0.1", "224.0.0.1", "255.255.255.255"),
    *("[64:ff9b::a9fe:a9fe]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[fec0::1]"),
    *("[fe80::1]", "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[::ffff:a9fe:a9fe]"),
    *("[64:ff9b:1::7f00:1]", "[2001:db8::1]", "[100::1]"),
]


# As the contract lists them, independently of how the code does.
NEVER_DIALLED = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("255.255.255.255/32", "168.63.129.16/32", "::/96", "::1/128", "100::/64", "2001::/23"),
    *("2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
]
# Whose IPv4 address is what counts. At both ends of each it is one that is never dialled.
UNWRAPPED = ["::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16"]


def ends(cidrs: Sequence[str]) -> list[str]:
    """The first and the last address of each range."""
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    return list(dict.fromkeys(str(network[end]) for network in networks for end in (0, -1)))


# fmt: off
HOSTILE_URLS = [
    *("", "x", "/relative", "//host/x", "http:", "http:/host", "http:///x", "http://", "https://?x"),
    *("javascript:alert(1)", "ftp://h/x", "file:///etc/passwd", "gopher://h/", "data:,x"),
    *("ws://h/", "httpx://h/", "http+unix://h/", "jar:http://h/", "view-source:http://h/"),
    *("http://user@h/", "http://user:pw@h/", "http://@h/", "http://:@h/", "http://h@/"),
    *("http://8.8.8.8@127.0.0.1/", "http://h:80@127.0.0.1/", "http://a%40b@h/"),
    *("http://h/ x", " http://h/", "http://h/\n", "http://h\t/", "http://h/\x00", "http://h/\x7f"),
    *("http://h/\x85", "http://h/\xa0", "http://h/\u2028", "http://h\\@127.0.0.1/", "http://h\\x"),
    *("http:\\\\h\\", "http://h/\ud800", "http://a b/", "http://h/\r\nX: y", "ht\ntp://h/"),
    *("http://-h/", "http://h-/", "http://a..b/", "http://.h/", "http://./", "http://h../"),
    *("http://a,b/", "http://a%00b/", "http://%31%32%37.0.0.1/", "http://h%2f@x/", "http://*/"),
    *("http://xn--/", "http://①②⑦.⓪.⓪.①/", "http://１２７.0.0.1/", "http://ⅷ.test/"),
    *("http://1.2.3.4.5/", "http://256.256.256.256/", "http://1.2.3.08/", "http://a.0x/"),
    *("http://0177.0.0.1/", "http://0251.0376.0251.0376/", "http://127.0.0.01/"),
    *("http://4294967296/", "http://h.127/", "http://1.2.3.0x1g.5/", "http://0x100000000/"),
    *("http://[::1/", "http://::1/", "http://[v1.a]/", "http://[::1]x/", "http://[]/"),
    *("http://[fe80::1%25lo]/", "http://[fe80::1%lo]/", "http://[::1%25]/", "http://[1.2.3.4]/"),
    *("http://h:0/", "http://h:22/", "http://h:79/", "http://h:81/", "http://h:1023/"),
    *("http://h:65536/", "http://h:99999/", "http://h:-80/", "http://h:+80/", "http://h:８０/"),
    *("http://h:80:80/", "http://h:8_0/", "http://h:0x50/", "http://h:080000/", "http://[::1]:x/"),
    *(f"http://{'a' * 64}.test/", f"http://{'a.' * 130}test/", "http://h/" + "x" * 2040),
    *("http://h/" + "ä" * 1000, "http://h/" + "x" * 10_240),
]
# fmt: on

HOSTILE_LOCATIONS = [
    *("file:///etc/passwd", "gopher://h/", "ftp://h/x", "data:text/plain,x", "javascript:x"),
    *("http://user:pw@h/", "//user@h/", "http://h:22/", "http://h:x/", "http://h:0/"),
    *("\\\\127.0.0.1\\x", "/a b", "http://h\\@127.0.0.1/", "http://[::1", "//%31%32%37.1/"),
]
