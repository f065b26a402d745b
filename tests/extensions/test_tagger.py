"""How providers are chosen and called: slots, deadlines, and every failure told as an outcome."""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

import pytest
from pydantic_settings import BaseSettings

from app.clock import Clock
from app.db import Database
from app.extensions.calls import CallPolicy
from app.extensions.outcomes import Failed, Outcome, Succeeded, TryAgain
from app.extensions.provider import Answer, CallLimits, Label, ProviderError, Reason
from app.extensions.schemas import AWS, GOOGLE
from app.extensions.tagger import Backend, Tagger, TaggingRequest, Unavailable, open_tagger
from app.images import ImagePool, ImageUnreadable, ProviderCopy
from app.settings import BudgetExhausted, Settings, SettingsError, load_settings

T = TypeVar("T")
COPY = ProviderCopy(b"jpeg", 80, 80, 80, 80, 0.0)
REQUEST = TaggingRequest(GOOGLE, 50, 2)


class _NoDatabase(Database):
    """What does not cost anything is called without asking the database."""

    def __init__(self) -> None:
        super().__init__(Clock())

    async def read(self, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the database was read")

    scan = read

    def _submit(self, _: Any) -> NoReturn:
        raise AssertionError("the database was written")

    async def close(self) -> None: ...


class Scripted:
    """A provider whose answers wait until they are let go."""

    name: ClassVar[str] = "scripted"
    ANSWER_VERSION: ClassVar[int] = 1
    is_billed: ClassVar[bool] = False
    settings_class: ClassVar[type[BaseSettings]] = BaseSettings

    def __init__(self, extension: str, limits: CallLimits, images: ImagePool) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.problem: BaseException | None = None
        self.in_flight = self.max_in_flight = self.calls = 0
        self.is_closed = False

    async def open(self) -> None: ...

    async def detect_labels(self, image: ProviderCopy) -> Answer:
        self.calls += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await self.gate.wait()
        finally:
            self.in_flight -= 1
        if self.problem is not None:
            raise self.problem
        labels = [("Low", 49.99), ("A", 50), ("B", 60), ("C", 70)]
        return Answer([Label(name, confidence) for name, confidence in labels])

    async def close(self) -> None:
        self.is_closed = True


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def scripted(*, timeout_seconds: float = 10, concurrency: int = 16) -> tuple[Tagger, Scripted]:
    limits = CallLimits(timeout_seconds, concurrency)
    provider = Scripted(GOOGLE, limits, ImagePool())
    off = Unavailable(Reason.OFF, "Off.")
    policy = CallPolicy(GOOGLE, "scripted:1", 0, limits, 0, 0, BudgetExhausted.PENDING)
    backend = Backend(provider, policy, asyncio.Semaphore(concurrency))
    return Tagger(_NoDatabase(), {GOOGLE: backend, AWS: off}, limits, "me"), provider


async def picture() -> ProviderCopy:
    return COPY


async def no_picture() -> ProviderCopy:
    raise ImageUnreadable("broken")


def outcome_of(problem: BaseException | None) -> Outcome:
    async def attempt() -> Outcome:
        tagger, provider = scripted()
        provider.problem = problem
        return await tagger.attempt(REQUEST, picture)

    return run(attempt())


def test_labels_become_the_tags_that_the_run_wants() -> None:
    outcome = outcome_of(None)
    assert isinstance(outcome, Succeeded)
    assert [(tag["name"], tag["source"]) for tag in outcome.tags] == [("C", GOOGLE), ("B", GOOGLE)]
    assert outcome.provider == "scripted"
    assert outcome.elapsed_ms is not None


@pytest.mark.parametrize(
    "reason", [Reason.TIMEOUT, Reason.UNAVAILABLE, Reason.THROTTLED, Reason.BAD_REPLY]
)
def test_passing_failure_is_to_be_tried_again(reason: Reason) -> None:
    outcome = outcome_of(ProviderError(reason, "Not now.", retry_after_seconds=7))
    assert isinstance(outcome, TryAgain)
    assert (outcome.reason, outcome.message, outcome.retry_after_seconds) == (reason, "Not now.", 7)
    assert outcome.provider == "scripted"


@pytest.mark.parametrize("reason", [Reason.CREDENTIALS, Reason.IMAGE_REJECTED])
def test_failure_that_stays_is_final(reason: Reason) -> None:
    outcome = outcome_of(ProviderError(reason, "Never."))
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.message) == (reason, "Never.")


@pytest.mark.parametrize("bug", [KeyError("canary"), RecursionError("canary"), OSError("canary")])
def test_bug_of_an_adapter_is_an_unreadable_reply_and_tells_nothing(bug: Exception) -> None:
    outcome = outcome_of(bug)
    assert isinstance(outcome, TryAgain)
    assert outcome.reason is Reason.BAD_REPLY
    assert "canary" not in outcome.message


def test_provider_that_hangs_is_left_at_the_deadline_and_gives_its_slot_back() -> None:
    async def attempt() -> None:
        tagger, provider = scripted(timeout_seconds=0.05, concurrency=1)
        provider.gate.clear()
        outcome = await tagger.attempt(REQUEST, picture)
        assert isinstance(outcome, TryAgain)
        assert outcome.reason is Reason.TIMEOUT
        provider.gate.set()
        assert isinstance(await tagger.attempt(REQUEST, picture), Succeeded)

    run(attempt())


def test_picture_that_cannot_be_read_is_final_without_a_call() -> None:
    async def attempt() -> None:
        tagger, provider = scripted()
        outcome = await tagger.attempt(REQUEST, no_picture)
        assert isinstance(outcome, Failed)
        assert outcome.reason is Reason.IMAGE_UNREADABLE
        assert provider.calls == 0

    run(attempt())


def test_extension_without_a_provider_is_final_and_asks_for_no_picture() -> None:
    async def attempt() -> None:
        tagger, _ = scripted()
        outcome = await tagger.attempt(TaggingRequest(AWS, 0, 1), no_picture)
        assert outcome == Failed(Reason.OFF, "Off.")

    run(attempt())


def test_calls_beyond_the_slots_wait_and_begin_when_one_is_free() -> None:
    async def attempt() -> None:
        tagger, provider = scripted(concurrency=3)
        provider.gate.clear()
        begun: list[int] = []
        attempts = [
            asyncio.create_task(
                tagger.attempt(REQUEST, picture, on_start=partial(begun.append, number))
            )
            for number in range(10)
        ]
        for _ in range(10):
            await asyncio.sleep(0)
        assert begun == [0, 1, 2]
        provider.gate.set()
        await asyncio.gather(*attempts)
        assert sorted(begun) == list(range(10))
        assert provider.max_in_flight == 3

    run(attempt())


def test_attempt_that_is_cancelled_while_it_waits_takes_no_slot() -> None:
    async def attempt() -> None:
        tagger, provider = scripted(concurrency=1)
        provider.gate.clear()
        first, waiting, last = (
            asyncio.create_task(tagger.attempt(REQUEST, picture)) for _ in range(3)
        )
        await asyncio.sleep(0.01)
        waiting.cancel()
        provider.gate.set()
        for task in (first, last):
            assert isinstance(await task, Succeeded)
        assert provider.calls == 2

    run(attempt())


@pytest.mark.parametrize(("concurrency", "background"), [(1, 1), (2, 1), (5, 2), (16, 8)])
def test_background_has_half_of_the_slots_and_at_least_one(
    concurrency: int, background: int
) -> None:
    async def attempt() -> None:
        assert scripted(concurrency=concurrency)[0].background_slots == background

    run(attempt())


# Choosing


def opened(**settings: str) -> Tagger:
    async def open_and_close() -> Tagger:
        tagger = await open_tagger(
            load_settings(Settings, **settings), ImagePool(), _NoDatabase(), "me"
        )
        await tagger.close()
        return tagger

    return run(open_and_close())


def test_setting_says_which_provider_stands_behind_an_extension() -> None:
    tagger = opened(google_auto_tagging="local", aws_auto_tagging="off")
    assert tagger.provider_names() == {GOOGLE: "local", AWS: "extension_off"}
    assert tagger.extensions == [GOOGLE, AWS]


def test_provider_without_credentials_stands_aside_and_the_start_goes_on() -> None:
    tagger = opened()
    assert tagger.provider_names() == {GOOGLE: "not_configured", AWS: "not_configured"}


def test_unknown_provider_stops_the_start_with_the_known_ones() -> None:
    with pytest.raises(SettingsError) as refused:
        opened(google_auto_tagging="clarifai", aws_auto_tagging="off")
    assert str(refused.value) == (
        "LOUPE_GOOGLE_AUTO_TAGGING: should be one of: local, rekognition, vision, off."
    )
    with pytest.raises(SettingsError, match="LOUPE_AWS_AUTO_TAGGING"):
        opened(google_auto_tagging="off", aws_auto_tagging="amazon")


def test_closing_closes_the_providers() -> None:
    async def close() -> None:
        tagger, provider = scripted()
        await tagger.close()
        assert provider.is_closed

    run(close())
