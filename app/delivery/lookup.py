"""Finds what a delivery URL names. It stands before every delivery, and reads no more than that."""

from typing import Any

from sqlalchemy import ColumnElement, Row, Select, bindparam, select

from app.db import Tx
from app.files.models import files, folders, versions
from app.files.names import split_path
from app.prepared import Prepared


def _select_joined_on(joined_on: ColumnElement[bool], *where: ColumnElement[bool]) -> Select[Any]:
    """Just what a delivery needs to know of a version at a path."""
    return (
        select(
            files.c.name,
            versions.c.blob_key,
            versions.c.size_bytes,
            versions.c.sha256,
            versions.c.mime,
            versions.c.is_image,
            versions.c.is_private,
            versions.c.is_published,
            versions.c.created_at,
        )
        .select_from(files)
        .join(versions, joined_on)
        .join(folders, folders.c.id == files.c.folder_id)
        .where(
            folders.c.path == bindparam("at_folder"), files.c.name == bindparam("at_name"), *where
        )
    )


_read_current = Prepared(_select_joined_on(versions.c.id == files.c.current_version_id))
_read_named = Prepared(
    _select_joined_on(versions.c.file_id == files.c.id, versions.c.id == bindparam("version_id"))
)


def read_version_at(tx: Tx, path: str, version_id: str | None = None) -> Row[Any] | None:
    """The current version of the file at an absolute path, or the version of it that is named."""
    folder, name = split_path(path)
    at = {"at_folder": folder, "at_name": name}
    version: Row[Any] | None
    if version_id is None:
        version = _read_current.one_or_none(tx, **at)
    else:
        version = _read_named.one_or_none(tx, **at, version_id=version_id)
    return version
