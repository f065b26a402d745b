"""One upload, end to end: stream in, validate, store, run the extensions, respond."""

import enum
import time
from typing import Any

import structlog
from sqlalchemy import Row
from starlette.requests import Request

from app import metrics
from app.auth import SIGNATURE_FIELDS, Authenticator
from app.db import Database, Tx
from app.errors import ApiError, BadRequest
from app.files.admission import Admission, NoRoom
from app.files.form import UploadForm, UploadLimits, read_upload_form
from app.files.idempotency import IdempotencyKey, idempotency_key, keep_answer
from app.files.objects import upload_object
from app.files.schemas import UploadFields
from app.files.service import Blob, RunContext, Stored, repeat_answer, store_upload
from app.files.staging import FileTooLarge, InvalidFile, StagedFile, Staging
from app.files.sweep import STORING_SECONDS
from app.files.tagging import FileTagging, KeepAnswer, WebhookRules
from app.ids import new_id
from app.outbound import AddressGuard, InvalidUrl, Outbound, OutboundError, TooLarge, check_url
from app.storage.base import Storage, StorageUnavailable

log = structlog.get_logger(__name__)

_BOTH_WAYS = (
    "Your request contains both {} and basic auth parameter. Use only one method, you "
    "might be exposing your private API key."
)


class UploadVersion(enum.Enum):
    V1 = "signature"
    V2 = "token"

    @property
    def signing_field(self) -> str:
        return self.value


class Uploader:
    """Takes uploads. Everything is validated before anything is stored."""

    def __init__(
        self,
        db: Database,
        storage: Storage,
        authenticator: Authenticator,
        outbound: Outbound,
        guard: AddressGuard,
        tagging: FileTagging,
        limits: UploadLimits,
        admission: Admission,
    ) -> None:
        self._db = db
        self._storage = storage
        self._authenticator = authenticator
        self._outbound = outbound
        self._guard = guard
        self._tagging = tagging
        self._limits = limits
        self._admission = admission

    async def upload(
        self, request: Request, request_id: str, version: UploadVersion = UploadVersion.V1
    ) -> dict[str, Any]:
        """The answer to one upload. The versions differ in how clients without a key sign.

        Raises ApiError.
        """
        store_by_seconds = time.monotonic() + self._limits.deadline_seconds + STORING_SECONDS
        api_key = self._private_key(request)
        with self._admission.one():
            staging = Staging(self._storage.staging_dir, self._limits.max_bytes)
            try:
                form = await read_upload_form(request, staging, self._limits)
                await self._authenticate_form(form, api_key, version)
                upload = self._validate(form)
                file = form.file_url or (await _finish(staging, upload)).sha256
                key = self._idempotency_key(request, api_key, form, file)
                if key is not None and (answer := await self._repeated(key, upload)) is not None:
                    return answer
                if form.file_url is not None:
                    await self._fetch(form.file_url, staging)
                staged = await _finish(staging, upload)
                blob = self._blob(staged)
                await self._storage.put(staged.file, blob.key)
            finally:
                staging.discard()
        return await self._store_and_tag(upload, blob, key, request_id, store_by_seconds)

    def _private_key(self, request: Request) -> str | None:
        """The private key that the request came with; None if it came without a header."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        return self._authenticator.require_private_key(authorization)

    async def _authenticate_form(
        self, form: UploadForm, api_key: str | None, version: UploadVersion
    ) -> None:
        if api_key is not None:
            if version.signing_field in form.fields:
                raise BadRequest(_BOTH_WAYS.format(version.signing_field))
            return
        if version is UploadVersion.V1:
            await self._authenticator.require_upload_signature(form.fields)
        else:
            await self._authenticator.require_upload_token(form.fields)
        self._restrict_client(form)

    def _restrict_client(self, form: UploadForm) -> None:
        """A browser's upload may be kept from costing money or calling other servers."""
        if not self._limits.restrict_client_params:
            return
        for name in ("extensions", "webhookUrl"):
            if form.fields.get(name):
                raise BadRequest(
                    f"Your request contains {name} parameter, which this server does not accept "
                    "from client-side uploads."
                )

    def _idempotency_key(
        self, request: Request, api_key: str | None, form: UploadForm, file: str
    ) -> IdempotencyKey | None:
        """Only with a private key: a signed client upload's token is used once anyway."""
        if api_key is None:
            return None
        return idempotency_key(
            request.headers.get("idempotency-key"),
            api_key,
            form.fields,
            file,
            self._tagging.budget_seconds,
        )

    async def _repeated(self, key: IdempotencyKey, upload: UploadFields) -> dict[str, Any] | None:
        return await self._db.write(repeat_answer, key, upload, self._tagging.rules.urls)

    def _validate(self, form: UploadForm) -> UploadFields:
        if not form.has_file:
            raise BadRequest("Your request is missing file parameter.")
        fields = {k: v for k, v in form.fields.items() if k not in SIGNATURE_FIELDS}
        upload = UploadFields.parse(fields)
        check_webhook_url(upload.webhook_url, self._guard)
        return upload

    async def _fetch(self, url: str, staging: Staging) -> None:
        """A remote file that is too large is the caller's choice of URL, hence 400."""
        try:
            check_url(url, guard=self._guard)
            async with self._outbound.fetch(url, max_bytes=self._limits.max_bytes) as chunks:
                async for chunk in chunks:
                    await staging.write(chunk)
        except InvalidUrl as error:
            raise InvalidFile(str(error)) from None
        except (TooLarge, FileTooLarge):
            raise InvalidFile("The file size exceeds limits.") from None
        except OutboundError as error:
            raise InvalidFile(str(error)) from None

    def _blob(self, staged: StagedFile) -> Blob:
        """What the content is. A header that libvips cannot read makes it a non-image."""
        key, header = new_id(), staged.header
        if header is None:
            return Blob(key, staged.size_bytes, staged.sha256, staged.mime)
        if not 0 < header.width_px * header.height_px <= self._limits.max_pixels:
            raise InvalidFile(
                f"An image has at least 1 and at most {self._limits.max_pixels} pixels."
            )
        return Blob(
            key,
            staged.size_bytes,
            staged.sha256,
            staged.mime,
            header.width_px,
            header.height_px,
            header.has_alpha,
            header.orientation,
        )

    async def _store_and_tag(
        self,
        upload: UploadFields,
        blob: Blob,
        key: IdempotencyKey | None,
        request_id: str,
        store_by_seconds: float,
    ) -> dict[str, Any]:
        rules = self._tagging.rules
        context = RunContext(self._tagging.owner, request_id)
        try:
            stored = await self._db.write(
                _store_in_time, store_by_seconds, upload, blob, rules, context, key
            )
        except ApiError:
            # Known to be rolled back; after any other error the row may stand.
            await self._delete(blob.key)
            raise
        metrics.upload_bytes.inc(blob.size_bytes)
        if stored.told:
            self._tagging.on_delivery()
        if not stored.runs:
            return upload_object(stored.version, rules.urls, upload.response_fields, None)
        version, statuses = await self._tagging.run_within_budget(
            stored.runs, stored.version, self._answer_keeper(key, upload)
        )
        return upload_object(version, rules.urls, upload.response_fields, statuses)

    async def _delete(self, blob_key: str) -> None:
        """Failing that, the sweep does it."""
        try:
            await self._storage.delete(blob_key)
        except StorageUnavailable as error:
            log.error("cannot delete a blob", key=blob_key, exc_info=error)

    def _answer_keeper(self, key: IdempotencyKey | None, upload: UploadFields) -> KeepAnswer | None:
        if key is None:
            return None
        urls = self._tagging.rules.urls

        def keep(tx: Tx, version: Row[Any], statuses: dict[str, str]) -> None:
            keep_answer(tx, key, upload_object(version, urls, upload.response_fields, statuses))

        return keep


async def _finish(staging: Staging, upload: UploadFields) -> StagedFile:
    if staging.size_bytes == 0:
        raise BadRequest("Your request is missing file parameter.")
    return await staging.finish(upload.file_name)


def _store_in_time(
    tx: Tx,
    store_by_seconds: float,
    upload: UploadFields,
    blob: Blob,
    rules: WebhookRules,
    context: RunContext,
    key: IdempotencyKey | None,
) -> Stored:
    """store_by_seconds: of time.monotonic(). The blob of an upload that took longer, or whose
    process was frozen, may have been swept."""
    if time.monotonic() > store_by_seconds:
        raise NoRoom("Your request took too long. Please try again later.")
    return store_upload(tx, upload, blob, rules, context, key)


def check_webhook_url(url: str | None, guard: AddressGuard) -> None:
    """Raises BadRequest for a URL that no webhook can be sent to."""
    if url is None:
        return
    try:
        check_url(url, guard=guard)
    except InvalidUrl as error:
        raise BadRequest(
            f"Your request contains invalid value for webhookUrl parameter. {error}"
        ) from None
