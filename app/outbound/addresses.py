"""Which IP addresses may be dialled.

Our own table of ranges, since no kept library fits: microsoft-antissrf has a good table but works
inside `requests` only, and httpx-secure opens a TCP connection before it checks the address.
"""

import ipaddress
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPNetwork = IPv4Network | IPv6Network

# IANA's special-purpose IPv4 registry, multicast, and Azure's host address. `ipaddress.is_global`
# misses several of these, and which ones depends on Python's version.
NEVER_DIALLED_V4 = tuple(
    IPv4Network(cidr)
    for cidr in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# All IPv6 outside the one block of global unicast is refused: ::/96, 100::/64, 5f00::/16,
# fc00::/7, fe80::/10, fec0::/10, ff00::/8 and what nobody was given yet.
GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
NEVER_DIALLED_V6 = tuple(
    IPv6Network(cidr)
    for cidr in (
        "2001::/23",
        "2001:db8::/32",
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
SIX_TO_FOUR = IPv6Network("2002::/16")
# Of the local-use NAT64 block 64:ff9b:1::/48 only the part is read where the IPv4 address can but
# stand in the last 32 bits. Elsewhere it stands where each operator chose: refused.
NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/96"))


class AddressGuard:
    """Says which IP addresses may be dialled.

    allowed: ranges that may be although they are private. An IPv4 range covers its mapped form
    (`::ffff:a.b.c.d`), the same host by the same route, but not its NAT64 and 6to4 forms, which
    leave through a gateway.
    """

    def __init__(self, allowed: Sequence[IPNetwork] = ()) -> None:
        self._allowed = tuple(allowed)

    def is_allowed(self, address: str) -> bool:
        """address: an IP address as a resolver gives it. A zone id or no address: False."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(ip, IPv4Address):
            return self._is_listed(ip) or _is_public_v4(ip)
        if ip.scope_id is not None:
            return False
        if self._is_listed(ip):
            return True
        if ip.ipv4_mapped is not None:
            return self._is_listed(ip.ipv4_mapped) or _is_public_v4(ip.ipv4_mapped)
        return _is_public_v6(ip)

    def _is_listed(self, ip: IPv4Address | IPv6Address) -> bool:
        return any(ip in network for network in self._allowed)


def _is_public_v4(ip: IPv4Address) -> bool:
    return not any(ip in network for network in NEVER_DIALLED_V4)


def _is_public_v6(ip: IPv6Address) -> bool:
    if any(ip in network for network in NAT64):
        return _is_public_v4(IPv4Address(ip.packed[12:]))
    if ip in SIX_TO_FOUR:
        return _is_public_v4(IPv4Address(ip.packed[2:6]))
    return ip in GLOBAL_UNICAST_V6 and not any(ip in network for network in NEVER_DIALLED_V6)


def literal_address(host: str) -> str | None:
    """The IP address that a resolver would read `host` as, in whatever spelling; None for a name.

    The C library takes `0`, `127.1`, `0x7f.1`, `0177.0.0.1` and `2130706433` for addresses.
    """
    host = host.removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
