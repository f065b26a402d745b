"""Reads a file's version and builds the JSON objects that responses and webhooks show."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, bindparam, select, type_coerce

from app.db import Tx
from app.extensions.runs import latest_statuses
from app.files.models import files, folders, versions
from app.files.names import join_path
from app.files.urls import FileUrls
from app.prepared import Prepared
from app.wire import IsoTime, ReadyJson

# What responses and webhooks show, in the order in which `listed_object` unpacks it.
_SHOWN = (
    versions.c.id,
    versions.c.file_id,
    files.c.name,
    folders.c.path.label("folder_path"),
    type_coerce(versions.c.tags, ReadyJson()).label("tags"),
    type_coerce(versions.c.ai_tags, ReadyJson()).label("ai_tags"),
    versions.c.number,
    versions.c.custom_coordinates,
    versions.c.is_private,
    versions.c.is_published,
    versions.c.is_image,
    versions.c.mime,
    versions.c.size_bytes,
    type_coerce(files.c.created_at, IsoTime()).label("created_at"),
    type_coerce(versions.c.updated_at, IsoTime()).label("updated_at"),
    versions.c.height_px,
    versions.c.width_px,
    versions.c.has_alpha,
    versions.c.description,
)


def select_current_versions() -> Select[Any]:
    """What is shown of each file's current version.

    Joined by one key each: PostgreSQL takes two for rarer than they are, and then reads all files.
    """
    return (
        select(*_SHOWN)
        .select_from(files)
        .join(versions, versions.c.id == files.c.current_version_id)
        .join(folders, folders.c.id == files.c.folder_id)
    )


_read_version = Prepared(
    select(*_SHOWN, files.c.current_version_id, versions.c.orientation, versions.c.blob_key)
    .join(files, files.c.id == versions.c.file_id)
    .join(folders, folders.c.id == files.c.folder_id)
    .where(versions.c.id == bindparam("version_id"))
)
_read_current = Prepared(
    select_current_versions()
    .add_columns(files.c.current_version_id)
    .where(files.c.id == bindparam("file_id"))
)


def read_version(tx: Tx, version_id: str) -> Row[Any] | None:
    version: Row[Any] | None = _read_version.one_or_none(tx, version_id=version_id)
    return version


def read_current_version(tx: Tx, file_id: str) -> Row[Any] | None:
    version: Row[Any] | None = _read_current.one_or_none(tx, file_id=file_id)
    return version


def file_object(tx: Tx, version: Row[Any], urls: FileUrls) -> dict[str, Any]:
    """A file's details, with the status of the latest run of each extension."""
    statuses = latest_statuses(tx, version.id)
    return version_object(version, urls) | ({"extensionStatus": statuses} if statuses else {})


def version_object(version: Row[Any], urls: FileUrls) -> dict[str, Any]:
    """Of any version: it may have been replaced while its extensions ran."""
    kind = "file" if version.id == version.current_version_id else "file-version"
    return listed_object(version, urls) | {"type": kind}


def listed_object(version: Sequence[Any], urls: FileUrls) -> dict[str, Any]:
    """A file's current version, as a list shows it. Source: the contract's section 4.1."""
    # Unpacked at once, since a list has hundreds of rows: by name each value would cost twice.
    (
        version_id,
        file_id,
        name,
        folder_path,
        tags,
        ai_tags,
        number,
        custom_coordinates,
        is_private,
        is_published,
        is_image,
        mime,
        size_bytes,
        created_at,
        updated_at,
        height_px,
        width_px,
        has_alpha,
        description,
        *_,
    ) = version
    path = join_path(folder_path, name)
    url, thumbnail = urls.file_and_thumbnail(path)
    details: dict[str, Any] = {
        "type": "file",
        "fileId": file_id,
        "name": name,
        "filePath": path,
        "tags": tags,
        "AITags": ai_tags,
        "versionInfo": {"id": version_id, "name": f"Version {number}"},
        "embeddedMetadata": None,
        "customCoordinates": custom_coordinates,
        "customMetadata": {},
        "isPrivateFile": is_private,
        "isPublished": is_published,
        "url": url,
        "fileType": "image" if is_image else "non-image",
        "mime": mime,
        "size": size_bytes,
        "createdAt": created_at,
        "updatedAt": updated_at,
    }
    if is_image:
        details["thumbnail"] = thumbnail
        details["height"] = height_px
        details["width"] = width_px
        details["hasAlpha"] = has_alpha
    if description is not None:
        details["description"] = description
    return details


_ALWAYS_ANSWERED = (
    "fileId",
    "name",
    "size",
    "versionInfo",
    "filePath",
    "url",
    "fileType",
    "AITags",
)
_ANSWERED_ON_REQUEST = (
    "tags",
    "customCoordinates",
    "isPrivateFile",
    "isPublished",
    "customMetadata",
)


def upload_object(
    version: Row[Any],
    urls: FileUrls,
    response_fields: set[str],
    statuses: dict[str, str] | None,
) -> dict[str, Any]:
    """The answer to an upload. Source: the contract's section 2.9.

    statuses: of the extensions of this request; None when it asked for none.
    """
    shown = listed_object(version, urls)
    answer = {key: shown[key] for key in _ALWAYS_ANSWERED}
    if version.is_image:
        answer["height"] = version.height_px
        answer["width"] = version.width_px
        answer["orientation"] = version.orientation
        answer["thumbnailUrl"] = shown["thumbnail"]
    answer |= {key: shown[key] for key in _ANSWERED_ON_REQUEST if key in response_fields}
    if version.description is not None:
        answer["description"] = version.description
    if statuses is not None:
        answer["extensionStatus"] = statuses
    return answer
