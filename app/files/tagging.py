"""Where extensions meet files: run within the budget, record the result, tell the rest later.

A result is recorded by one function, `record_result`, whoever comes with it: the request within
its budget, the straggler after it, or a worker that took the run over. The transaction in
`settle` alone decides what the response says.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Row, bindparam, select, update

from app import metrics
from app.db import Database, Tx
from app.extensions.models import SUCCESS
from app.extensions.outcomes import Failed, Outcome, Succeeded, TryAgain
from app.extensions.provider import Reason
from app.extensions.runs import (
    announce,
    claim_runs,
    end_pending_runs,
    finish_run,
    is_superseded,
)
from app.extensions.tagger import Tagger, TaggingRequest
from app.extensions.tags import replace_source
from app.files.models import versions
from app.files.objects import file_object, read_version
from app.files.urls import FileUrls
from app.images import ImagePool, ProviderCopy
from app.prepared import Prepared, given
from app.settings import WebhookOn
from app.storage.base import Storage
from app.webhooks.deliveries import enqueue

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """Which ends of runs are told, and how their files are named in the body.

    first_delay: seconds before the first attempt.
    """

    on: WebhookOn
    first_delay: float
    urls: FileUrls


def record_result(tx: Tx, rules: WebhookRules, run_id: str, attempt: int, outcome: Outcome) -> bool:
    """Stores how an attempt ended: the run's state, its tags, its webhook, or none of them.

    Returns whether a delivery was inserted. A late result, of an attempt that no longer counts,
    changes nothing.
    """
    run = finish_run(tx, run_id, attempt, outcome)
    if run is None:
        return False
    if isinstance(outcome, Succeeded):
        _replace_tags(tx, run, outcome)
    return _tell(tx, rules, run)


_lock_tags = Prepared(
    select(versions.c.ai_tags).where(versions.c.id == bindparam("version_id")).with_for_update()
)
_set_tags = Prepared(
    update(versions)
    .where(versions.c.id == bindparam("version_id"))
    .values(given(versions, "ai_tags", "updated_at"))
)


def _replace_tags(tx: Tx, run: Row[Any], outcome: Succeeded) -> None:
    existing = _lock_tags.one_or_none(tx, version_id=run.version_id)
    if existing is None or is_superseded(tx, run):
        return
    _set_tags.run(
        tx,
        version_id=run.version_id,
        ai_tags=replace_source(existing.ai_tags, run.extension, outcome.tags),
        updated_at=tx.clock.now(),
    )


def _tell(tx: Tx, rules: WebhookRules, run: Row[Any]) -> bool:
    """Inserts the delivery of a run that has ended, if anyone is to be told."""
    if run.webhook_url is None or not (run.announced or rules.on is WebhookOn.ALL):
        return False
    enqueue(
        tx,
        run_id=run.id,
        url=run.webhook_url,
        payload=_payload(tx, rules.urls, run),
        request_id=run.request_id,
        first_delay=rules.first_delay,
    )
    return True


def _payload(tx: Tx, urls: FileUrls, run: Row[Any]) -> dict[str, Any]:
    version = read_version(tx, run.version_id) if run.status == SUCCESS else None
    if version is not None:
        details = file_object(tx, version, urls)
        return {"service": run.extension, "status": "SUCCESS", "fileObject": details}
    error = {"message": run.last_error, "reason": run.reason}
    return {
        "service": run.extension,
        "status": "FAILURE",
        "fileId": run.file_id,
        "error": error,
    }


def end_runs(tx: Tx, rules: WebhookRules, version_id: str, reason: Reason) -> bool:
    """Ends what still runs on a version that goes away, in the transaction that removes it.

    Returns whether a delivery was inserted.
    """
    messages = {
        Reason.FILE_DELETED: "The file was deleted before the extension finished.",
        Reason.FILE_REPLACED: "A new version replaced the file before the extension finished.",
    }
    ended = end_pending_runs(tx, version_id, Failed(reason, messages[reason]))
    told = [_tell(tx, rules, run) for run in ended]
    return any(told)


KeepAnswer = Callable[[Tx, Row[Any], dict[str, str]], None]


def settle(
    tx: Tx,
    rules: WebhookRules,
    version_id: str,
    run_ids: Sequence[str],
    outcomes: dict[str, Outcome],
    given_back: Sequence[str],
    keep_answer: KeepAnswer | None,
) -> tuple[Row[Any] | None, dict[str, str]]:
    """What the response says: the version as it is now, and the status of each of its runs."""
    for run_id, outcome in outcomes.items():
        record_result(tx, rules, run_id, 1, outcome)
    statuses = announce(tx, run_ids, given_back)
    version = read_version(tx, version_id)
    if keep_answer is not None and version is not None:
        keep_answer(tx, version, statuses)
    return version, statuses


def _expired(run: Row[Any]) -> Failed:
    """Nobody could take it before its deadline."""
    return Failed(
        Reason(run.reason or Reason.UNAVAILABLE),
        run.last_error or "The extension could not be run in time.",
    )


def _count(run: Row[Any], outcome: Outcome) -> None:
    metrics.runs.labels(run.extension, type(outcome).__name__.lower()).inc()


@dataclass(slots=True)
class _Call:
    run: Row[Any]
    task: "asyncio.Task[Outcome]"
    begun: asyncio.Event

    @property
    def is_waiting(self) -> bool:
        """True while no slot has been free for it."""
        return not self.task.done() and not self.begun.is_set()


class FileTagging:
    """Runs extensions on stored files, within a request and behind it."""

    def __init__(
        self,
        db: Database,
        tagger: Tagger,
        images: ImagePool,
        storage: Storage,
        rules: WebhookRules,
        *,
        owner: str,
        held: set[str],
        budget_seconds: float,
        on_delivery: Callable[[], None] = lambda: None,
        on_due_run: Callable[[], None] = lambda: None,
    ) -> None:
        self._db = db
        self._tagger = tagger
        self._images = images
        self._storage = storage
        self.rules = rules
        self.owner = owner
        self._held = held
        self.budget_seconds = budget_seconds
        self.on_delivery = on_delivery
        self.on_due_run = on_due_run
        self._stragglers: set[asyncio.Task[None]] = set()
        self._in_background: Counter[str] = Counter()

    async def run_within_budget(
        self,
        runs: Sequence[Row[Any]],
        version: Row[Any],
        keep_answer: KeepAnswer | None = None,
    ) -> tuple[Row[Any], dict[str, str]]:
        """Runs what has just been stored. Returns the version and the statuses to respond with.

        A call that outlives the budget goes on; one that has not begun is left to anyone.
        keep_answer: called in the transaction that decides the response.
        """
        self._held.update(run.id for run in runs)
        calls = self._begin(runs, version)
        try:
            await asyncio.wait([call.task for call in calls], timeout=self.budget_seconds)
        except asyncio.CancelledError:
            for call in calls:
                self._follow(call)
            raise
        done = {call.run.id: call.task.result() for call in calls if call.task.done()}
        waiting = [call for call in calls if call.is_waiting]
        for call in waiting:
            call.task.cancel()
        try:
            current, statuses = await self._db.write(
                settle,
                self.rules,
                version.id,
                [run.id for run in runs],
                done,
                [call.run.id for call in waiting],
                keep_answer,
            )
        finally:
            for call in calls:
                if call.run.id in done or call in waiting:
                    self._held.discard(call.run.id)
                else:
                    self._follow(call)
        for call in calls:
            if call.run.id in done:
                _count(call.run, done[call.run.id])
        self._wake_after(done.values(), bool(waiting))
        return (version if current is None else current), statuses

    def _begin(self, runs: Sequence[Row[Any]], version: Row[Any]) -> list[_Call]:
        picture = self._shared_picture(version.blob_key)
        calls = []
        for run in runs:
            begun = asyncio.Event()
            task = asyncio.create_task(
                self._attempt(run, version.is_image, picture, can_wait=True, on_start=begun.set)
            )
            calls.append(_Call(run, task, begun))
        return calls

    async def _attempt(
        self,
        run: Row[Any],
        is_image: bool,
        picture: Callable[[], Awaitable[ProviderCopy]],
        *,
        can_wait: bool = False,
        on_start: Callable[[], None] = lambda: None,
    ) -> Outcome:
        if not is_image:
            return Failed(Reason.UNSUPPORTED_MEDIA, "The file is not an image that can be tagged.")
        wanted = TaggingRequest(run.extension, run.min_confidence, run.max_tags)
        try:
            return await self._tagger.attempt(wanted, picture, can_wait=can_wait, on_start=on_start)
        except Exception as error:
            log.error("extension attempt failed", run_id=run.id, exc_info=error)
            return TryAgain(Reason.UNAVAILABLE, "The picture could not be prepared.")

    def _shared_picture(self, blob_key: str) -> Callable[[], Awaitable[ProviderCopy]]:
        """Makes the provider copy when first asked, once for all who ask."""
        task: asyncio.Task[ProviderCopy] | None = None

        async def make() -> ProviderCopy:
            async with self._storage.local_copy(blob_key) as path:
                return await self._images.provider_copy(path)

        def picture() -> Awaitable[ProviderCopy]:
            nonlocal task
            if task is None:
                task = asyncio.create_task(make())
            return asyncio.shield(task)

        return picture

    def _follow(self, call: _Call) -> None:
        task = asyncio.create_task(self._record_straggler(call))
        self._stragglers.add(task)
        task.add_done_callback(self._stragglers.discard)

    async def _record_straggler(self, call: _Call) -> None:
        try:
            await self._record(call.run, await call.task)
        finally:
            self._held.discard(call.run.id)

    async def _record(self, run: Row[Any], outcome: Outcome) -> None:
        """Failing that, the lease runs out and the run is taken over."""
        try:
            told = await self._db.write(record_result, self.rules, run.id, run.attempts, outcome)
        except Exception as error:
            log.error("cannot record a result", run_id=run.id, exc_info=error)
            return
        log.info(
            "extension attempt",
            run_id=run.id,
            extension=run.extension,
            request_id=run.request_id,
            outcome=type(outcome).__name__,
            provider=outcome.provider,
            elapsed_ms=outcome.elapsed_ms,
        )
        _count(run, outcome)
        if told:
            self.on_delivery()
        self._wake_after([outcome], False)

    def _wake_after(self, outcomes: Any, is_work_given_back: bool) -> None:
        if is_work_given_back or any(isinstance(outcome, TryAgain) for outcome in outcomes):
            self.on_due_run()
        if self.rules.on is WebhookOn.ALL:
            self.on_delivery()

    @property
    def stragglers(self) -> set["asyncio.Task[None]"]:
        """Calls that outlived their request."""
        return set(self._stragglers)

    async def close(self) -> None:
        """Leaves stragglers to whoever takes their runs over."""
        for task in self._stragglers:
            task.cancel()
        await asyncio.gather(*self._stragglers, return_exceptions=True)

    async def take(self) -> Sequence[Row[Any]]:
        """Claims due runs, of each extension as many as its background slots allow."""
        limits = {
            extension: self._tagger.background_slots - self._in_background[extension]
            for extension in self._tagger.extensions
        }
        claimed = await self._db.write(
            claim_runs, self.owner, limits, self._tagger.background_slots
        )
        self._in_background.update(run.extension for run in claimed)
        return claimed

    async def run_due(self, run: Row[Any]) -> None:
        """One more attempt at a run that was left pending."""
        try:
            if run.expires_at < self._db.clock.now():
                await self._record(run, _expired(run))
                return
            version = await self._db.read(read_version, run.version_id)
            if version is None:
                return  # the transaction that removed it has ended the run
            picture = self._shared_picture(version.blob_key)
            await self._record(run, await self._attempt(run, version.is_image, picture))
        finally:
            self._in_background[run.extension] -= 1
