"""Calls the providers: which one stands behind an extension, how many calls at once, how long."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from app import metrics
from app.db import Database
from app.extensions.calls import (
    Admission,
    CallPolicy,
    Granted,
    Held,
    NoSlot,
    TooSoon,
    admit,
    make_slots,
    record_answer,
    record_failure,
    reuse_answer,
    stored_answer,
    withdraw,
)
from app.extensions.outcomes import Failed, NotNow, Outcome, Succeeded, TryAgain
from app.extensions.provider import (
    RETRYABLE,
    Answer,
    CallLimits,
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
# The start waits no longer for credentials to be found.
OPEN_SECONDS = 5.0
LOOK_SECONDS = 0.1
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TaggingRequest:
    """What one run wants of the picture."""

    extension: str
    min_confidence: float
    max_tags: int


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Stands in an extension's place when no provider can, or while one is being opened."""

    reason: Reason
    message: str

    @property
    def outcome(self) -> Failed | TryAgain:
        """Of every attempt."""
        kind = TryAgain if self.reason in RETRYABLE else Failed
        return kind(self.reason, self.message)


@dataclass(frozen=True, slots=True)
class Backend:
    """What stands behind one extension. slots: calls in flight from this process, or about to be;
    on PostgreSQL all processes together make no more."""

    provider: Provider
    policy: CallPolicy
    slots: asyncio.Semaphore


class Tagger:
    """Labels a picture for an extension. Opened once per process."""

    def __init__(
        self,
        db: Database,
        backends: dict[str, Backend | Unavailable],
        limits: CallLimits,
        owner: str,
    ) -> None:
        self._db = db
        self._backends = backends
        self._limits = limits
        self._owner = owner
        self.background_slots = limits.background_slots
        self._opening: set[asyncio.Task[Backend | Unavailable]] = set()

    def expect(self, extension: str, opening: "asyncio.Task[Backend | Unavailable]") -> None:
        """Until it is opened, runs are tried again later."""
        message = f"The provider behind {extension} is not ready yet."
        self._backends[extension] = Unavailable(Reason.UNAVAILABLE, message)
        self._opening.add(opening)
        opening.add_done_callback(partial(self._put, extension))

    def _put(self, extension: str, opening: "asyncio.Task[Backend | Unavailable]") -> None:
        self._opening.discard(opening)
        if opening.cancelled():
            return
        if (error := opening.exception()) is not None:
            log.error("cannot open the provider", extension=extension, exc_info=error)
        else:
            self._backends[extension] = opening.result()

    @property
    def policies(self) -> list[CallPolicy]:
        """Of the extensions that a provider stands behind."""
        backends = self._backends.values()
        return [each.policy for each in backends if not isinstance(each, Unavailable)]

    @property
    def extensions(self) -> list[str]:
        return list(self._backends)

    def provider_names(self) -> dict[str, str]:
        """Which provider really answers for each extension, or why none does."""
        return {
            extension: str(backend.reason)
            if isinstance(backend, Unavailable)
            else backend.provider.name
            for extension, backend in self._backends.items()
        }

    async def attempt(
        self,
        request: TaggingRequest,
        picture: Callable[[], Awaitable[ProviderCopy]],
        *,
        can_wait: bool = False,
        on_start: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """One attempt, all its failures told as an outcome.

        picture: gives the provider copy; shared by the runs of one request. can_wait: somebody
        ends the wait for another's call, for a slot, or for the rate, when it takes too long; if
        nobody does, the run is in the background. on_start: called when the call itself begins.
        """
        backend = self._backends[request.extension]
        if isinstance(backend, Unavailable):
            return backend.outcome
        try:
            image = await picture()
        except ImageUnreadable as error:
            return Failed(Reason.IMAGE_UNREADABLE, f"The image cannot be read: {error}")
        while True:
            outcome = await self._try(backend, request, image, can_wait, on_start)
            if not isinstance(outcome, TooSoon | Held | NoSlot):
                return outcome
            look_again = LOOK_SECONDS if can_wait else RETRY_SECONDS
            seconds = outcome.seconds if isinstance(outcome, TooSoon) else look_again
            if not can_wait:
                return NotNow(seconds, Reason.UNAVAILABLE, "The run waits for its turn.")
            await asyncio.sleep(seconds)

    async def _try(
        self,
        backend: Backend,
        request: TaggingRequest,
        image: ProviderCopy,
        can_wait: bool,
        on_start: Callable[[], None],
    ) -> Outcome | TooSoon | Held | NoSlot:
        """The stored answer if there is one, else a call if one may be made now."""
        if not backend.provider.is_billed:
            async with backend.slots:
                on_start()
                return await self._call(backend, request, image)
        key = backend.policy.key(image.jpeg)
        known = await self._stored(backend, key)
        if isinstance(known, Held):
            return known
        if known is not None:
            metrics.reused_answers.labels(backend.provider.name).inc()
            return _succeeded(request, known, backend.provider.name, 0)
        async with backend.slots:
            admission = await self._admit_to_slot(backend.policy, key, can_wait)
            if isinstance(admission, Answer):
                metrics.reused_answers.labels(backend.provider.name).inc()
                return _succeeded(request, admission, backend.provider.name, 0)
            if not isinstance(admission, Granted):
                return admission
            on_start()
            return await self._billed_call(backend, request, image, admission)

    async def _stored(self, backend: Backend, key: str) -> Answer | Held | None:
        """Looked up before a slot is taken, so that a provider that hangs delays no reuse."""
        if not backend.policy.keep_seconds:
            return None
        known = await self._db.read(stored_answer, key)
        if isinstance(known, Answer):
            return await self._db.write(reuse_answer, backend.policy, key)
        return known

    async def _admit_to_slot(self, policy: CallPolicy, key: str, can_wait: bool) -> Admission:
        """Whoever waits for other processes keeps its own slot, so that few ask the database."""
        admission = await self._admit(policy, key, in_background=not can_wait)
        while can_wait and isinstance(admission, NoSlot):
            await asyncio.sleep(LOOK_SECONDS)
            admission = await self._admit(policy, key, in_background=False)
        return admission

    async def _admit(self, policy: CallPolicy, key: str, *, in_background: bool) -> Admission:
        """Undone if cancelled meanwhile: the claim, the slot and the unit would be nobody's."""
        admitting = asyncio.ensure_future(
            self._db.write(admit, policy, key, self._owner, in_background=in_background)
        )
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            admission = await admitting
            if isinstance(admission, Granted):
                await self._db.write(withdraw, policy, admission)
            raise

    async def _billed_call(
        self,
        backend: Backend,
        request: TaggingRequest,
        image: ProviderCopy,
        granted: Granted,
    ) -> Outcome:
        """The call and the record of it; shielded, since a call that is paid for is kept."""
        error: ProviderError | None = None
        policy = backend.policy
        started = time.monotonic()
        try:
            answer = await self._detect(backend.provider, image)
        except ProviderError as failure:
            error = failure
        except asyncio.CancelledError:
            await self._db.write(record_failure, policy, granted, None)
            raise
        elapsed_ms = _elapsed_ms(started)
        if error is not None:
            await self._db.write(record_failure, policy, granted, error)
            return self._unsuccessful(backend, error, elapsed_ms)
        await self._db.write(record_answer, policy, granted, answer)
        return _succeeded(request, answer, backend.provider.name, elapsed_ms)

    async def _call(
        self, backend: Backend, request: TaggingRequest, image: ProviderCopy
    ) -> Outcome:
        started = time.monotonic()
        try:
            answer = await self._detect(backend.provider, image)
        except ProviderError as error:
            return self._unsuccessful(backend, error, _elapsed_ms(started))
        return _succeeded(request, answer, backend.provider.name, _elapsed_ms(started))

    def _unsuccessful(self, backend: Backend, error: ProviderError, elapsed_ms: int) -> Outcome:
        name = backend.provider.name
        log.warning(
            "provider call failed",
            extension=backend.policy.extension,
            provider=name,
            reason=error.reason,
            elapsed_ms=elapsed_ms,
        )
        if not error.retryable:
            return Failed(error.reason, error.message, name, elapsed_ms)
        return TryAgain(error.reason, error.message, error.retry_after_seconds, name, elapsed_ms)

    async def _detect(self, provider: Provider, image: ProviderCopy) -> Answer:
        started = time.monotonic()
        outcome = "cancelled"
        try:
            answer = await self._detect_in_time(provider, image)
            outcome = "success"
        except ProviderError as error:
            outcome = error.reason
            raise
        finally:
            seconds = time.monotonic() - started
            metrics.provider_calls.labels(provider.name, outcome).observe(seconds)
        return answer

    async def _detect_in_time(self, provider: Provider, image: ProviderCopy) -> Answer:
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
        for opening in self._opening:
            opening.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for backend in self._backends.values():
            if not isinstance(backend, Unavailable):
                await backend.provider.close()


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _succeeded(
    request: TaggingRequest, answer: Answer, provider: str, elapsed_ms: int
) -> Succeeded:
    tags = select_tags(
        answer.labels,
        source=request.extension,
        min_confidence=request.min_confidence,
        max_tags=request.max_tags,
    )
    return Succeeded(tags, provider, elapsed_ms)


async def open_tagger(settings: Settings, images: ImagePool, db: Database, owner: str) -> Tagger:
    """Opens the provider that the settings name for each extension.

    One that takes long is opened behind the start: a machine that is slow today is not one without
    credentials.
    """
    limits = CallLimits(settings.provider_timeout_seconds, settings.provider_concurrency)
    openings = {
        choice.extension: asyncio.create_task(_open_backend(choice, settings, limits, images, db))
        for choice in _choices(settings)
    }
    try:
        done, _ = await asyncio.wait(openings.values(), timeout=OPEN_SECONDS)
        await asyncio.gather(*done)
    except BaseException:
        for opening in openings.values():
            opening.cancel()
        raise
    opened = {each: opening.result() for each, opening in openings.items() if opening in done}
    tagger = Tagger(db, opened, limits, owner)
    for extension, opening in openings.items():
        if opening not in done:
            log.warning("provider not ready yet", extension=extension)
            tagger.expect(extension, opening)
    return tagger


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the settings say of one extension."""

    extension: str
    setting: str
    provider: str
    monthly_calls: int
    calls_per_second: float


def _choices(settings: Settings) -> list[_Choice]:
    return [
        _Choice(
            GOOGLE,
            "LOUPE_GOOGLE_AUTO_TAGGING",
            settings.google_auto_tagging,
            settings.google_monthly_calls,
            settings.google_calls_per_second,
        ),
        _Choice(
            AWS,
            "LOUPE_AWS_AUTO_TAGGING",
            settings.aws_auto_tagging,
            settings.aws_monthly_calls,
            settings.aws_calls_per_second,
        ),
    ]


async def _open_backend(
    choice: _Choice, settings: Settings, limits: CallLimits, images: ImagePool, db: Database
) -> Backend | Unavailable:
    extension, name = choice.extension, choice.provider
    if name == OFF:
        return Unavailable(Reason.OFF, f"{extension} is switched off on this server.")
    known = discover()
    if name not in known:
        allowed = ", ".join([*sorted(known), OFF])
        raise SettingsError(f"{choice.setting}: should be one of: {allowed}.")
    provider = known[name](extension, limits, images)
    try:
        await provider.open()
    except NotConfigured as error:
        log.warning("provider not configured", extension=extension, provider=name, why=str(error))
        return Unavailable(
            Reason.NOT_CONFIGURED, f"The provider behind {extension} is not configured."
        )
    log.info("provider ready", extension=extension, provider=name)
    policy = CallPolicy(
        extension,
        f"{name}:{provider.ANSWER_VERSION}",
        settings.result_ttl_days * 86400,
        limits,
        choice.monthly_calls if provider.is_billed else 0,
        choice.calls_per_second,
        settings.budget_exhausted,
    )
    if provider.is_billed:
        await db.write(make_slots, policy)
    return Backend(provider, policy, asyncio.Semaphore(limits.concurrency))
