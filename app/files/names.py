"""File names, folder paths and texts as users send them, made safe to keep.

Source: the contract's sections 2.2 to 2.4. Bytes are stored under ids, never under these names.
"""

import secrets
import unicodedata

from app.errors import BadRequest

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 2000
MAX_FOLDER_LEVELS = 50
SUFFIX_CHARACTERS = 9
_KEPT_CATEGORIES = ("L", "M", "N")


def sanitise_file_name(name: str) -> str:
    """Letters, marks, numbers, `.`, `-` and `_` stay; every other character becomes `_`.

    Raises BadRequest when nothing is left to call the file, or it is too long.
    """
    if name.strip() in ("", ".", ".."):
        raise BadRequest("Your request is missing fileName parameter.")
    return _fit(_sanitise(name.strip(), ".-_"), "fileName")


def sanitise_folder_path(path: str) -> str:
    """An absolute path without a slash at the end (`/` is the root); doubled slashes are one.

    Raises BadRequest for `.` and `..`, more than 50 levels, and what is too long.
    """
    parts = [part.strip() for part in path.split("/")]
    parts = [part for part in parts if part]
    if any(part in (".", "..") for part in parts):
        raise BadRequest("'.' & '..' can not be used as folder-name", reason="INVALID_FOLDER_PATH")
    if len(parts) > MAX_FOLDER_LEVELS:
        raise BadRequest(
            "Your request contains invalid folder parameter. "
            f"Folders can be nested at most {MAX_FOLDER_LEVELS} levels deep.",
            reason="INVALID_FOLDER_PATH",
        )
    cleaned = "/" + "/".join(_fit(_sanitise(part, "-_"), "folder") for part in parts)
    if len(cleaned.encode()) > MAX_PATH_BYTES:
        raise BadRequest(
            f"Your request contains invalid folder parameter. "
            f"A folder path has at most {MAX_PATH_BYTES} bytes.",
            reason="INVALID_FOLDER_PATH",
        )
    return cleaned


def _sanitise(text: str, kept: str) -> str:
    normal = unicodedata.normalize("NFC", text)
    return "".join(
        c if c in kept or unicodedata.category(c)[0] in _KEPT_CATEGORIES else "_" for c in normal
    )


def _fit(name: str, parameter: str) -> str:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise BadRequest(
            f"Your request contains invalid {parameter} parameter. "
            f"A name has at most {MAX_NAME_BYTES} bytes."
        )
    return name


def with_unique_suffix(name: str) -> str:
    """`photo.jpg` -> `photo_Xy12-_abZ.jpg`."""
    suffix = secrets.token_urlsafe(SUFFIX_CHARACTERS)[:SUFFIX_CHARACTERS]
    base, dot, extension = name.rpartition(".")
    return f"{base}_{suffix}.{extension}" if dot and base else f"{name}_{suffix}"


def join_path(folder: str, name: str) -> str:
    """The file's absolute path."""
    return f"{folder.rstrip('/')}/{name}"


def split_path(path: str) -> tuple[str, str]:
    """An absolute file path as (folder, name)."""
    folder, _, name = path.rpartition("/")
    return folder or "/", name


def ancestors(folder: str) -> list[str]:
    """`/a/b` -> `["/", "/a", "/a/b"]`."""
    parts = [part for part in folder.split("/") if part]
    return ["/", *("/" + "/".join(parts[: i + 1]) for i in range(len(parts)))]


def has_control_characters(text: str) -> bool:
    """True for C0, DEL, C1 and lone surrogates: what no name or tag should carry."""
    if text.isprintable():  # almost always, and told in a glance
        return False
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def is_storable_text(text: str) -> bool:
    """False for NUL and lone surrogates, which no database keeps. Line breaks are fine."""
    return "\0" not in text and not any(unicodedata.category(c) == "Cs" for c in text)
