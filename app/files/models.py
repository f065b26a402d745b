"""The media library's tables: folders, files and their versions."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Table, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, UtcDateTime, bytewise_text, json_column


class Folder(Base):
    """path: `/` for the root, else `/a/b` without a slash at the end."""

    __tablename__ = "folders"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    path: Mapped[str] = mapped_column(bytewise_text(), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class File(Base):
    """A name in a folder; everything else about it belongs to a version.

    current_version_id has no foreign key: file and version would need each other to be born.
    """

    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("folder_id", "name"),
        Index(None, "created_at", "id"),
        Index(None, "name"),
    )

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    folder_id: Mapped[str] = mapped_column(ForeignKey("folders.id"))
    name: Mapped[str] = mapped_column(bytewise_text())
    current_version_id: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class FileVersion(Base):
    """What was uploaded, and what is known and said about it.

    number: 1, 2, 3 ...; the first version's id is the file's. blob_key: where storage keeps it.
    width_px, height_px: as stored, before EXIF `orientation` is applied. ai_tags: `{name,
    confidence, source}` in the order that responses show them; null when there are none.
    """

    __tablename__ = "file_versions"
    __table_args__ = (UniqueConstraint("file_id", "number"),)

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"))
    number: Mapped[int]
    blob_key: Mapped[str] = mapped_column(Text, unique=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text)
    mime: Mapped[str] = mapped_column(Text)
    is_image: Mapped[bool]
    width_px: Mapped[int | None]
    height_px: Mapped[int | None]
    has_alpha: Mapped[bool | None]
    orientation: Mapped[int | None]
    is_private: Mapped[bool]
    is_published: Mapped[bool]
    tags: Mapped[list[str] | None] = mapped_column(json_column())
    ai_tags: Mapped[list[dict[str, Any]] | None] = mapped_column(json_column())
    custom_coordinates: Mapped[str | None] = mapped_column(Text)
    description: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


folders: Table = Folder.__table__  # type: ignore[assignment]
files: Table = File.__table__  # type: ignore[assignment]
versions: Table = FileVersion.__table__  # type: ignore[assignment]
