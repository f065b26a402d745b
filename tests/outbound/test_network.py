"""Names are judged where they are dialled, by every answer they have."""

import asyncio
import ipaddress

import pytest

from app.outbound.addresses import AddressGuard
from app.outbound.client import Outbound
from app.outbound.errors import BlockedAddress, OutboundReason
from app.outbound.network import Network, SystemResolver
from app.outbound.urls import check_url
from tests.emulators.receiver import Receiver
from tests.outbound.support import (
    EVERYTHING_LOCAL,
    GUARD,
    PRIVATE_V4,
    PRIVATE_V6,
    PRIVATE_WRAPPED,
    PUBLIC,
    STRICT,
    CountingDialler,
    Names,
    failure,
    names,
    post,
    run,
)


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
    network = Network(EVERYTHING_LOCAL, Names(), CountingDialler())
    with pytest.raises(BlockedAddress):
        asyncio.run(network.connect_unix_socket("/run/docker.sock"))


def test_proxies_of_the_environment_are_not_used(
    public: Receiver, canary: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, canary.url)
    assert run(post(public.url)).status_code == 200
    assert canary.connections == 0
