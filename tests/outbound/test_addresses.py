"""Which addresses may be dialled, plain and wrapped."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.outbound.addresses import AddressGuard
from tests.outbound.support import (
    NEVER_DIALLED,
    PRIVATE_V4,
    PRIVATE_V6,
    PRIVATE_WRAPPED,
    PUBLIC_V4,
    PUBLIC_V6,
    PUBLIC_WRAPPED,
    STRICT,
    WRAPPINGS,
    local_nat64,
    mapped,
    nat64,
    six_to_four,
)


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
