"""Which URLs are accepted, and that the others reach nobody."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.outbound.addresses import AddressGuard
from app.outbound.errors import OutboundReason
from app.outbound.urls import MAX_URL_LENGTH, InvalidUrl, check_url
from tests.emulators.receiver import Receiver
from tests.outbound.support import (
    EVERYTHING_LOCAL,
    HOSTILE_URLS,
    LOOPBACK_SPELLINGS,
    LOOPBACK_SPELLINGS_V6,
    PRIVATE_LITERALS,
    STRICT,
    CountingDialler,
    Names,
    failure,
    fetch,
    post,
    run,
)


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


@pytest.mark.parametrize("url", HOSTILE_URLS)
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
