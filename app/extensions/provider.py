"""What a provider is: our adapter to one vendor's (or our own) labelling of a picture."""

import enum
from dataclasses import dataclass
from typing import ClassVar, Protocol

from pydantic_settings import BaseSettings

from app.images import ImagePool, ProviderCopy


@dataclass(frozen=True, slots=True)
class Label:
    """One label as the vendor gave it. confidence: percent, 0-100, unrounded."""

    name: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A provider's whole answer. model_version: as the vendor names it, if it does."""

    labels: list[Label]
    model_version: str | None = None


class Reason(enum.StrEnum):
    """Why a run has not succeeded. Stable: users match on these."""

    # Tried again in the background, final only after the deadline.
    TIMEOUT = "provider_timeout"
    UNAVAILABLE = "provider_unavailable"
    THROTTLED = "provider_throttled"
    # Tried again, final the third time in a row.
    BAD_REPLY = "provider_reply"
    # Final at once.
    CREDENTIALS = "provider_credentials"
    IMAGE_REJECTED = "image_rejected"
    NOT_CONFIGURED = "not_configured"
    OFF = "extension_off"
    UNSUPPORTED_MEDIA = "unsupported_media"
    IMAGE_UNREADABLE = "image_unreadable"
    FILE_DELETED = "file_deleted"
    FILE_REPLACED = "file_replaced"
    # Waits for the next month, or final at once: `LOUPE_BUDGET_EXHAUSTED`.
    BUDGET = "budget"


RETRYABLE = frozenset({Reason.TIMEOUT, Reason.UNAVAILABLE, Reason.THROTTLED, Reason.BAD_REPLY})


class ProviderError(Exception):
    """A call that brought no labels.

    message: one sentence that users may read: no secret, no address of ours.
    retry_after_seconds: what the vendor asked for, if it did. was_sent: False when the vendor
    certainly never got the request.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        was_sent: bool = True,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.was_sent = was_sent

    @property
    def retryable(self) -> bool:
        return self.reason in RETRYABLE


class NotConfigured(Exception):
    """The provider's settings or credentials are missing. The text says which, for the operator."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What every provider must keep to. The caller enforces `timeout_seconds` as well.

    concurrency: calls in flight, over all replicas.
    """

    timeout_seconds: float
    concurrency: int

    @property
    def background_slots(self) -> int:
        """Background work leaves the other half to requests."""
        return max(1, self.concurrency // 2)


class Provider(Protocol):
    """One file in `providers/` holds one of these and names its class `PROVIDER`.

    ANSWER_VERSION goes up when the same reply of the vendor would be read differently. is_billed:
    calls cost money or time elsewhere, so answers are kept, and caps and the breaker hold.
    """

    name: ClassVar[str]
    is_billed: ClassVar[bool]
    ANSWER_VERSION: ClassVar[int]
    settings_class: ClassVar[type[BaseSettings]]

    def __init__(self, extension: str, limits: CallLimits, images: ImagePool) -> None:
        """Reads `settings_class()`. extension: the name this instance stands behind."""

    async def open(self) -> None:
        """Makes and connects the client, however long that takes. Raises NotConfigured."""

    async def detect_labels(self, image: ProviderCopy) -> Answer:
        """All labels the vendor has for the picture, in any order. Raises ProviderError."""

    async def close(self) -> None: ...
