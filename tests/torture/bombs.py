"""Image bombs and malformed files, by name: small to send, and large, endless or wrong to read."""

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from tests import pictures
from tests.pictures import PNG_SIGNATURE, png_chunk

GIB = 2**30
_FLUSHED_BYTES = 2**24


def zeros(size_bytes: int) -> bytes:
    """A zlib stream that inflates to so many zero bytes: a multiple of 16 MiB, made at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(_FLUSHED_BYTES)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (size_bytes % 65521) << 16 | 1
    end = zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    return b"\x78\xda" + block * (size_bytes // _FLUSHED_BYTES) + end + checksum.to_bytes(4)


def garbage(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


# --- PNG ---------------------------------------------------------------------------------------


def png_header(width: int, height: int, *, depth: int = 8, colour: int = 2, lace: int = 0) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, lace)
    return PNG_SIGNATURE + png_chunk(b"IHDR", body)


def png(header: bytes, pixels: bytes, *before: bytes) -> bytes:
    end = png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return header + b"".join(before) + end


def grey_png(side: int) -> bytes:
    """169 megapixels in 164 KB for a side of 13,000."""
    return png(png_header(side, side, colour=0), zlib.compress(bytes(side * (side + 1)), 9))


def png_with(name: bytes, before_stream: bytes) -> bytes:
    """A good picture, with one chunk that inflates to 1 GiB."""
    whole = pictures.png()
    return whole[:33] + png_chunk(name, before_stream + zeros(GIB)) + whole[33:]


def animated_png(frames: int) -> bytes:
    whole = png_header(8, 8) + png_chunk(b"acTL", struct.pack(">II", frames, 0))
    pixels = zlib.compress(bytes(8 * 25))
    for number in range(frames):
        control = struct.pack(">IIIIIHHBB", 2 * number, 8, 8, 0, 0, 1, 10, 0, 0)
        whole += png_chunk(b"fcTL", control)
        data = struct.pack(">I", 2 * number + 1) + pixels
        whole += png_chunk(b"fdAT", data) if number else png_chunk(b"IDAT", pixels)
    return whole + png_chunk(b"IEND", b"")


def png_without_palette() -> bytes:
    return png(png_header(8, 8, colour=3), zlib.compress(bytes(8 * 9)))


def png_with_wrong_checksums() -> bytes:
    whole = bytearray(pictures.png())
    whole[29:33] = b"\0\0\0\0"
    return bytes(whole)


def png_with_garbage_pixels() -> bytes:
    return png(png_header(500, 500), garbage(5000))


def png_that_inflates_too_far() -> bytes:
    """A gibibyte of pixels where sixty-four belong."""
    return png(png_header(8, 8), zeros(GIB))


# --- GIF ---------------------------------------------------------------------------------------


def gif(width: int, height: int, *frames: bytes, ends: bool = True) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    return b"GIF89a" + screen + b"".join(frames) + (b";" if ends else b"")


def gif_frame(width: int, height: int, pixels: bytes = b"\x02\x44\x01\x00", left: int = 0) -> bytes:
    """pixels: sub-blocks of LZW codes with a zero at their end."""
    return b"\x2c" + struct.pack("<HHHHB", left, 0, width, height, 0) + b"\x02" + pixels


def lzw_garbage() -> bytes:
    block = b"\xff" + garbage(255)
    return gif(500, 500, gif_frame(500, 500, block * 200 + b"\0"))


def endless_sub_blocks() -> bytes:
    return gif(64, 64, gif_frame(64, 64, (b"\x01\x44") * 500_000), ends=False)


def endless_comments() -> bytes:
    return gif(64, 64, b"\x21\xfe\x01a\x00" * 500_000, ends=False)


# --- JPEG --------------------------------------------------------------------------------------


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2) + body


def jpeg_with(*segments: bytes) -> bytes:
    whole = pictures.jpeg()
    return whole[:2] + b"".join(segments) + whole[2:]


def jpeg_frame(width: int, height: int, *, kind: int = 0xC0, depth: int = 8) -> bytes:
    """A grey frame, its tables missing, and a scan of garbage."""
    frame = jpeg_segment(kind, struct.pack(">BHHB", depth, height, width, 1) + b"\x01\x11\0")
    scan = jpeg_segment(0xDA, b"\x01\x01\0\0\x3f\0")
    return b"\xff\xd8" + frame + scan + garbage(2000).replace(b"\xff", b"\0") + b"\xff\xd9"


def jpeg_of_size(width: int, height: int) -> bytes:
    """A good picture whose frame claims another size."""
    whole = bytearray(pictures.jpeg())
    at = whole.index(b"\xff\xc0") + 5
    whole[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(whole)


def huge_huffman_tables() -> bytes:
    """Every code that a table can claim, and more than it may."""
    table = b"\x10" + b"\xff" * 16 + bytes(16 * 255)
    return jpeg_with(*[jpeg_segment(0xC4, table)] * 1000)


def many_scans(side: int, scans: int) -> bytes:
    """A progressive picture whose last scan comes thousands of times, each time over all pixels."""
    whole = pictures.as_jpeg(pictures.plain(side, side, pictures.RED), interlace=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def truncated_jpeg(share: float) -> bytes:
    whole = pictures.as_jpeg(pictures.noise(300, 200))
    return whole[: int(len(whole) * share)]


def jpeg_with_garbage_scan() -> bytes:
    whole = pictures.as_jpeg(pictures.noise(300, 200))
    at = whole.index(b"\xff\xda") + 14
    return whole[:at] + garbage(20_000).replace(b"\xff", b"\xff\0") + b"\xff\xd9"


def jpeg_with_circular_exif() -> bytes:
    """The first directory names itself as the one with more, and as the next."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    directory = struct.pack("<H", 1) + entry + struct.pack("<I", 8)
    return jpeg_with(jpeg_segment(0xE1, b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory))


# --- TIFF --------------------------------------------------------------------------------------

SHORT, LONG, LONG8 = 3, 4, 16


def tiff(fields: dict[int, tuple[int, int, int]], data: bytes = b"", following: int = 0) -> bytes:
    """fields: type, count and value by tag. data: after the directory. Its offset: `tiff_data`."""
    out = b"II*\0" + struct.pack("<IH", 8, len(fields))
    for tag, (kind, count, value) in sorted(fields.items()):
        out += struct.pack("<HHII", tag, kind, count, value)
    return out + struct.pack("<I", following) + data


def tiff_data(fields: int) -> int:
    return 8 + 2 + 12 * fields + 4


def tiff_fields(width: int, height: int, **changes: tuple[int, int, int]) -> Any:
    """One strip of black pixels, its bytes right after the directory."""
    named = {
        "width": 256,
        "height": 257,
        "depth": 258,
        "compression": 259,
        "colour": 262,
        "strip_offsets": 273,
        "samples": 277,
        "rows": 278,
        "strip_sizes": 279,
    }
    values = {
        "width": (LONG, 1, width),
        "height": (LONG, 1, height),
        "depth": (SHORT, 1, 8),
        "compression": (SHORT, 1, 1),
        "colour": (SHORT, 1, 1),
        "strip_offsets": (LONG, 1, tiff_data(len(named))),
        "samples": (SHORT, 1, 1),
        "rows": (LONG, 1, height),
        "strip_sizes": (LONG, 1, width * height % 2**32),
        **changes,
    }
    return {named[name]: value for name, value in values.items()}


def tiff_of_strips(count: int) -> bytes:
    strips = {
        "strip_offsets": (LONG, count, 8),
        "strip_sizes": (LONG, count, 8),
        "rows": (LONG, 1, 1),
    }
    return tiff(tiff_fields(64, 64, **strips), bytes(64))


def deflated_tiff() -> bytes:
    """100 megapixels in one strip of 100 KB."""
    packed = zlib.compress(bytes(10_000 * 10_000), 9)
    changes = {"compression": (SHORT, 1, 8), "strip_sizes": (LONG, 1, len(packed))}
    return tiff(tiff_fields(10_000, 10_000, **changes), packed)


def tiff_with_lzw_garbage() -> bytes:
    changes = {"compression": (SHORT, 1, 5), "strip_sizes": (LONG, 1, 5000)}
    return tiff(tiff_fields(500, 500, **changes), garbage(5000))


def big_tiff(*, entries: int, following: int) -> bytes:
    """BigTIFF with one directory of 8 x 8 pixels. entries: how many it claims to have."""
    fields = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    body = b"".join(struct.pack("<HHQQ", tag, LONG8, 1, value) for tag, value in fields.items())
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, 16)
    return head + struct.pack("<Q", entries) + body + struct.pack("<Q", following)


# --- WebP and AVIF -----------------------------------------------------------------------------


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp_of_canvas(side: int, *, is_animated: bool) -> bytes:
    size = (side - 1).to_bytes(3, "little") * 2
    flags = b"\2\0\0\0" if is_animated else b"\0\0\0\0"
    still = pictures.webp()[12:]
    frame = riff_chunk(
        b"ANMF", bytes(6) + (239).to_bytes(3, "little") + bytes(3) + bytes(4) + still
    )
    rest = [riff_chunk(b"ANIM", bytes(6)), frame] if is_animated else [still]
    return riff(riff_chunk(b"VP8X", flags + size), *rest)


def lossless_webp_header(side: int) -> bytes:
    bits = (side - 1) | (side - 1) << 14
    return riff(riff_chunk(b"VP8L", b"\x2f" + bits.to_bytes(4, "little") + garbage(500)))


def box(name: bytes, body: bytes, claimed: int | None = None) -> bytes:
    size = len(body) + 8 if claimed is None else claimed
    return struct.pack(">I", size) + name + body


AVIF_TYPE = box(b"ftyp", b"avif" + bytes(4) + b"avifmif1miaf")


def nested_boxes(levels: int) -> bytes:
    body = b""
    for _ in range(levels):
        body = box(b"moov", body)
    return AVIF_TYPE + box(b"meta", bytes(4) + body)


def avif_of_size(side: int) -> bytes:
    whole = bytearray(pictures.avif())
    at = whole.index(b"ispe") + 8
    whole[at : at + 8] = struct.pack(">II", side, side)
    return bytes(whole)


def avif_with_garbage(name: bytes) -> bytes:
    """From the middle of one of its boxes on."""
    whole = pictures.avif()
    at = whole.index(name) + 8
    return whole[:at] + garbage(len(whole) - at)


def many_items_avif() -> bytes:
    """A table that claims to place 4 billion items."""
    items = box(b"iloc", b"\2\0\0\0\x44\0" + b"\xff" * 4 + garbage(2000))
    return AVIF_TYPE + box(b"meta", bytes(4) + items)


# --- What no loader may touch -------------------------------------------------------------------


def billion_laughs() -> bytes:
    names = [f"lol{i}" for i in range(10)]
    entities = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in pairwise(names))
    return (
        f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY lol0 "lol">{entities}]>'
        '<svg xmlns="http://www.w3.org/2000/svg"><text>&lol9;</text></svg>'
    ).encode()


def external_entity() -> bytes:
    return (
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text>&x;</text>'
        b'<image href="http://127.0.0.1:1/x.png" width="9" height="9"/></svg>'
    )


def postscript() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{1 pop} loop\n(%pipe%id) (w) file\n"


def metafile() -> bytes:
    return b"\xd7\xcd\xc6\x9a" + bytes(18) + struct.pack("<HHHIHIH", 1, 9, 0x300, 2**31, 9, 9, 0)


def hdf5() -> bytes:
    return b"\x89HDF\r\n\x1a\n" + b"\xff" * 500


def cursor(kind: int) -> bytes:
    return struct.pack("<HHH", 0, kind, 65535) + struct.pack(
        "<BBBBHHII", 0, 0, 0, 0, 1, 1, 2**31, 6
    )


def deep_pdf() -> bytes:
    return b"%PDF-1.7\n1 0 obj\n" + b"[" * 200_000 + b"\ntrailer<</Root 1 0 R>>\n%%EOF\n"


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(10):
            archive.writestr(f"{number}.jpg", bytes(10_000_000))
    return out.getvalue()


def raw_header(text: bytes) -> bytes:
    return text + bytes(1000)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png-50000x50000": pictures.bomb_header_png,
    "png-169-megapixels": partial(grey_png, 13_000),
    "png-99-megapixels": partial(grey_png, 9_950),
    "png-0x0": pictures.zero_png,
    "png-2147483647-wide": lambda: png(png_header(2**31 - 1, 1), zlib.compress(bytes(99))),
    "png-broken-header": pictures.broken_header_png,
    "png-many-chunks": pictures.many_chunks_png,
    "png-20-texts-of-40-mib": pictures.text_bomb_png,
    "png-ztxt-1-gib": partial(png_with, b"zTXt", b"Comment\0\0"),
    "png-itxt-1-gib": partial(png_with, b"iTXt", b"Comment\0\1\0\0\0"),
    "png-iccp-1-gib": partial(png_with, b"iCCP", b"profile\0\0"),
    "png-animated": partial(animated_png, 5_000),
    "png-without-palette": png_without_palette,
    "png-wrong-checksums": png_with_wrong_checksums,
    "png-garbage-pixels": png_with_garbage_pixels,
    "png-inflates-too-far": png_that_inflates_too_far,
    "png-truncated": lambda: pictures.png()[:200],
    "gif-10000-frames": lambda: gif(64, 64, *[gif_frame(64, 64)] * 10_000),
    "gif-200000-frames": pictures.many_frames_gif,
    "gif-lzw-garbage": lzw_garbage,
    "gif-65535x65535": lambda: gif(65535, 65535, gif_frame(65535, 65535)),
    "gif-frame-outside": lambda: gif(8, 8, gif_frame(65535, 65535, left=65000)),
    "gif-endless-sub-blocks": endless_sub_blocks,
    "gif-endless-comments": endless_comments,
    "jpeg-65536-segments": lambda: jpeg_with(jpeg_segment(0xE5, b"") * 65_536),
    "jpeg-2000000-segments": pictures.many_markers_jpeg,
    "jpeg-huge-huffman-tables": huge_huffman_tables,
    "jpeg-5000-scans": partial(many_scans, 3_000, 5_000),
    "jpeg-truncated-in-header": partial(truncated_jpeg, 0.002),
    "jpeg-truncated-at-a-tenth": partial(truncated_jpeg, 0.1),
    "jpeg-truncated-at-half": partial(truncated_jpeg, 0.5),
    "jpeg-truncated-near-its-end": partial(truncated_jpeg, 0.999),
    "jpeg-65500x65500": partial(jpeg_of_size, 65_500, 65_500),
    "jpeg-9900x9900-of-few-pixels": partial(jpeg_of_size, 9_900, 9_900),
    "jpeg-without-height": partial(jpeg_of_size, 240, 0),
    "jpeg-arithmetic": partial(jpeg_frame, 500, 500, kind=0xC9),
    "jpeg-12-bit": partial(jpeg_frame, 500, 500, kind=0xC1, depth=12),
    "jpeg-lossless": partial(jpeg_frame, 500, 500, kind=0xC3),
    "jpeg-garbage-scan": jpeg_with_garbage_scan,
    "jpeg-circular-exif": jpeg_with_circular_exif,
    "tiff-circular": pictures.circular_tiff,
    "tiff-60000-pages": pictures.many_pages_tiff,
    "tiff-4-billion-strips": partial(tiff_of_strips, 2**32 - 1),
    "tiff-million-strips": partial(tiff_of_strips, 1_000_000),
    "tiff-100-megapixels-deflated": deflated_tiff,
    "tiff-lzw-garbage": tiff_with_lzw_garbage,
    "tiff-4-billion-wide": lambda: tiff(tiff_fields(2**32 - 1, 2**32 - 1), bytes(64)),
    "tiff-own-directory-next": lambda: tiff(tiff_fields(8, 8), bytes(64), following=8),
    "bigtiff-circular": partial(big_tiff, entries=9, following=16),
    "bigtiff-endless-directory": partial(big_tiff, entries=2**63, following=0),
    "webp-16777216-canvas": partial(webp_of_canvas, 2**24, is_animated=False),
    "webp-animated-16777216-canvas": partial(webp_of_canvas, 2**24, is_animated=True),
    "webp-lossless-16384-garbage": partial(lossless_webp_header, 2**14),
    "webp-100000-frames": pictures.many_frames_webp,
    "webp-truncated": lambda: pictures.webp()[:100],
    "avif-nested-boxes": partial(nested_boxes, 20_000),
    "avif-of-65535": partial(avif_of_size, 65_535),
    "avif-endless-box": lambda: AVIF_TYPE + box(b"meta", bytes(50), claimed=2**32 - 1),
    "avif-many-items": many_items_avif,
    "avif-garbage-meta": partial(avif_with_garbage, b"meta"),
    "avif-garbage-pixels": partial(avif_with_garbage, b"mdat"),
    "heic-header": pictures.heic_header,
    "svg-billion-laughs": billion_laughs,
    "svg-external-entity": external_entity,
    "svg-gzipped": lambda: gzip.compress(pictures.svg() + bytes(10_000_000)),
    "eps": postscript,
    "wmf": metafile,
    "hdf5": hdf5,
    "cur": partial(cursor, 2),
    "ico": partial(cursor, 1),
    "bmp": pictures.bmp,
    "pdf-deep": deep_pdf,
    "zip": zip_bomb,
    "ppm-100000x100000": partial(raw_header, b"P6 100000 100000 255\n"),
    "hdr": partial(raw_header, b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 99999 +X 99999\n"),
    "miff": partial(raw_header, b"id=ImageMagick\ncolumns=99999 rows=99999\n\f\n:\x1a"),
    "vips": partial(raw_header, b"\xb6\xa6\xf2\x08" + struct.pack("<II", 99_999, 99_999)),
    "polyglot-jpeg-html": pictures.jpeg_with_html_tail,
    "polyglot-jpeg-zip": lambda: pictures.jpeg() + zip_bomb(),
    "polyglot-gif-script": lambda: b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)//" + pictures.gif(),
    "polyglot-png-pdf": lambda: pictures.png() + pictures.pdf(),
    "polyglot-pdf-jpeg": lambda: pictures.pdf() + pictures.jpeg(),
    "random": pictures.random_bytes,
}
