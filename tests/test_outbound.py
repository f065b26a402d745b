"""No URL, name or redirect reaches a private address, and no receiver holds us up or fills us.

127.0.0.2 plays the public internet: the guard lets it be reached by name and by number. A canary
listens on 127.0.0.1, which is as private as it ever was: it must see no connection.
"""

import asyncio
import contextlib
import gzip
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.outbound import (
    CHUNKS_BETWEEN_PAUSES,
    MAX_URL_LENGTH,
    AddressGuard,
    BlockedAddress,
    InvalidUrl,
    Outbound,
    OutboundError,
    OutboundReason,
    Resolver,
    SystemResolver,
    TooLarge,
    WebhookReply,
    check_url,
)
from tests.emulators import receiver as replies
from tests.emulators.receiver import Receiver

PUBLIC = "127.0.0.2"
STRICT = AddressGuard()
GUARD = AddressGuard([ipaddress.ip_network(f"{PUBLIC}/32")])
EVERYTHING_LOCAL = AddressGuard([ipaddress.ip_network("127.0.0.0/8")])
T = TypeVar("T")


@pytest.fixture
def public() -> Iterator[Receiver]:
    with Receiver(PUBLIC) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def canary() -> Iterator[Receiver]:
    with Receiver("127.0.0.1") as receiver:
        yield receiver


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


# --- addresses --------------------------------------------------------------------------------

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


@pytest.mark.parametrize("address", PRIVATE_V4 + PRIVATE_V6 + PRIVATE_WRAPPED)
def test_private_address_is_not_allowed(address: str) -> None:
    assert not STRICT.is_allowed(address)
    assert not STRICT.is_allowed(address.upper())


@pytest.mark.parametrize("address", PUBLIC_V4 + PUBLIC_V6 + PUBLIC_WRAPPED)
def test_public_address_is_allowed(address: str) -> None:
    assert STRICT.is_allowed(address)


@pytest.mark.parametrize(
    "text", ["", "localhost", "8.8.8.8.", "8.8.8", "134744072", "8.8.8.8/32", "[::1]", " 8.8.8.8"]
)
def test_what_is_no_address_is_not_allowed(text: str) -> None:
    assert not STRICT.is_allowed(text)


# As the contract lists them, independently of how the code does.
NEVER_DIALLED = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("255.255.255.255/32", "168.63.129.16/32", "::/96", "::1/128", "100::/64", "2001::/23"),
    *("2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
]


@pytest.mark.parametrize("cidr", NEVER_DIALLED)
def test_whole_range_is_refused_at_both_ends_and_in_the_middle(cidr: str) -> None:
    network = ipaddress.ip_network(cidr)
    for offset in {0, network.num_addresses // 2, network.num_addresses - 1}:
        address = network[offset]
        assert not STRICT.is_allowed(str(address))
        if isinstance(address, ipaddress.IPv4Address):
            assert not any(STRICT.is_allowed(wrap(str(address))) for wrap in WRAPPINGS)


@given(st.ip_addresses(v=4))
def test_wrapped_form_is_never_allowed_where_the_plain_one_is_not(
    address: ipaddress.IPv4Address,
) -> None:
    plain = STRICT.is_allowed(str(address))
    assert all(STRICT.is_allowed(wrap(str(address))) == plain for wrap in WRAPPINGS)
    assert not plain or address.is_global


@given(st.ip_addresses(v=6))
def test_allowed_ipv6_address_is_always_global(address: ipaddress.IPv6Address) -> None:
    if STRICT.is_allowed(str(address)):
        in_nat64 = address in ipaddress.IPv6Network("64:ff9b::/32")
        assert address.is_global or in_nat64 or address.sixtofour is not None


def test_allowed_range_opens_its_addresses_and_their_mapped_form_only() -> None:
    guard = AddressGuard([ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")])
    for address in ("10.1.2.3", mapped("10.1.2.3"), "fd12::1", "8.8.8.8"):
        assert guard.is_allowed(address)
    for address in (nat64("10.1.2.3"), six_to_four("10.1.2.3"), local_nat64("10.1.2.3")):
        assert not guard.is_allowed(address)
    for address in ("192.168.0.1", "127.0.0.1", mapped("127.0.0.1"), "fc00::1", "fd12::1%eth0"):
        assert not guard.is_allowed(address)


# --- URLs -------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS + LOOPBACK_SPELLINGS_V6 + PRIVATE_LITERALS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_private_address_in_any_spelling_is_refused_and_not_connected_to(
    canary: Receiver, scheme: str, host: str
) -> None:
    url = f"{scheme}://{host}:{canary.port}/x?y"
    with pytest.raises(InvalidUrl, match="private or reserved"):
        check_url(url, guard=STRICT)
    dialler, resolver = CountingDialler(), Names()
    for request in (post(url), fetch(url)):
        error = failure(request, guard=STRICT, dialler=dialler, resolver=resolver)
        assert error.reason == OutboundReason.BLOCKED_ADDRESS
    assert (dialler.dialled, resolver.asked, canary.connections) == ([], [], 0)


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS)
def test_spellings_do_reach_loopback_where_that_is_allowed(host: str) -> None:
    """Shows that the refusals above are the guard's doing."""
    guard = AddressGuard([ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("0.0.0.0/32")])
    with Receiver("127.0.0.1") as receiver:
        url = check_url(f"http://{host}:{receiver.port}/x", guard=guard)
        assert run(post(url), guard=guard).status_code == 200
        assert receiver.connections == 1


@pytest.mark.parametrize(
    "url",
    [
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
    ],
)  # fmt: skip
def test_hostile_url_is_refused_without_a_lookup_or_a_connection(url: str) -> None:
    with pytest.raises(InvalidUrl) as caught:
        check_url(url, guard=EVERYTHING_LOCAL)
    assert "pw" not in str(caught.value)
    dialler, resolver = CountingDialler(), Names()
    for request in (post(url), fetch(url)):
        error = failure(request, guard=EVERYTHING_LOCAL, dialler=dialler, resolver=resolver)
        assert error.reason == OutboundReason.INVALID_URL
    assert (dialler.dialled, resolver.asked) == ([], [])


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://example.com", "http://example.com"),
        ("HTTPS://Example.COM:443/A?b=c", "https://example.com/A?b=c"),
        ("http://example.com:8080/x#part", "http://example.com:8080/x"),
        ("http://example.com:1024/", "http://example.com:1024/"),
        ("https://example.com:65535/", "https://example.com:65535/"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("http://example.com:/", "http://example.com/"),
        ("https://bücher.example/ä?q=ö", "https://xn--bcher-kva.example/%C3%A4?q=%C3%B6"),
        ("http://my_host.internal/x%20y", "http://my_host.internal/x%20y"),
        ("http://host./", "http://host./"),
        ("http://localhost:3000/hook", "http://localhost:3000/hook"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://[2606:4700:4700::1111]:8443/", "http://[2606:4700:4700::1111]:8443/"),
        ("https://h/u@v?mail=a@b.c&x=:80", "https://h/u@v?mail=a@b.c&x=:80"),
        ("https://1password.com/a1.2", "https://1password.com/a1.2"),
        ("https://127.0.0.1.nip.io/", "https://127.0.0.1.nip.io/"),
    ],
)
def test_ordinary_url_is_accepted(url: str, normal: str) -> None:
    assert check_url(url, guard=STRICT) == normal
    assert check_url(normal, guard=STRICT) == normal


def test_longest_url_is_accepted() -> None:
    url = "http://example.com/".ljust(MAX_URL_LENGTH, "x")
    assert check_url(url, guard=STRICT) == url


@given(st.text(max_size=60))
def test_any_text_is_accepted_or_refused_in_one_way(text: str) -> None:
    for url in (text, f"http://{text}/", f"http://h:{text}"):
        try:
            normal = check_url(url, guard=STRICT)
        except InvalidUrl:
            continue
        assert check_url(normal, guard=STRICT) == normal


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", PRIVATE_V4 + PRIVATE_V6 + PRIVATE_WRAPPED[::3] + ["nonsense"])
def test_name_with_a_private_answer_among_public_ones_is_not_dialled(
    canary: Receiver, address: str
) -> None:
    dialler = CountingDialler()
    for answers in ([address], [PUBLIC, address], ["8.8.8.8", "2606:4700::1", address, PUBLIC]):
        error = failure(
            post(f"http://name.test:{canary.port}/"), resolver=names(name=answers), dialler=dialler
        )
        assert isinstance(error, BlockedAddress)
        assert error.reason == "blocked_address"
        assert address not in error.message
    assert (dialler.dialled, canary.connections) == ([], 0)


def test_rebinding_name_is_judged_at_every_connection(public: Receiver, canary: Receiver) -> None:
    resolver = Names({"rebinding.test": [[PUBLIC], ["127.0.0.1"]]})

    async def twice(outbound: Outbound) -> OutboundReason:
        url = check_url(f"http://rebinding.test:{public.port}/", guard=GUARD)
        assert (await outbound.post_webhook(url, b"", {})).status_code == 200
        with pytest.raises(BlockedAddress) as caught:
            await outbound.post_webhook(url.replace(str(public.port), str(canary.port)), b"", {})
        return caught.value.reason

    assert run(twice, resolver=resolver) == "blocked_address"
    assert (public.connections, canary.connections) == (1, 0)


def test_one_lookup_decides_and_its_answer_is_dialled(public: Receiver) -> None:
    """Were the name resolved again for dialling, the second answer would be used."""
    resolver = Names({"rebinding.test": [[PUBLIC], ["127.0.0.1"]]})
    dialler = CountingDialler()
    reply = run(post(public.url_for("/", "rebinding.test")), resolver=resolver, dialler=dialler)
    assert reply.status_code == 200
    assert (resolver.asked, dialler.dialled) == (["rebinding.test"], [PUBLIC])
    assert public.requests[0].headers["host"] == f"rebinding.test:{public.port}"


def test_real_resolver_is_judged_too(canary: Receiver) -> None:
    error = failure(post(f"http://localhost:{canary.port}/"), guard=STRICT)
    assert (error.reason, canary.connections) == ("blocked_address", 0)


def test_real_resolver_reaches_what_is_allowed() -> None:
    loopback = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
    with Receiver("127.0.0.1") as receiver:
        reply = run(post(receiver.url_for("/", "localhost")), guard=AddressGuard(loopback))
    assert reply.status_code == 200


def test_next_address_is_dialled_when_the_first_refuses(public: Receiver) -> None:
    guard = AddressGuard([ipaddress.ip_network("127.0.0.2/31")])
    dialler = CountingDialler()
    run(
        post(public.url_for("/", "two.test")),
        guard=guard,
        resolver=names(two=["127.0.0.3", PUBLIC]),
        dialler=dialler,
    )
    assert dialler.dialled == ["127.0.0.3", PUBLIC]
    assert len(public.requests) == 1


def test_unknown_name_is_a_dns_failure() -> None:
    assert failure(post("http://unknown.test/"), resolver=Names()).reason == "dns_failure"
    assert failure(post("http://no.test/"), resolver=names(no=[])).reason == "dns_failure"


def test_silent_name_server_ends_with_the_deadline() -> None:
    async def silent(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    error = failure(post("http://silent.test/", timeout_seconds=0.2), resolver=silent)
    assert error.reason == "timeout"


def test_system_resolver_names_each_address_once() -> None:
    async def main() -> list[str]:
        resolver = SystemResolver()
        try:
            return await resolver("localhost", 80)
        finally:
            resolver.close()

    answers = asyncio.run(main())
    assert "127.0.0.1" in answers
    assert len(set(answers)) == len(answers)


def test_unix_sockets_are_out_of_reach() -> None:
    from app.outbound import _Network

    network = _Network(EVERYTHING_LOCAL, Names(), CountingDialler())
    with pytest.raises(BlockedAddress):
        asyncio.run(network.connect_unix_socket("/run/docker.sock"))


def test_proxies_of_the_environment_are_not_used(
    public: Receiver, canary: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, canary.url)
    assert run(post(public.url)).status_code == 200
    assert canary.connections == 0


# --- webhooks ---------------------------------------------------------------------------------


def test_webhook_arrives_byte_for_byte_with_its_headers(public: Receiver) -> None:
    body = '{"name": "Bücher\\n"}'.encode()

    async def send(outbound: Outbound) -> WebhookReply:
        return await outbound.post_webhook(
            f"{public.url}/hook?a=b%20c",
            body,
            {"content-type": "application/json", "webhook-id": "evt_1"},
        )

    public.reply = replies.status(201, b"thanks", {"Retry-After": "7"})
    assert run(send) == WebhookReply(status_code=201, body=b"thanks", retry_after="7")
    [received] = public.wait_for(1)
    assert (received.method, received.path, received.body) == ("POST", "/hook?a=b%20c", body)
    assert received.headers["Webhook-Id"] == "evt_1"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["accept-encoding"] == "identity"
    assert received.json() == {"name": "Bücher\n"}


@pytest.mark.parametrize("status_code", [200, 204, 299, 301, 302, 307, 404, 410, 429, 500, 503])
def test_any_status_is_a_reply_and_no_redirect_is_followed(
    public: Receiver, canary: Receiver, status_code: int
) -> None:
    public.reply = replies.redirect(canary.url, status_code)
    assert run(post(public.url)).status_code == status_code
    assert (public.connections, canary.connections) == (1, 0)


def test_retry_after_is_handed_on_as_text(public: Receiver) -> None:
    for text in ("99999999", "-1", "junk", "Wed, 21 Oct 2026 07:28:00 GMT"):
        public.replies.append(replies.retry_after(text))
        reply = run(post(public.url))
        assert (reply.status_code, reply.retry_after) == (429, text)


def test_status_counts_when_the_body_never_ends_and_16_kib_of_it_are_kept(
    public: Receiver,
) -> None:
    public.reply = replies.endless_body()
    reply = run(post(public.url))
    assert (reply.status_code, reply.body) == (200, b"x" * 16 * 1024)


def test_long_body_is_cut_at_16_kib(public: Receiver) -> None:
    public.reply = replies.status(500, b"y" * 100_000)
    reply = run(post(public.url))
    assert (reply.status_code, reply.body) == (500, b"y" * 16 * 1024)


@pytest.mark.parametrize(
    ("reply", "beginning"),
    [
        (replies.hang_in_body(202, b"so far"), b"so far"),
        (replies.drip(202), b"x"),
        (replies.chunked([b"cut", b" off"], 202, ends=False), b"cut off"),
        (replies.wrong_length(b"short", 1000, 202), b"short"),
    ],
    ids=["hangs", "drips", "cut off", "short"],
)
def test_status_counts_when_the_body_breaks_or_hangs(
    public: Receiver, reply: replies.Reply, beginning: bytes
) -> None:
    public.reply = reply
    start = time.monotonic()
    answer = run(post(public.url, timeout_seconds=30))
    assert answer.status_code == 202
    assert answer.body.startswith(beginning)
    assert time.monotonic() - start < 15


def test_reply_is_not_inflated(public: Receiver) -> None:
    public.reply = replies.gzip_bomb()
    reply = run(post(public.url))
    assert reply.status_code == 200
    assert reply.body[:2] == b"\x1f\x8b"
    assert len(reply.body) == 16 * 1024


@pytest.mark.parametrize(
    "reply",
    [
        replies.close_early(),
        replies.huge_header(),
        replies.continue_flood(),
        replies.raw(b"SSH-2.0-OpenSSH_9.9\r\n"),
        replies.raw(b"HTTP/1.1 2x0 OK\r\n\r\n"),
        replies.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
        replies.raw(b"HTTP/1.1 200 OK\r\nX: " + b"\r\n"),
        replies.raw(b"\x15\x03\x01\x00\x02\x02\x46"),
    ],
    ids=["close", "huge header", "100 flood", "ssh", "status", "lengths", "unfinished", "tls"],
)
def test_answer_that_is_no_http_is_a_protocol_error(public: Receiver, reply: replies.Reply) -> None:
    public.reply = reply
    assert failure(post(public.url)).reason == "protocol_error"


def test_receiver_that_says_nothing_ends_with_the_deadline(public: Receiver) -> None:
    public.reply = replies.hang()
    start = time.monotonic()
    assert failure(post(public.url, timeout_seconds=0.3)).reason == "timeout"
    assert time.monotonic() - start < 10


def test_receiver_that_drips_its_header_ends_with_the_deadline(public: Receiver) -> None:
    def drip_header(line: replies.Line) -> None:
        line.send(b"HTTP/1.1 200 OK\r\nX: ")
        while line.goes_on:
            line.send(b"x")
            line.wait(0.02)

    public.reply = drip_header
    assert failure(post(public.url, timeout_seconds=0.3)).reason == "timeout"


def test_receiver_that_does_not_read_ends_with_the_deadline() -> None:
    with socket.create_server((PUBLIC, 0)) as deaf:
        url = f"http://{PUBLIC}:{deaf.getsockname()[1]}/"
        error = failure(post(url, bytes(20_000_000), timeout_seconds=0.5))
    assert error.reason == "timeout"


def test_closed_port_is_a_connect_failure(public: Receiver) -> None:
    with socket.create_server((PUBLIC, 0)) as closed:
        url = f"http://{PUBLIC}:{closed.getsockname()[1]}/"
    assert failure(post(url)).reason == "connect_failure"


def test_twenty_at_once_each_get_their_own_answer(public: Receiver) -> None:
    for number in range(20):
        public.on(f"/{number}", replies.slow(0.05, replies.status(200, str(number).encode())))

    async def all_at_once(outbound: Outbound) -> list[WebhookReply]:
        return await asyncio.gather(
            *(outbound.post_webhook(f"{public.url}/{n}", b"{}", {}) for n in range(20))
        )

    assert [reply.body for reply in run(all_at_once)] == [str(n).encode() for n in range(20)]


def test_cancelled_request_closes_its_connection(public: Receiver) -> None:
    """A socket left open would end this as a ResourceWarning."""
    public.reply = replies.hang()

    async def cancel(outbound: Outbound) -> None:
        sending = asyncio.create_task(outbound.post_webhook(public.url, b"{}", {}))
        await asyncio.to_thread(public.wait_for, 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    run(cancel)


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture
def secure() -> Iterator[Receiver]:
    with Receiver(PUBLIC, tls=True, names=["secure.test"]) as receiver:
        yield receiver


def test_certificate_is_checked_against_the_name_and_not_the_address(secure: Receiver) -> None:
    trusting = ssl.create_default_context(cadata=secure.certificate_pem)
    resolver = names(secure=[PUBLIC], other=[PUBLIC])
    url = secure.url_for("/x", "secure.test")
    assert run(post(url), resolver=resolver, ssl_context=trusting).status_code == 200
    assert secure.requests[0].headers["host"] == f"secure.test:{secure.port}"
    other = secure.url_for("/x", "other.test")
    error = failure(post(other), resolver=resolver, ssl_context=trusting)
    assert error.reason == "tls_failure"


def test_self_signed_certificate_is_refused(secure: Receiver) -> None:
    error = failure(post(secure.url_for("/", "secure.test")), resolver=names(secure=[PUBLIC]))
    assert (error.reason, secure.requests) == ("tls_failure", [])


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_other_than_tls_behind_an_https_url_is_a_tls_failure(answer: bytes) -> None:
    def speak(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    with socket.create_server((PUBLIC, 0)) as listener:
        listener.settimeout(20)
        speaking = threading.Thread(target=speak, args=[listener])
        speaking.start()
        error = failure(post(f"https://{PUBLIC}:{listener.getsockname()[1]}/"))
        speaking.join()
    assert error.reason == "tls_failure"


def test_silent_tls_handshake_ends_with_the_deadline_and_leaves_no_socket() -> None:
    with socket.create_server((PUBLIC, 0)) as deaf:
        url = f"https://{PUBLIC}:{deaf.getsockname()[1]}/"
        assert failure(post(url, timeout_seconds=0.3)).reason == "timeout"


# --- downloads --------------------------------------------------------------------------------


def test_file_is_fetched_whole(public: Receiver) -> None:
    content = bytes(range(256)) * 1000
    url = public.serve("/picture.jpg", content, "image/jpeg")
    assert run(fetch(url)) == content
    [received] = public.requests
    assert (received.method, received.body) == ("GET", b"")
    assert received.headers["accept-encoding"] == "identity"
    assert "content-length" not in received.headers


def test_file_in_many_tiny_chunks_is_fetched_whole(public: Receiver) -> None:
    public.reply = replies.chunked([b"x"] * 5000)
    assert run(fetch(public.url)) == b"x" * 5000


def test_three_redirects_are_followed(public: Receiver) -> None:
    public.on("/a", replies.redirect("/b", 301))
    public.on("/b", replies.redirect(f"//hop.test:{public.port}/c?q#part", 307))
    public.on("/c", replies.redirect(public.url_for("/d"), 308))
    public.serve("/d", b"here")
    assert run(fetch(public.url_for("/a")), resolver=names(hop=[PUBLIC])) == b"here"
    assert [received.path for received in public.requests] == ["/a", "/b", "/c?q", "/d"]


def test_fourth_redirect_is_refused(public: Receiver) -> None:
    for hop in range(4):
        public.on(f"/{hop}", replies.redirect(f"/{hop + 1}"))
    public.serve("/4", b"too far")
    assert failure(fetch(public.url_for("/0"))).reason == "redirect_refused"
    assert len(public.requests) == 4


def test_redirect_loop_is_refused(public: Receiver) -> None:
    url = public.on("/loop", replies.redirect("/loop"))
    assert failure(fetch(url)).reason == "redirect_refused"
    assert len(public.requests) == 4


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS[:15] + LOOPBACK_SPELLINGS_V6 + ["inside.test"])
def test_redirect_to_a_private_address_is_not_followed(
    public: Receiver, canary: Receiver, host: str
) -> None:
    public.reply = replies.redirect(f"http://{host}:{canary.port}/secret")
    error = failure(fetch(public.url), resolver=names(inside=["127.0.0.1"]))
    assert error.reason == "blocked_address"
    assert (public.connections, canary.connections) == (1, 0)


@pytest.mark.parametrize(
    "location",
    [
        *("file:///etc/passwd", "gopher://h/", "ftp://h/x", "data:text/plain,x", "javascript:x"),
        *("http://user:pw@h/", "//user@h/", "http://h:22/", "http://h:x/", "http://h:0/"),
        *("\\\\127.0.0.1\\x", "/a b", "http://h\\@127.0.0.1/", "http://[::1", "//%31%32%37.1/"),
    ],
)
def test_redirect_to_what_is_no_plain_http_url_is_refused(public: Receiver, location: str) -> None:
    public.reply = replies.redirect(location)
    resolver = Names()
    assert failure(fetch(public.url), resolver=resolver).reason == "redirect_refused"
    assert (public.connections, resolver.asked) == (1, [])


@pytest.mark.parametrize("status_code", [206, 300, 302, 304, 400, 401, 403, 404, 410, 500, 503])
def test_status_that_brings_no_whole_file_is_an_error(public: Receiver, status_code: int) -> None:
    public.reply = status_code
    error = failure(fetch(public.url))
    assert (error.reason, error.message) == (
        "http_status",
        "The host answered with an error status.",
    )


def test_file_of_exactly_the_cap_is_taken(public: Receiver) -> None:
    assert len(run(fetch(public.serve("/x", bytes(1000)), max_bytes=1000))) == 1000


def test_declared_length_beyond_the_cap_is_refused_before_reading(public: Receiver) -> None:
    public.reply = replies.hang_in_body(200, bytes(500))
    error = failure(fetch(public.url, max_bytes=1000, total_seconds=30))
    assert isinstance(error, TooLarge)
    assert error.reason == "too_large"


@pytest.mark.parametrize(
    "reply",
    [replies.endless_body(), replies.chunked([bytes(700), bytes(700)])],
    ids=["endless", "chunked"],
)
def test_undeclared_length_beyond_the_cap_is_refused(
    public: Receiver, reply: replies.Reply
) -> None:
    public.reply = reply
    assert isinstance(failure(fetch(public.url, max_bytes=1000)), TooLarge)


def test_no_more_than_the_cap_is_ever_handed_on(public: Receiver) -> None:
    public.reply = replies.endless_body()

    async def count(outbound: Outbound) -> int:
        size_bytes = 0
        with contextlib.suppress(TooLarge):
            async with outbound.fetch(public.url, max_bytes=300_000) as chunks:
                async for chunk in chunks:
                    size_bytes += len(chunk)
        return size_bytes

    assert 0 < run(count) <= 300_000


@pytest.mark.parametrize(
    "reply",
    [
        replies.wrong_length(b"short", 1000),
        replies.chunked([b"cut", b"off"], ends=False),
        replies.close_early(),
        replies.huge_header(),
        replies.continue_flood(),
        replies.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        replies.status(200, gzip.compress(bytes(1000)), {"Content-Encoding": "gzip"}),
        replies.status(200, b"x", {"Content-Encoding": "identity, br"}),
    ],
    ids=["short", "cut off", "close", "huge header", "100 flood", "chunk", "gzip", "br"],
)
def test_broken_or_encoded_answer_is_an_error(public: Receiver, reply: replies.Reply) -> None:
    public.reply = reply
    assert failure(fetch(public.url)).reason == "protocol_error"


def test_bytes_beyond_the_declared_length_are_not_taken(public: Receiver) -> None:
    public.reply = replies.wrong_length(b"four and more", 4)
    assert run(fetch(public.url)) == b"four"


def test_header_deadline_holds_for_all_hops_together(public: Receiver) -> None:
    public.reply = replies.slow(0.4, replies.redirect("/next"))
    start = time.monotonic()
    error = failure(fetch(public.url, header_seconds=0.6))
    assert (error.reason, len(public.requests)) == ("timeout", 2)
    assert time.monotonic() - start < 8


def test_dripping_file_ends_with_the_total_deadline(public: Receiver) -> None:
    public.reply = replies.drip()
    assert failure(fetch(public.url, total_seconds=0.5)).reason == "timeout"


def test_header_deadline_does_not_end_a_slow_body(public: Receiver) -> None:
    public.reply = replies.chunked(_slowly([b"a", b"b", b"c"], pause_seconds=0.3))
    assert run(fetch(public.url, header_seconds=0.5)) == b"abc"


def _slowly(chunks: Iterable[bytes], pause_seconds: float) -> Iterator[bytes]:
    for chunk in chunks:
        time.sleep(pause_seconds)
        yield chunk


def test_download_left_early_closes_its_connection(public: Receiver) -> None:
    public.reply = replies.endless_body()

    async def first_chunk(outbound: Outbound) -> bytes:
        async with outbound.fetch(public.url, max_bytes=10_000_000) as chunks:
            async for chunk in chunks:
                return chunk
        return b""

    assert run(first_chunk).startswith(b"x")


def test_error_of_the_reader_passes_through_unchanged(public: Receiver) -> None:
    public.serve("/", b"content")

    async def fail(outbound: Outbound) -> None:
        async with outbound.fetch(public.url_for("/"), max_bytes=100):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(fail)


def test_many_tiny_chunks_leave_the_event_loop_to_others(public: Receiver) -> None:
    body = b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n"
    public.reply = replies.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    chunks_in_turn: list[int] = [0]

    async def take_turns() -> None:
        while True:
            chunks_in_turn.append(0)
            await asyncio.sleep(0)

    async def read(outbound: Outbound) -> None:
        others = asyncio.create_task(take_turns())
        async with outbound.fetch(public.url, max_bytes=10_000) as chunks:
            async for _ in chunks:
                chunks_in_turn[-1] += 1
        others.cancel()

    run(read)
    assert sum(chunks_in_turn) == 10_000
    assert max(chunks_in_turn) <= CHUNKS_BETWEEN_PAUSES


# --- logs and messages ------------------------------------------------------------------------


def test_no_credential_query_or_address_is_logged_or_said(
    public: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(post(f"{public.url}/hook?token=hunter2"))
    said = [
        failure(post("http://me:hunter2@name.test/?hunter2"), resolver=Names()),
        failure(fetch("http://unknown.test/?hunter2"), resolver=Names()),
        failure(fetch("http://name.test/?hunter2"), resolver=names(name=["10.20.30.40"])),
    ]
    for text in [caplog.text, *(error.message for error in said)]:
        assert "hunter2" not in text
        assert "10.20.30.40" not in text


def test_every_reason_has_a_sentence() -> None:
    for reason in OutboundReason:
        message = OutboundError(reason).message
        assert message[0].isupper()
        assert message.count(".") == 1
        assert message.endswith(".")
