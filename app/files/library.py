"""What the media API does besides uploading: details, list, update, delete."""

from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Row

from app.db import Database, Tx
from app.files.objects import file_object, version_object
from app.files.schemas import ListQuery, UpdateRequest
from app.files.service import (
    RunContext,
    check_file_id,
    current_version,
    delete_file,
    is_short_read,
    list_files,
    update_details,
)
from app.files.tagging import FileTagging
from app.files.upload import check_webhook_url
from app.files.urls import FileUrls
from app.outbound import AddressGuard
from app.storage.base import Storage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MediaLibrary:
    db: Database
    storage: Storage
    tagging: FileTagging
    guard: AddressGuard

    @property
    def _urls(self) -> FileUrls:
        return self.tagging.rules.urls

    async def details(self, file_id: str) -> dict[str, Any]:
        check_file_id(file_id)
        return await self.db.read(_read_details, file_id, self._urls)

    async def list(self, query: ListQuery) -> list[dict[str, Any]]:
        run = self.db.read if is_short_read(query) else self.db.scan
        return await run(list_files, query, self._urls)

    async def update(self, file_id: str, body: bytes, request_id: str) -> dict[str, Any]:
        """The file as it is now; with the status of this request's extensions if it has any."""
        check_file_id(file_id)
        request = UpdateRequest.parse(body)
        check_webhook_url(request.webhook_url, self.guard)
        context = RunContext(self.tagging.owner, request_id)
        stored = await self.db.write(update_details, file_id, request, context)
        if not stored.runs:
            return version_object(stored.version, self._urls)
        version: Row[Any]
        version, statuses = await self.tagging.run_within_budget(stored.runs, stored.version)
        return version_object(version, self._urls) | {"extensionStatus": statuses}

    async def delete(self, file_id: str) -> None:
        check_file_id(file_id)
        blob_keys, told = await self.db.write(delete_file, file_id, self.tagging.rules)
        if told:
            self.tagging.on_delivery()
        for key in blob_keys:
            try:
                await self.storage.delete(key)
            except OSError as error:
                log.error("cannot delete a blob", key=key, exc_info=error)


def _read_details(tx: Tx, file_id: str, urls: FileUrls) -> dict[str, Any]:
    return file_object(tx, current_version(tx, file_id), urls)
