"""What a file says of itself, read in this process: never a pixel."""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from app.images.jpeg import read_usual_jpeg
from app.images.vips import loader, pyvips

# Enough of a file for `sniff_image`.
SNIFF_BYTES = 256

# libvips walks all chunks of a file for its header, in the worst case for a minute and with half a
# gigabyte. So it gets to see only what the size needs, or only files with few parts.
_MAX_PARTS = 4096
_MAX_TIFF_PAGES = 1024
_MAX_SMALL_CHUNK_BYTES = 65_536
_GIF_HEAD_BYTES = 262_144
_AFTER_HEADER_BYTES = 64

# SOF0 to SOF15 without DHT, JPG and DAC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a file says of itself. Sizes are as stored: before `orientation` (EXIF, 1-8) is applied.

    An animation has the size of one frame. A size may be 0, or more than can be decoded.
    """

    mime: str
    width_px: int
    height_px: int
    has_alpha: bool
    orientation: int


def sniff_image(head: bytes) -> str | None:
    """The MIME type by a file's first `SNIFF_BYTES`, or None if it is none of the six formats."""
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(_TIFF_MAGIC):
        return "image/tiff"
    if head[4:8] == b"ftyp" and _is_avif(head):
        return "image/avif"
    return None


def _is_avif(head: bytes) -> bool:
    """HEIC has the same container, with other brands. Source: ISO 14496-12, 4.3; AV1 in HEIF, 4."""
    box = head[: int.from_bytes(head[:4])]
    brands = {box[8:12], *(box[i : i + 4] for i in range(16, len(box), 4))}
    return bool(brands & {b"avif", b"avis"})


def read_header(source: Path | bytes) -> ImageHeader | None:
    """What kind of image a file is, or None if it is none or its header is broken.

    source: where the file is, or its whole content. No pixel is decoded. Raises OSError if the file
    cannot be read, else nothing for any content.
    """
    with source.open("rb") if isinstance(source, Path) else BytesIO(source) as file:
        mime = sniff_image(file.read(SNIFF_BYTES))
        if mime is None:
            return None
        file.seek(0)
        try:
            return _parse_header(mime, file, source)
        except pyvips.Error:
            return None


def _parse_header(mime: str, file: BinaryIO, source: Path | bytes) -> ImageHeader | None:
    head: bytes | None = None
    if mime == "image/png":
        head = _png_head(file)
        size = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
        if head and 0 in size:  # libvips would only say that it cannot read this
            return ImageHeader(mime, *size, has_alpha=False, orientation=1)
    elif mime == "image/jpeg":
        head = _jpeg_head(file)
        if usual := read_usual_jpeg(head):
            width_px, height_px, orientation = usual
            return ImageHeader(mime, width_px, height_px, False, orientation)
    elif mime == "image/gif":
        head = file.read(_GIF_HEAD_BYTES)
    elif not _has_few_parts(mime, file):
        return None
    if head is None and isinstance(source, Path):
        image = loader(mime)(str(source), access="sequential")
    else:
        image = loader(mime, "_buffer")(source if head is None else head, access="sequential")
    return _describe(mime, image)


def _describe(mime: str, image: Any) -> ImageHeader:
    orientation = image.get("orientation") if image.get_typeof("orientation") else 1
    return ImageHeader(
        mime=mime,
        width_px=image.width,
        height_px=image.height,
        has_alpha=bool(image.hasalpha()),
        orientation=orientation if 1 <= orientation <= 8 else 1,
    )


def _png_head(file: BinaryIO) -> bytes:
    """A PNG up to its pixels, without text and profiles, which may inflate to any size."""
    wanted = {b"IHDR", b"PLTE", b"tRNS", b"eXIf"}
    kept = bytearray(file.read(8))
    for _ in range(_MAX_PARTS):
        start = file.read(8)
        size, name = int.from_bytes(start[:4]), start[4:]
        if name == b"IDAT":
            return bytes(kept + start + file.read(_AFTER_HEADER_BYTES))
        if len(start) < 8:
            break
        if name in wanted and size <= _MAX_SMALL_CHUNK_BYTES:
            wanted.remove(name)
            kept += start + file.read(size + 4)
        else:
            file.seek(size + 4, os.SEEK_CUR)
    return b""


def _jpeg_head(file: BinaryIO) -> bytes:
    """A JPEG up to its scan, with only its frame, its orientation and Adobe's colour mark.

    Source: ITU-T T.81, B.1.1.
    """
    wanted = {b"Exif\0", b"Adobe"}
    kept = bytearray(file.read(2))
    for _ in range(_MAX_PARTS):
        marker = _read_jpeg_marker(file)
        if marker == 0xDA:
            return bytes(kept + b"\xff\xda" + file.read(_AFTER_HEADER_BYTES))
        size = int.from_bytes(file.read(2))
        if marker is None or size < 2:
            break
        is_frame = size < 1024 and marker in _JPEG_FRAMES
        if is_frame or marker in (0xE1, 0xEE):
            body = file.read(size - 2)
            if is_frame or body[:5] in wanted:
                wanted.discard(body[:5])
                kept += bytes((0xFF, marker)) + size.to_bytes(2) + body
        else:
            file.seek(size - 2, os.SEEK_CUR)
    return bytes(kept)


def _read_jpeg_marker(file: BinaryIO) -> int | None:
    """The next marker's code. Any number of 0xFF may stand before it; here at most 64."""
    if file.read(1) != b"\xff":
        return None
    for _ in range(_AFTER_HEADER_BYTES):
        code = file.read(1)
        if code != b"\xff":
            return code[0] if code else None
    return None


def _has_few_parts(mime: str, file: BinaryIO) -> bool:
    """False for a WebP or TIFF with so many frames or pages that even counting them is work."""
    if mime == "image/webp":
        return _webp_chunks_end(file)
    if mime == "image/tiff":
        return _tiff_pages_end(file)
    return True  # libheif has limits of its own


def _webp_chunks_end(file: BinaryIO) -> bool:
    file.seek(12)
    for _ in range(_MAX_PARTS):
        start = file.read(8)
        if len(start) < 8:
            return True
        size = int.from_bytes(start[4:], "little")
        file.seek(size + size % 2, os.SEEK_CUR)
    return False


def _tiff_pages_end(file: BinaryIO) -> bool:
    """Follows the chain of directories, in a hostile file a circle. Source: TIFF 6.0, 2."""
    magic = file.read(4)
    order = "little" if magic.startswith(b"II") else "big"
    is_big = b"+" in magic
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_big else (2, 12, 4)
    file.seek(8 if is_big else 4)
    for _ in range(_MAX_TIFF_PAGES):
        offset = int.from_bytes(file.read(offset_bytes), order)  # type: ignore[arg-type]
        if offset == 0 or offset >= 2**62:
            return True
        file.seek(offset)
        count = int.from_bytes(file.read(count_bytes), order)  # type: ignore[arg-type]
        if count >= 2**32:
            return True
        file.seek(count * entry_bytes, os.SEEK_CUR)
    return False
