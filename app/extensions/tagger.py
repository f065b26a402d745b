"""Calls the providers: which one stands behind an extension, how many calls at once, how long."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from app.extensions.outcomes import Failed, Outcome, Succeeded, TryAgain
from app.extensions.provider import (
    CallLimits,
    Label,
    NotConfigured,
    Provider,
    ProviderError,
    Reason,
)
from app.extensions.registry import discover
from app.extensions.schemas import AWS, GOOGLE
from app.extensions.tags import select_tags
from app.images import ImagePool, ImageUnreadable, ProviderCopy
from app.settings import Settings, SettingsError

log = structlog.get_logger(__name__)

OFF = "off"


@dataclass(frozen=True, slots=True)
class TaggingRequest:
    """What one run wants of the picture."""

    extension: str
    min_confidence: float
    max_tags: int


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Stands in an extension's place when no provider can: every run of it fails at once."""

    reason: Reason
    message: str


class Tagger:
    """Labels a picture for an extension. Opened once per process."""

    def __init__(self, providers: dict[str, Provider | Unavailable], limits: CallLimits) -> None:
        self._providers = providers
        self._limits = limits
        self._slots = {e: asyncio.Semaphore(limits.concurrency) for e in providers}
        # Background work leaves the other half to requests.
        self.background_slots = max(1, limits.concurrency // 2)

    @property
    def extensions(self) -> list[str]:
        return list(self._providers)

    def provider_names(self) -> dict[str, str]:
        """Which provider really answers for each extension, or why none does."""
        return {
            extension: str(provider.reason) if isinstance(provider, Unavailable) else provider.name
            for extension, provider in self._providers.items()
        }

    async def attempt(
        self,
        request: TaggingRequest,
        picture: Callable[[], Awaitable[ProviderCopy]],
        on_start: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """One attempt, all its failures told as an outcome.

        picture: gives the provider copy; shared by the runs of one request.
        on_start: called when a slot is free and the call itself begins.
        """
        provider = self._providers[request.extension]
        if isinstance(provider, Unavailable):
            return Failed(provider.reason, provider.message)
        try:
            image = await picture()
        except ImageUnreadable as error:
            return Failed(Reason.IMAGE_UNREADABLE, f"The image cannot be read: {error}")
        async with self._slots[request.extension]:
            on_start()
            return await self._call(provider, request, image)

    async def _call(
        self, provider: Provider, request: TaggingRequest, image: ProviderCopy
    ) -> Outcome:
        started = time.monotonic()

        def elapsed_ms() -> int:
            return round((time.monotonic() - started) * 1000)

        try:
            labels = await self._detect(provider, image)
        except ProviderError as error:
            log.warning(
                "provider call failed",
                extension=request.extension,
                provider=provider.name,
                reason=error.reason,
                elapsed_ms=elapsed_ms(),
            )
            return _unsuccessful(error, provider.name, elapsed_ms())
        tags = select_tags(
            labels,
            source=request.extension,
            min_confidence=request.min_confidence,
            max_tags=request.max_tags,
        )
        return Succeeded(tags, provider.name, elapsed_ms())

    async def _detect(self, provider: Provider, image: ProviderCopy) -> list[Label]:
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                return await provider.detect_labels(image)
        except TimeoutError:
            raise ProviderError(Reason.TIMEOUT, "The provider did not answer in time.") from None
        except ProviderError:
            raise
        except Exception as error:
            log.error("provider adapter failed", provider=provider.name, exc_info=error)
            raise ProviderError(Reason.BAD_REPLY, "The provider's reply is unreadable.") from error

    async def close(self) -> None:
        for provider in self._providers.values():
            if not isinstance(provider, Unavailable):
                await provider.close()


def _unsuccessful(error: ProviderError, provider: str, elapsed_ms: int) -> Outcome:
    if not error.retryable:
        return Failed(error.reason, error.message, provider, elapsed_ms)
    return TryAgain(error.reason, error.message, error.retry_after_seconds, provider, elapsed_ms)


async def open_tagger(settings: Settings, images: ImagePool) -> Tagger:
    """Opens the provider that the settings name for each extension."""
    limits = CallLimits(settings.provider_timeout_seconds, settings.provider_concurrency)
    chosen = {
        GOOGLE: ("LOUPE_GOOGLE_AUTO_TAGGING", settings.google_auto_tagging),
        AWS: ("LOUPE_AWS_AUTO_TAGGING", settings.aws_auto_tagging),
    }
    opened = await asyncio.gather(
        *(
            _open_provider(extension, setting, name, limits, images)
            for extension, (setting, name) in chosen.items()
        )
    )
    return Tagger(dict(zip(chosen, opened, strict=True)), limits)


async def _open_provider(
    extension: str, setting: str, name: str, limits: CallLimits, images: ImagePool
) -> Provider | Unavailable:
    if name == OFF:
        return Unavailable(Reason.OFF, f"{extension} is switched off on this server.")
    known = discover()
    if name not in known:
        raise SettingsError(f"{setting}: should be one of: {', '.join([*sorted(known), OFF])}.")
    provider = known[name](extension, limits, images)
    try:
        await provider.open()
    except NotConfigured as error:
        log.warning("provider not configured", extension=extension, provider=name, why=str(error))
        return Unavailable(
            Reason.NOT_CONFIGURED, f"The provider behind {extension} is not configured."
        )
    log.info("provider ready", extension=extension, provider=name)
    return provider
