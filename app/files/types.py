"""What kind of file it is, by its content; the name decides only among texts."""

import mimetypes
from pathlib import PurePath

import puremagic

OCTET_STREAM = "application/octet-stream"
HEAD_BYTES = 8192
# What the standard table lacks, or says differently on some systems.
_TEXT_TYPES = {
    ".css": "text/css",
    ".csv": "text/csv",
    ".htm": "text/html",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".md": "text/markdown",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".xml": "application/xml",
}


def mime_type(head: bytes, name: str) -> str:
    """The type of a file that is not one of the images that Loupe reads.

    head: its first bytes. Binary by magic number, text by the name's extension.
    """
    if head.startswith(b"%PDF-"):  # may be all text
        return "application/pdf"
    if _is_text(head):
        suffix = PurePath(name).suffix.lower()
        guessed = _TEXT_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or ""
        return guessed if _is_text_type(guessed) else OCTET_STREAM
    try:
        return puremagic.from_string(head, mime=True) or OCTET_STREAM
    except (puremagic.PureError, ValueError):
        return OCTET_STREAM


def _is_text(head: bytes) -> bool:
    """True for UTF-8 without control characters, cut anywhere."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    return not any(c < " " and c not in "\t\n\r\f" for c in text)


def _is_text_type(mime: str) -> bool:
    return mime in _TEXT_TYPES.values() or mime.startswith("text/")


def is_shown_inline(mime: str) -> bool:
    """Media are shown; anything else is a download, so that no page of ours runs it."""
    return mime.split("/")[0] in ("image", "video", "audio")
