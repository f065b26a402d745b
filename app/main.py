"""The one place of wiring: what a process opens, the web application, and the loops behind it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from sqlalchemy import Table, select
from starlette.responses import Response
from starlette.types import ASGIApp

from app.auth import Authenticator
from app.clock import Clock
from app.db import Database, ProcessLock, is_sqlite, open_database
from app.delivery.routes import Delivery
from app.delivery.routes import router as delivery_router
from app.delivery.thumbnails import Thumbnails
from app.delivery.transformations import THUMBNAIL_BOX_PX
from app.errors import ApiError, JsonResponse, install_error_handlers
from app.extensions.models import runs
from app.extensions.tagger import Tagger, open_tagger
from app.files import openapi
from app.files.library import MediaLibrary
from app.files.routes import router as files_router
from app.files.routes import upload_router
from app.files.tagging import FileTagging, WebhookRules
from app.files.upload import Uploader, UploadLimits
from app.files.urls import FileUrls
from app.http import RefusedBodies, RequestLog, TrailingSlash, UploadCors
from app.ids import new_id
from app.images import ImagePool
from app.jobs import DueLoop, keep_leases, release_leases
from app.keys import Keys, load_keys
from app.outbound import AddressGuard, Outbound
from app.schema import require_current
from app.settings import Settings, SettingsError, make_directory
from app.storage.base import Storage
from app.storage.local import LocalStorage
from app.webhooks.models import deliveries
from app.webhooks.sender import WebhookSender

log = structlog.get_logger(__name__)

ABANDONED_SECONDS = 3600.0
_LEASED = (runs, deliveries)


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


@asynccontextmanager
async def open_resources(
    settings: Settings, *, clock: Clock | None = None, images: ImagePool | None = None
) -> AsyncIterator[Resources]:
    """Opens everything and runs what is due in the background, until the context ends.

    images: a pool that the caller keeps open. Raises SettingsError.
    """
    async with contextlib.AsyncExitStack() as stack:
        url = settings.sqlalchemy_url
        make_directory(settings.data_dir, "LOUPE_DATA_DIR")
        if is_sqlite(url):
            stack.callback(ProcessLock(url).release)
        require_current(url)
        db = open_database(settings, clock or Clock())
        stack.push_async_callback(db.close)
        owner = new_id()
        held: dict[Table, set[str]] = {table: set() for table in _LEASED}
        await db.write(release_leases, _LEASED, None if is_sqlite(url) else owner)
        storage = await _open_storage(settings)
        await asyncio.to_thread(
            _remove_abandoned, storage.staging_dir, 0.0 if is_sqlite(url) else ABANDONED_SECONDS
        )
        keys = await load_keys(db, settings)
        if images is None:
            images = ImagePool(max_pixels=settings.max_pixels)
            stack.push_async_callback(images.close)
            await images.start()
        tagger = await open_tagger(settings, images)
        stack.push_async_callback(tagger.close)
        guard = AddressGuard(settings.webhook_allow_cidrs)
        outbound = await stack.enter_async_context(Outbound(guard))
        sender = WebhookSender(
            db,
            outbound,
            owner=owner,
            secret=keys.webhook_secret,
            schedule=settings.webhook_schedule,
        )
        webhook_loop = DueLoop(deliveries, db, sender.take, sender.send, held[deliveries])
        tagging = FileTagging(
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
            on_delivery=webhook_loop.wake,
        )
        run_loop = DueLoop(runs, db, tagging.take, tagging.run_due, held[runs])
        tagging.on_due_run = run_loop.wake
        stack.push_async_callback(_give_back, db, owner)
        stack.push_async_callback(tagging.close)
        await stack.enter_async_context(
            _running(run_loop.run(), webhook_loop.run(), keep_leases(db, held, owner))
        )
        yield Resources(settings, db, storage, keys, images, tagger, guard, outbound, tagging)


async def _open_storage(settings: Settings) -> LocalStorage:
    storage = LocalStorage(settings.storage_dir.resolve())
    try:
        await storage.open()
    except OSError as error:
        raise SettingsError(
            f"LOUPE_STORAGE_URL: {error.filename} cannot be made: {error.strerror}."
        ) from None
    return storage


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


def _remove_abandoned(directory: Path, older_than_seconds: float) -> None:
    """Staged files whose upload died with its process."""
    oldest = time.time() - older_than_seconds
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime <= oldest:
                path.unlink()


def create_app(resources: Resources) -> ASGIApp:
    """The web application over what is open already."""
    app = FastAPI(
        title="Loupe",
        version="0.1.0",
        description="A self-hosted, ImageKit-compatible media API that looks at your images.",
        redirect_slashes=False,
    )
    app.state.authenticator = Authenticator(resources.keys, resources.db)
    app.state.library = MediaLibrary(
        resources.db, resources.storage, resources.tagging, resources.guard
    )
    app.state.uploader = _uploader(resources, app.state.authenticator)
    app.state.delivery = Delivery(
        resources.db,
        resources.storage,
        Thumbnails(resources.images, resources.storage, THUMBNAIL_BOX_PX),
        resources.keys,
        resources.settings.imagekit_id,
    )
    install_error_handlers(app)
    app.include_router(upload_router)
    app.include_router(files_router)
    _add_health(app, resources)
    app.include_router(delivery_router, prefix=f"/{resources.settings.imagekit_id}")
    generate = app.openapi
    app.openapi = lambda: openapi.complete(generate())  # type: ignore[method-assign]
    return RequestLog(RefusedBodies(TrailingSlash(UploadCors(app))))


def _uploader(resources: Resources, authenticator: Authenticator) -> Uploader:
    settings = resources.settings
    return Uploader(
        resources.db,
        resources.storage,
        authenticator,
        resources.outbound,
        resources.guard,
        resources.tagging,
        UploadLimits(settings.max_upload_bytes, settings.max_pixels),
    )


def _add_health(app: FastAPI, resources: Resources) -> None:
    @app.get("/healthz", tags=["Health"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["Health"])
    async def readyz() -> Response:
        """Database and storage work; and which provider stands behind each extension."""
        providers = resources.tagger.provider_names()
        try:
            await resources.db.read(lambda tx: tx.execute(select(1)))
            await resources.storage.check()
        except Exception as error:
            log.error("not ready", exc_info=error)
            raise ApiError(503, f"Not ready: {type(error).__name__}.") from None
        return JsonResponse({"status": "ok", "providers": providers})
