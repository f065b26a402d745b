"""The one place of wiring: what a process opens, the web application, and the loops behind it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import Table
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from app import metrics
from app.auth import Authenticator
from app.clock import Clock
from app.db import Database, ProcessLock, is_sqlite, open_database
from app.delivery.routes import Delivery
from app.delivery.thumbnails import Thumbnails
from app.delivery.transformations import THUMBNAIL_BOX_PX
from app.errors import (
    ApiError,
    JsonResponse,
    answering_errors,
    error_response,
    install_error_handlers,
)
from app.extensions.models import answers, runs, slots
from app.extensions.runs import resume_runs
from app.extensions.tagger import Tagger, open_tagger
from app.files import openapi
from app.files.admission import Admission
from app.files.form import UploadLimits
from app.files.library import MediaLibrary
from app.files.routes import router as files_router
from app.files.routes import upload_router
from app.files.sweep import Sweep
from app.files.tagging import FileTagging, WebhookRules
from app.files.upload import Uploader
from app.files.urls import FileUrls
from app.http import (
    ApiRoutes,
    Fork,
    HeaderLimit,
    RefusedBodies,
    RequestLog,
    allowing_any_origin,
)
from app.ids import new_id
from app.images import ImagePool
from app.jobs import DueLoop, keep_leases, release_leases
from app.keys import Keys, load_keys
from app.notify import listen
from app.operations.routes import Operations
from app.operations.routes import router as operations_router
from app.outbound import AddressGuard, Outbound
from app.queues import gauge_queues, oldest_due_seconds
from app.schema import require_current
from app.settings import Settings, make_directory
from app.shutdown import Shutdown
from app.storage.base import Storage, StorageUnavailable
from app.storage.opening import open_storage
from app.webhooks.models import deliveries
from app.webhooks.sender import WebhookSender

log = structlog.get_logger(__name__)

# As long as whoever looks at our health waits for the database.
DATABASE_SECONDS = 5.0
_LEASED = (runs, deliveries, answers, slots)

Held = dict[Table, set[str]]


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process holds open for as long as it lives."""

    settings: Settings
    db: Database
    storage: Storage
    keys: Keys
    images: ImagePool
    tagger: Tagger
    guard: AddressGuard
    outbound: Outbound
    tagging: FileTagging
    loops: tuple[DueLoop, ...]

    def stop_claiming(self) -> None:
        """From now on this process only finishes what it has begun."""
        for loop in self.loops:
            loop.stop()

    async def drain(self, shutdown: Shutdown) -> None:
        """Waits for what is in flight; what is not done in time is given back."""
        self.stop_claiming()
        in_flight = self.tagging.stragglers.union(*(loop.working for loop in self.loops))
        if in_flight:
            log.info("finishing what is in flight", count=len(in_flight))
            await shutdown.wait_for(in_flight)


@asynccontextmanager
async def open_resources(
    settings: Settings, *, clock: Clock | None = None, images: ImagePool | None = None
) -> AsyncIterator[Resources]:
    """Opens everything and runs what is due in the background, until the context ends.

    Each step closes what it opened after all that came later. images: a pool that the caller keeps
    open. Raises SettingsError.
    """
    async with AsyncExitStack() as stack:
        owner = new_id()
        held: Held = {runs: set(), deliveries: set()}
        db = await _open_database(stack, settings, clock or Clock())
        storage = await _open_storage(stack, settings)
        sweep = Sweep(db, storage, settings.upload_deadline_seconds)
        await sweep.recognise()
        keys = await load_keys(db, settings)
        images = images or await _open_images(stack, settings)
        tagger = await open_tagger(settings, images, db, owner)
        stack.push_async_callback(tagger.close)
        for policy in tagger.policies:
            await db.write(resume_runs, policy)
        guard = AddressGuard(settings.webhook_allow_cidrs)
        outbound = await stack.enter_async_context(Outbound(guard))
        webhook_loop = _webhook_loop(settings, db, outbound, keys, owner, held)
        tagging = _tagging(settings, db, tagger, images, storage, owner, held)
        tagging.on_delivery = webhook_loop.wake
        run_loop = DueLoop(runs, db, tagging.take, tagging.run_due, held[runs])
        tagging.on_due_run = run_loop.wake
        stack.push_async_callback(_give_back, db, owner)
        stack.push_async_callback(tagging.close)
        loops = (run_loop, webhook_loop)
        background = [*(loop.run() for loop in loops), keep_leases(db, held, owner), sweep.run()]
        if not is_sqlite(settings.sqlalchemy_url):
            wakers = {runs.name: run_loop.wake, deliveries.name: webhook_loop.wake}
            background.append(listen(settings.sqlalchemy_url, wakers))
        await stack.enter_async_context(_running(*background))
        yield Resources(
            settings, db, storage, keys, images, tagger, guard, outbound, tagging, loops
        )


async def _open_database(stack: AsyncExitStack, settings: Settings, clock: Clock) -> Database:
    """On SQLite under the process's lock, so all leases there are of processes that are gone."""
    url = settings.sqlalchemy_url
    make_directory(settings.data_dir, "LOUPE_DATA_DIR")
    if is_sqlite(url):
        stack.callback(ProcessLock(url).release)
    require_current(url)
    db = open_database(settings, clock)
    stack.push_async_callback(db.close)
    if is_sqlite(url):
        await db.write(release_leases, _LEASED)
    return db


async def _open_storage(stack: AsyncExitStack, settings: Settings) -> Storage:
    storage = await open_storage(settings)
    stack.push_async_callback(storage.close)
    return storage


async def _open_images(stack: AsyncExitStack, settings: Settings) -> ImagePool:
    images = ImagePool(max_pixels=settings.max_pixels)
    stack.push_async_callback(images.close)
    await images.start()
    return images


def _webhook_loop(
    settings: Settings, db: Database, outbound: Outbound, keys: Keys, owner: str, held: Held
) -> DueLoop:
    sender = WebhookSender(
        db,
        outbound,
        owner=owner,
        secret=keys.webhook_secret,
        schedule=settings.webhook_schedule,
        timeout_seconds=settings.webhook_timeout_seconds,
    )
    return DueLoop(deliveries, db, sender.take, sender.send, held[deliveries])


def _tagging(
    settings: Settings,
    db: Database,
    tagger: Tagger,
    images: ImagePool,
    storage: Storage,
    owner: str,
    held: Held,
) -> FileTagging:
    return FileTagging(
        db,
        tagger,
        images,
        storage,
        WebhookRules(
            settings.webhook_on, settings.webhook_schedule[0], FileUrls(settings.url_endpoint)
        ),
        owner=owner,
        held=held[runs],
        budget_seconds=settings.sync_budget_seconds,
    )


@asynccontextmanager
async def _running(*loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _give_back(db: Database, owner: str) -> None:
    """So that nobody has to wait for our leases to run out."""
    await db.write(release_leases, _LEASED, owner)


def create_app(resources: Resources) -> ASGIApp:
    """The web application over what is open already."""
    app = FastAPI(
        title="Loupe",
        version="0.1.0",
        description="A self-hosted, ImageKit-compatible media API that looks at your images.",
        redirect_slashes=False,
        # Nothing here sets OpenTelemetry up, and FastAPI would ask for it on every request.
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.authenticator = Authenticator(resources.keys, resources.db)
    app.state.library = MediaLibrary(
        resources.db, resources.storage, resources.tagging, resources.guard
    )
    app.state.uploader = _uploader(resources, app.state.authenticator)
    delivery = Delivery(
        resources.db,
        resources.storage,
        Thumbnails(resources.images, resources.storage, THUMBNAIL_BOX_PX),
        resources.keys,
        resources.settings.imagekit_id,
    )
    app.state.operations = Operations(
        resources.db, resources.tagging.on_due_run, resources.tagging.on_delivery
    )
    install_error_handlers(app)
    app.add_exception_handler(StorageUnavailable, _on_storage_unavailable)
    _add_health(app, resources)
    app.router.routes[:0] = [
        # Not included: FastAPI looks for an included route twice, and one by one.
        *files_router.routes,
        *upload_router.routes,
        *operations_router.routes,
    ]
    generate = app.openapi
    app.openapi = lambda: openapi.complete(generate())  # type: ignore[method-assign]
    api = answering_errors(ApiRoutes(app), app.exception_handlers)
    # What most requests are for passes through little else.
    fork = Fork(
        {
            f"/{delivery.imagekit_id}/": answering_errors(delivery, app.exception_handlers),
            "/api/": allowing_any_origin(api),
            "/v1/": api,
        },
        otherwise=app,
    )
    return RequestLog(HeaderLimit(RefusedBodies(fork)))


async def _on_storage_unavailable(request: Request, error: Exception) -> Response:
    log.error("storage unavailable", exc_info=error)
    return error_response(
        ApiError(
            503,
            "Files cannot be stored or read at the moment. Please try again later.",
            headers={"retry-after": "5"},
        )
    )


def _uploader(resources: Resources, authenticator: Authenticator) -> Uploader:
    settings = resources.settings
    return Uploader(
        resources.db,
        resources.storage,
        authenticator,
        resources.outbound,
        resources.guard,
        resources.tagging,
        UploadLimits(
            settings.max_upload_bytes,
            settings.max_pixels,
            settings.upload_idle_seconds,
            settings.upload_deadline_seconds,
            settings.restrict_client_params,
        ),
        Admission(
            resources.storage.staging_dir,
            max_concurrent=settings.max_concurrent_uploads,
            reserve_bytes=settings.disk_reserve_bytes,
        ),
    )


def _add_health(app: FastAPI, resources: Resources) -> None:
    @app.get("/healthz", tags=["Health"], responses=openapi.WITHOUT_KEY)
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["Health"], responses=openapi.WITHOUT_KEY)
    async def readyz() -> Response:
        """Database and storage work, and nothing that is due waits for too long.

        Says which provider stands behind each extension.
        """
        await _check_ready(resources)
        providers = resources.tagger.provider_names()
        return JsonResponse({"status": "ok", "providers": providers})

    @app.get(
        "/metrics",
        tags=["Health"],
        response_class=PlainTextResponse,
        responses=openapi.WITHOUT_KEY,
    )
    async def expose_metrics() -> Response:
        """For Prometheus. Without the database, what this process has counted itself."""
        is_up = await _gauge_queues(resources.db)
        content = metrics.exposition(is_database_up=is_up)
        return Response(content, media_type=CONTENT_TYPE_LATEST)


async def _gauge_queues(db: Database) -> bool:
    """False when the database does not answer."""
    try:
        async with asyncio.timeout(DATABASE_SECONDS):
            await db.scan(gauge_queues)
    except Exception as error:
        log.error("cannot look at the queues", exc_info=error)
        return False
    return True


async def _check_ready(resources: Resources) -> None:
    """Raises ApiError (503) with the reason."""
    try:
        async with asyncio.timeout(DATABASE_SECONDS):
            waits = await resources.db.scan(oldest_due_seconds)
    except Exception as error:
        log.error("database not ready", exc_info=error)
        raise ApiError(503, "Not ready: the database does not answer.") from None
    try:
        await resources.storage.check()
    except OSError as error:
        log.error("storage not ready", exc_info=error)
        raise ApiError(503, "Not ready: files cannot be stored.") from None
    longest = resources.settings.ready_max_due_age_seconds
    for queue, seconds in waits.items():
        if seconds > longest:
            raise ApiError(503, f"Not ready: the oldest due {queue} waits for {seconds:.0f} s.")
