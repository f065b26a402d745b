"""The media library's transactions: store, read, list, update, delete."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    Row,
    Select,
    Text,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.db import Tx
from app.errors import ApiError, BadRequest
from app.extensions.provider import Reason
from app.extensions.runs import announce_pending, latest_statuses, start_runs
from app.extensions.schemas import AutoTagging
from app.extensions.tags import remove_names
from app.files.idempotency import (
    IdempotencyKey,
    StillRunning,
    claim_key,
    find_repeat,
    keep_answer,
)
from app.files.models import files, folders, versions
from app.files.names import ancestors, with_unique_suffix
from app.files.objects import (
    listed_object,
    read_current_version,
    read_version,
    select_current_versions,
    upload_object,
)
from app.files.schemas import ListQuery, UpdateRequest, UploadFields
from app.files.tagging import WebhookRules, end_runs
from app.files.urls import FileUrls
from app.ids import is_id, new_id
from app.prepared import Prepared

MAX_VERSIONS = 100
# Rows of a list that are read and made into objects in about a millisecond.
MAX_SHORT_READ = 250


class FileNotFound(ApiError):
    def __init__(self) -> None:
        super().__init__(404, "The requested file does not exist.")


class InvalidFileId(BadRequest):
    def __init__(self) -> None:
        super().__init__("Your request contains invalid fileId parameter.")


class NameTaken(BadRequest):
    def __init__(self) -> None:
        super().__init__(
            "A file with the same name already exists at the exact location. We could not "
            "overwrite it because both overwriteFile and useUniqueFileName are set to false."
        )


class TooManyVersions(BadRequest):
    def __init__(self) -> None:
        super().__init__(
            f"The file has {MAX_VERSIONS} versions already, which is the limit. "
            "Delete the file or upload under another name.",
            reason="VERSION_LIMIT_EXCEEDED",
        )


@dataclass(frozen=True, slots=True)
class Blob:
    """What was stored, and what its content says of it. Sizes in pixels are null for non-images."""

    key: str
    size_bytes: int
    sha256: str
    mime: str
    width_px: int | None = None
    height_px: int | None = None
    has_alpha: bool | None = None
    orientation: int | None = None

    @property
    def is_image(self) -> bool:
        return self.width_px is not None


@dataclass(frozen=True, slots=True)
class RunContext:
    """Who runs the extensions that a request asks for, and on whose behalf."""

    owner: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Stored:
    """told: whether a delivery was inserted."""

    version: Row[Any]
    runs: Sequence[Row[Any]]
    told: bool = False


_lock_file_at = Prepared(
    select(files)
    .where(files.c.folder_id == bindparam("folder_id"), files.c.name == bindparam("name"))
    .with_for_update()
)
_insert_into_files = Prepared(insert(files))
_insert_into_versions = Prepared(insert(versions))
_folder_at = Prepared(select(folders.c.id).where(folders.c.path == bindparam("path")))


def store_upload(
    tx: Tx,
    upload: UploadFields,
    blob: Blob,
    rules: WebhookRules,
    context: RunContext,
    key: IdempotencyKey | None = None,
) -> Stored:
    """The file, or a new version of it, and a run for each extension.

    key: claimed with it; a repeat that comes while the first runs raises StillRunning.
    """
    if key is not None and find_repeat(tx, key) is not None:
        raise StillRunning
    folder_id = ensure_folder(tx, upload.folder)
    name = with_unique_suffix(upload.file_name) if upload.use_unique_file_name else upload.file_name
    existing = _lock_file_at.one_or_none(tx, folder_id=folder_id, name=name)
    told = False
    if existing is None:
        version_id = _insert_file(tx, folder_id, name, upload, blob)
    elif not upload.overwrite_file:
        raise NameTaken
    else:
        version_id = _insert_next_version(tx, existing, upload, blob)
        told = end_runs(tx, rules, existing.current_version_id, Reason.FILE_REPLACED)
    version = read_version(tx, version_id)
    assert version is not None
    runs = _start(tx, version, upload.extensions, upload.webhook_url, context)
    if key is not None:
        claim_key(tx, key, version.file_id, version_id)
        if not runs:
            keep_answer(tx, key, upload_object(version, rules.urls, upload.response_fields, None))
    return Stored(version, runs, told)


def repeat_answer(
    tx: Tx, key: IdempotencyKey, upload: UploadFields, urls: FileUrls
) -> dict[str, Any] | None:
    """What an earlier upload under this key was answered; None if there was none.

    If its process died before it could answer, the answer is made now, as it would have been.
    """
    repeat = find_repeat(tx, key)
    if repeat is None or repeat.answer is not None:
        return None if repeat is None else repeat.answer
    version = read_version(tx, repeat.version_id)
    if version is None:
        raise FileNotFound
    announce_pending(tx, version.id)
    statuses = latest_statuses(tx, version.id) if upload.extensions else None
    answer = upload_object(version, urls, upload.response_fields, statuses)
    keep_answer(tx, key, answer)
    return answer


def _start(
    tx: Tx,
    version: Row[Any],
    wanted: Sequence[AutoTagging],
    webhook_url: str | None,
    context: RunContext,
) -> Sequence[Row[Any]]:
    return start_runs(
        tx,
        wanted,
        file_id=version.file_id,
        version_id=version.id,
        webhook_url=webhook_url,
        owner=context.owner,
        request_id=context.request_id,
    )


def ensure_folder(tx: Tx, path: str) -> str:
    """The folder's id; it and its parents are made if they are missing."""
    folder_id = _folder_id(tx, path)
    if folder_id is not None:
        return folder_id
    put = postgresql.insert if tx.is_postgres else sqlite.insert
    now = tx.clock.now()
    for ancestor in ancestors(path):
        tx.execute(
            put(folders)
            .values(id=new_id(), path=ancestor, created_at=now, updated_at=now)
            .on_conflict_do_nothing()
        )
    folder_id = _folder_id(tx, path)
    assert folder_id is not None
    return folder_id


def _folder_id(tx: Tx, path: str) -> str | None:
    folder = _folder_at.one_or_none(tx, path=path)
    return None if folder is None else folder.id


def _insert_file(tx: Tx, folder_id: str, name: str, upload: UploadFields, blob: Blob) -> str:
    """The first version has the file's own id."""
    file_id = new_id()
    values = _version_values(tx, upload, blob)
    _insert_into_files.run(
        tx,
        id=file_id,
        folder_id=folder_id,
        name=name,
        current_version_id=file_id,
        created_at=values["created_at"],
    )
    _insert_into_versions.run(tx, id=file_id, file_id=file_id, number=1, **values)
    return file_id


def _insert_next_version(tx: Tx, file: Row[Any], upload: UploadFields, blob: Blob) -> str:
    latest = tx.execute(
        select(func.max(versions.c.number), func.count().label("versions")).where(
            versions.c.file_id == file.id
        )
    ).one()
    if latest.versions >= MAX_VERSIONS:
        raise TooManyVersions
    current = tx.execute(
        select(versions.c.tags, versions.c.ai_tags)
        .where(versions.c.id == file.current_version_id)
        .with_for_update()
    ).one()
    values = _version_values(tx, upload, blob)
    if upload.tags is None and not upload.overwrite_tags:
        values["tags"] = current.tags
    if not upload.overwrite_ai_tags:
        values["ai_tags"] = current.ai_tags
    version_id = new_id()
    _insert_into_versions.run(tx, id=version_id, file_id=file.id, number=latest[0] + 1, **values)
    tx.execute(update(files).where(files.c.id == file.id).values(current_version_id=version_id))
    return version_id


def _version_values(tx: Tx, upload: UploadFields, blob: Blob) -> dict[str, Any]:
    now = tx.clock.now()
    return {
        "blob_key": blob.key,
        "size_bytes": blob.size_bytes,
        "sha256": blob.sha256,
        "mime": blob.mime,
        "is_image": blob.is_image,
        "width_px": blob.width_px,
        "height_px": blob.height_px,
        "has_alpha": blob.has_alpha,
        "orientation": blob.orientation,
        "is_private": upload.is_private_file,
        "is_published": upload.is_published,
        "tags": upload.tags,
        "ai_tags": None,
        "custom_coordinates": upload.custom_coordinates if blob.is_image else None,
        "description": upload.description,
        "created_at": now,
        "updated_at": now,
    }


def check_file_id(file_id: str) -> None:
    if not is_id(file_id):
        raise InvalidFileId


def current_version(tx: Tx, file_id: str) -> Row[Any]:
    """Raises FileNotFound."""
    version = read_current_version(tx, file_id)
    if version is None:
        raise FileNotFound
    return version


def update_details(
    tx: Tx,
    file_id: str,
    request: UpdateRequest,
    context: RunContext,
) -> Stored:
    """Changes what the request names on the current version, then starts its extensions."""
    current_version_id = tx.execute(
        select(files.c.current_version_id).where(files.c.id == file_id).with_for_update()
    ).scalar_one_or_none()
    if current_version_id is None:
        raise FileNotFound
    if request.publish is not None:
        _publish(tx, file_id, current_version_id, request)
    else:
        _change_version(tx, current_version_id, request)
    version = read_version(tx, current_version_id)
    assert version is not None
    return Stored(version, _start(tx, version, request.extensions, request.webhook_url, context))


def _publish(tx: Tx, file_id: str, version_id: str, request: UpdateRequest) -> None:
    assert request.publish is not None
    which = (
        versions.c.file_id == file_id
        if request.publish.include_file_versions
        else versions.c.id == version_id
    )
    tx.execute(
        update(versions)
        .where(which)
        .values(is_published=request.publish.is_published, updated_at=tx.clock.now())
    )


def _change_version(tx: Tx, version_id: str, request: UpdateRequest) -> None:
    existing = tx.execute(
        select(versions.c.ai_tags, versions.c.is_image)
        .where(versions.c.id == version_id)
        .with_for_update()
    ).one()
    sent = request.model_fields_set
    changes: dict[str, Any] = {}
    if "tags" in sent:
        changes["tags"] = request.tags
    if "description" in sent:
        changes["description"] = request.description
    if "custom_coordinates" in sent:
        changes["custom_coordinates"] = request.custom_coordinates if existing.is_image else None
    if request.remove_ai_tags == "all":
        changes["ai_tags"] = None
    elif request.remove_ai_tags:
        changes["ai_tags"] = remove_names(existing.ai_tags, request.remove_ai_tags)
    if changes:
        tx.execute(
            update(versions)
            .where(versions.c.id == version_id)
            .values(updated_at=tx.clock.now(), **changes)
        )


def delete_file(tx: Tx, file_id: str, rules: WebhookRules) -> tuple[list[str], bool]:
    """Deletes the file with all its versions, and ends what still runs on them.

    Returns the keys of its blobs, to be deleted after the commit, and whether a delivery was
    inserted.
    """
    file = tx.execute(
        select(files.c.current_version_id).where(files.c.id == file_id).with_for_update()
    ).one_or_none()
    if file is None:
        raise FileNotFound
    told = end_runs(tx, rules, file.current_version_id, Reason.FILE_DELETED)
    blob_keys = tx.execute(
        select(versions.c.blob_key).where(versions.c.file_id == file_id)
    ).scalars()
    keys = list(blob_keys)
    tx.execute(delete(files).where(files.c.id == file_id))
    return keys, told


def is_short_read(query: ListQuery) -> bool:
    """Whether a list reads no more rows than it skips and shows, and those are few.

    Only in order of creation and unfiltered: whole folders can hold files of one name.
    """
    filters = (query.folder, query.name, query.is_image, query.tags or None)
    is_read_in_order = query.sort_field not in _SORT_COLUMNS and not any(
        value is not None for value in filters
    )
    return is_read_in_order and query.skip + query.limit <= MAX_SHORT_READ


def list_files(tx: Tx, query: ListQuery, urls: FileUrls) -> list[dict[str, Any]]:
    """Current versions, as a list shows them."""
    filters = {
        "folder": query.folder,
        "name": query.name,
        "is_image": query.is_image,
        "tags": query.tags or None,
    }
    wanted = {name: value for name, value in filters.items() if value is not None}
    listing = _listing(frozenset(wanted), query.sort_field, query.descending, tx.is_postgres)
    rows = listing.all(tx, **wanted, limit=query.limit, skip=query.skip)
    return [listed_object(row, urls) for row in rows]


@cache
def _listing(
    filters: frozenset[str], sort_field: str, descending: bool, is_postgres: bool
) -> Prepared:
    """A list's statement: few of all those that there can be are ever asked for."""
    conditions = {
        "folder": folders.c.path == bindparam("folder"),
        "name": files.c.name == bindparam("name"),
        "is_image": versions.c.is_image == bindparam("is_image"),
        "tags": _has_any_tag(is_postgres),
    }
    statement = select_current_versions().where(*(conditions[name] for name in sorted(filters)))
    in_order = _sorted(statement, sort_field, descending)
    return Prepared(in_order.limit(bindparam("limit")).offset(bindparam("skip")))


_SORT_COLUMNS = {
    "NAME": files.c.name,
    "UPDATED": versions.c.updated_at,
    "HEIGHT": versions.c.height_px,
    "WIDTH": versions.c.width_px,
    "SIZE": versions.c.size_bytes,
}


def _sorted(statement: Select[Any], field: str, descending: bool) -> Select[Any]:
    """What cannot be sorted by (relevance of no search, duration of no video) is by creation."""
    column = _SORT_COLUMNS.get(field, files.c.created_at)
    if descending:
        return statement.order_by(column.desc().nulls_last(), files.c.id.desc())
    return statement.order_by(column.asc().nulls_last(), files.c.id)


def _has_any_tag(is_postgres: bool) -> ColumnElement[bool]:
    if is_postgres:
        stored: Any = type_coerce(versions.c.tags, JSONB)
        matches: ColumnElement[bool] = stored.has_any(bindparam("tags", type_=ARRAY(Text)))
        return matches
    each = func.json_each(versions.c.tags).table_valued("value")
    wanted = func.json_each(bindparam("tags", type_=JSON)).table_valued("value")
    return exists().select_from(each).where(each.c.value.in_(select(wanted.c.value)))
