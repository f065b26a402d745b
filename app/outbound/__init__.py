"""The only maker of HTTP connections to addresses that callers name: webhooks, uploads by URL.

Whoever may name a URL must not reach through us what only this machine can reach. So an address
is judged where a connection is made: the name is resolved there, every answer must be allowed,
and a checked answer is dialled. Redirects and re-bound names meet the same check.

Built on httpcore, the transport under httpx, since it takes a network backend and has no more
than is wanted: no cookies shared between receivers, no proxies from the environment, no decoding
of bodies, no log line with the URL. Each request has a connection of its own.
"""

from app.outbound.addresses import AddressGuard
from app.outbound.client import Outbound, WebhookReply
from app.outbound.errors import OutboundError, OutboundReason, TooLarge
from app.outbound.urls import InvalidUrl, check_url

__all__ = [
    "AddressGuard",
    "InvalidUrl",
    "Outbound",
    "OutboundError",
    "OutboundReason",
    "TooLarge",
    "WebhookReply",
    "check_url",
]
