"""Why requests fail, in words that a user may read."""

import enum


class OutboundReason(enum.StrEnum):
    """Why a request failed. Stable: users match on these."""

    BLOCKED_ADDRESS = "blocked_address"
    DNS_FAILURE = "dns_failure"
    CONNECT_FAILURE = "connect_failure"
    TLS_FAILURE = "tls_failure"
    TIMEOUT = "timeout"
    PROTOCOL_ERROR = "protocol_error"
    INVALID_URL = "invalid_url"
    # Of downloads only.
    HTTP_STATUS = "http_status"
    REDIRECT_REFUSED = "redirect_refused"
    TOO_LARGE = "too_large"


_MESSAGES = {
    OutboundReason.BLOCKED_ADDRESS: "The host has a private or reserved address.",
    OutboundReason.DNS_FAILURE: "The host's name could not be resolved.",
    OutboundReason.CONNECT_FAILURE: "No connection to the host could be made.",
    OutboundReason.TLS_FAILURE: "No secure connection to the host could be made.",
    OutboundReason.TIMEOUT: "The host did not answer in time.",
    OutboundReason.PROTOCOL_ERROR: "The host's answer was broken or incomplete.",
    OutboundReason.INVALID_URL: "The URL is not valid.",
    OutboundReason.HTTP_STATUS: "The host answered with an error status.",
    OutboundReason.REDIRECT_REFUSED: "The URL redirects too often, or to where it may not.",
    OutboundReason.TOO_LARGE: "The file at the URL is larger than allowed.",
}


class OutboundError(Exception):
    """A request that failed.

    message: one sentence that users may read. It names the kind of cause and nothing that the
    resolver or the other side told us, which would make us a way to look into a private network.
    """

    def __init__(self, reason: OutboundReason, message: str | None = None) -> None:
        self.reason = reason
        self.message = message or _MESSAGES[reason]
        super().__init__(self.message)


class BlockedAddress(OutboundError):
    """The name has an answer that may not be dialled. Nothing was connected to."""

    def __init__(self) -> None:
        super().__init__(OutboundReason.BLOCKED_ADDRESS)


class TooLarge(OutboundError):
    """The body is declared, or turned out to be, longer than the caller takes."""

    def __init__(self) -> None:
        super().__init__(OutboundReason.TOO_LARGE)
