"""Reads a file's version and builds the JSON objects that responses and webhooks show."""

from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, bindparam, select

from app.db import Tx
from app.extensions.runs import latest_statuses
from app.files.models import files, folders, versions
from app.files.names import join_path
from app.files.urls import FileUrls
from app.prepared import Prepared

_COLUMNS = (
    *versions.c,
    files.c.name,
    files.c.created_at.label("file_created_at"),
    files.c.current_version_id,
    folders.c.path.label("folder_path"),
)


def select_current_versions() -> Select[Any]:
    """Each file's current version, with the file's name and folder.

    Joined by one key each: PostgreSQL takes two for rarer than they are, and then reads all files.
    """
    return (
        select(*_COLUMNS)
        .select_from(files)
        .join(versions, versions.c.id == files.c.current_version_id)
        .join(folders, folders.c.id == files.c.folder_id)
    )


_read_version = Prepared(
    select(*_COLUMNS)
    .join(files, files.c.id == versions.c.file_id)
    .join(folders, folders.c.id == files.c.folder_id)
    .where(versions.c.id == bindparam("version_id"))
)
_read_current = Prepared(select_current_versions().where(files.c.id == bindparam("file_id")))


def read_version(tx: Tx, version_id: str) -> Row[Any] | None:
    version: Row[Any] | None = _read_version.one_or_none(tx, version_id=version_id)
    return version


def read_current_version(tx: Tx, file_id: str) -> Row[Any] | None:
    version: Row[Any] | None = _read_current.one_or_none(tx, file_id=file_id)
    return version


def file_path(version: Row[Any]) -> str:
    return join_path(version.folder_path, version.name)


def file_object(tx: Tx, version: Row[Any], urls: FileUrls) -> dict[str, Any]:
    """A file's details, with the status of the latest run of each extension."""
    statuses = latest_statuses(tx, version.id)
    return listed_object(version, urls) | ({"extensionStatus": statuses} if statuses else {})


def listed_object(version: Row[Any], urls: FileUrls) -> dict[str, Any]:
    """A file as a list shows it. Source: the contract's section 4.1."""
    path = file_path(version)
    details: dict[str, Any] = {
        "type": "file" if version.id == version.current_version_id else "file-version",
        "fileId": version.file_id,
        "name": version.name,
        "filePath": path,
        "tags": version.tags,
        "AITags": version.ai_tags,
        "versionInfo": _version_info(version),
        "embeddedMetadata": None,
        "customCoordinates": version.custom_coordinates,
        "customMetadata": {},
        "isPrivateFile": version.is_private,
        "isPublished": version.is_published,
        "url": urls.file(path),
        "fileType": _file_type(version),
        "mime": version.mime,
        "size": version.size_bytes,
        "createdAt": iso_milliseconds(version.file_created_at),
        "updatedAt": iso_milliseconds(version.updated_at),
    }
    if version.is_image:
        details["thumbnail"] = urls.thumbnail(path)
        details["height"] = version.height_px
        details["width"] = version.width_px
        details["hasAlpha"] = version.has_alpha
    if version.description is not None:
        details["description"] = version.description
    return details


def upload_object(
    version: Row[Any],
    urls: FileUrls,
    response_fields: set[str],
    statuses: dict[str, str] | None,
) -> dict[str, Any]:
    """The answer to an upload. Source: the contract's section 2.9.

    statuses: of the extensions of this request; None when it asked for none.
    """
    path = file_path(version)
    answer: dict[str, Any] = {
        "fileId": version.file_id,
        "name": version.name,
        "size": version.size_bytes,
        "versionInfo": _version_info(version),
        "filePath": path,
        "url": urls.file(path),
        "fileType": _file_type(version),
        "AITags": version.ai_tags,
    }
    if version.is_image:
        answer["height"] = version.height_px
        answer["width"] = version.width_px
        answer["orientation"] = version.orientation
        answer["thumbnailUrl"] = urls.thumbnail(path)
    on_request = {
        "tags": version.tags,
        "customCoordinates": version.custom_coordinates,
        "isPrivateFile": version.is_private,
        "isPublished": version.is_published,
        "customMetadata": {},
    }
    answer |= {key: value for key, value in on_request.items() if key in response_fields}
    if version.description is not None:
        answer["description"] = version.description
    if statuses is not None:
        answer["extensionStatus"] = statuses
    return answer


def _version_info(version: Row[Any]) -> dict[str, str]:
    return {"id": version.id, "name": f"Version {version.number}"}


def _file_type(version: Row[Any]) -> str:
    return "image" if version.is_image else "non-image"


def iso_milliseconds(when: datetime) -> str:
    return when.isoformat(timespec="milliseconds")[: -len("+00:00")] + "Z"
