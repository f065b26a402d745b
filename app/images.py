"""Pixels through libvips, nowhere else.

Headers are read in this process and pixels only in children (`ImagePool`), which are spawned,
bounded in memory, pixels and time, and end with their parent. Six formats are known by their first
bytes and each goes to its own loader; all other loaders are blocked, so that no SVG or PDF parser
can start.
"""

import ctypes
import logging
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import anyio
import anyio.to_process
import pyvips
from anyio import BrokenWorkerProcess, CancelScope, CapacityLimiter

T = TypeVar("T")

COPY_LONG_SIDE_PX = 1024
COPY_SHORT_SIDE_PX = 80  # Rekognition takes 80 to 10,000 px a side
COPY_QUALITY = 88
THUMBNAIL_QUALITY = 82

# Enough of a file for `sniff_image`.
SNIFF_BYTES = 256

_LOADERS = {
    "image/jpeg": "jpegload",
    "image/png": "pngload",
    "image/webp": "webpload",
    "image/gif": "gifload",
    "image/tiff": "tiffload",
    "image/avif": "heifload",
}
_LOADER_CLASSES = ("Jpeg", "Png", "Webp", "Nsgif", "Tiff", "Heif")


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


class ImageUnreadable(Exception):
    """The pixels are broken or too much work. The message says which, in words fit for users."""


@dataclass(frozen=True, slots=True)
class ProviderCopy:
    """The one picture that every provider gets: sRGB JPEG without metadata, 80 to 1024 px a side.

    source_*: the size of the upload as a viewer sees it, that is with its orientation applied.
    transparent_share: 0-1, how much of the picture was transparent before it was put on white.
    """

    jpeg: bytes
    width_px: int
    height_px: int
    source_width_px: int
    source_height_px: int
    transparent_share: float


@dataclass(frozen=True, slots=True)
class Rendition:
    """A picture made for delivery."""

    content: bytes
    mime: str
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class PixelMeasures:
    """Plain measures of a picture, each a share or score of 0-1.

    colour_shares: area by colour name (see `name_colour`), largest first.
    neutral_share: pixels whose red, green and blue differ by at most 12 of 255.
    dark_share, bright_share: pixels with a lightness (CIE L*) below 30, above 75 of 100.
    flat_share: pixels that equal their right and lower neighbours to within 2 of 255.
    palette_share: pixels whose colour is among the eight commonest of 32,768.
    contrast: standard deviation of the grey picture, of the largest that there can be.
    detail_share: how much of that deviation a blur of one pixel takes away.
    """

    colour_shares: tuple[tuple[str, float], ...]
    neutral_share: float
    dark_share: float
    bright_share: float
    flat_share: float
    palette_share: float
    contrast: float
    detail_share: float


def _set_up_libvips() -> None:
    # Its warnings would be noise: what they tell is in the header, or in ImageUnreadable.
    logging.getLogger("pyvips").setLevel(logging.CRITICAL + 1)
    # The cache would keep files open and pixels in memory after their use.
    pyvips.cache_set_max(0)
    pyvips.vips_lib.vips_concurrency_set(1)
    pyvips.operation_block_set("VipsForeignLoad", True)
    for name in _LOADER_CLASSES:
        pyvips.operation_block_set(f"VipsForeignLoad{name}", False)


_set_up_libvips()


# --- Headers: in this process, never a pixel ---------------------------------------------------

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


def read_header(path: Path) -> ImageHeader | None:
    """What kind of image a file is, or None if it is none or its header is broken.

    No pixel is decoded. Raises OSError if the file cannot be read, else nothing for any content.
    """
    with path.open("rb") as file:
        mime = sniff_image(file.read(SNIFF_BYTES))
        if mime is None:
            return None
        file.seek(0)
        try:
            return _parse_header(mime, file, path)
        except pyvips.Error:
            return None


def _parse_header(mime: str, file: BinaryIO, path: Path) -> ImageHeader | None:
    head: bytes | None = None
    if mime == "image/png":
        head = _png_head(file)
        size = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
        if head and 0 in size:  # libvips would only say that it cannot read this
            return ImageHeader(mime, *size, has_alpha=False, orientation=1)
    elif mime == "image/jpeg":
        head = _jpeg_head(file)
    elif mime == "image/gif":
        head = file.read(_GIF_HEAD_BYTES)
    elif not _has_few_parts(mime, file):
        return None
    if head is None:
        image = _loader(mime)(str(path), access="sequential")
    else:
        image = _loader(mime, "_buffer")(head, access="sequential")
    return _describe(mime, image)


def _loader(mime: str, suffix: str = "") -> Callable[..., Any]:
    return partial(pyvips.Operation.call, _LOADERS[mime] + suffix)


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


# --- Pixels: in a child process ----------------------------------------------------------------

_BROKEN = "The image data is broken or incomplete."
_TOO_MUCH = "The image needs too much memory."


def _run_in_child(memory_bytes: int, work: Callable[..., T], *args: Any) -> T:
    _confine(memory_bytes)
    try:
        return work(*args)
    except (pyvips.Error, MemoryError) as error:
        # The words themselves may name a file of ours.
        words = str(error).lower()
        is_too_much = isinstance(error, MemoryError) or "alloc" in words or "out of mem" in words
        raise ImageUnreadable(_TOO_MUCH if is_too_much else _BROKEN) from None


def _confine(memory_bytes: int) -> None:
    """Bounds what this process can use, however wrong a decoder goes."""
    # A terminal's Ctrl-C and a service manager's stop reach the whole group; the parent, which
    # still answers its last requests, is the one to end this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Pixels never go through a file, also not through one that libvips makes for large pictures.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, resource.RLIM_INFINITY))
        # A busy child would notice only afterwards that its parent is gone.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # What a library prints would fill a pipe that nobody reads.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _warm_up() -> None:
    """Loads what the first picture would otherwise wait for."""
    _encode_jpeg(pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb"), COPY_QUALITY)


def _open_pixels(path: str, box_px: int, max_pixels: int) -> tuple[ImageHeader, Any]:
    """The header and the first frame, which decodes strictly once it is used."""
    header = read_header(Path(path))
    if header is None:
        raise ImageUnreadable(_BROKEN)
    load = partial(_loader(header.mime), path, access="sequential", fail_on="error")
    image = load()
    if not 0 < image.width * image.height <= max_pixels:
        raise ImageUnreadable(f"The image has more than {max_pixels:,} pixels.")
    shrink = max(image.width, image.height) / box_px
    if min(image.width, image.height) < shrink:
        shrink = 1  # so thin that a decoder would leave nothing of it; it has few pixels
    if header.mime == "image/jpeg" and shrink >= 4:
        # The decoder's shrinking is coarse: the last factor of two is left to the resizer.
        image = load(shrink=next(factor for factor in (8, 4, 2) if shrink >= 2 * factor))
    elif header.mime == "image/webp" and shrink >= 4:
        image = load(scale=2 / shrink)
    return header, image


def _fit(image: Any, box_px: int) -> Any:
    """Upright, in 8 bit sRGB, with alpha if it has any, and at most `box_px` a side. In memory."""
    fitted = image.thumbnail_image(box_px, height=box_px, size="down", output_profile="srgb")
    return fitted.colourspace("srgb").cast("uchar").copy_memory()


def _upright_size(header: ImageHeader) -> tuple[int, int]:
    if header.orientation >= 5:
        return header.height_px, header.width_px
    return header.width_px, header.height_px


def _encode_jpeg(image: Any, quality: int) -> bytes:
    return bytes(image.jpegsave_buffer(Q=quality, keep="none"))


def _make_provider_copy(path: str, max_pixels: int) -> ProviderCopy:
    header, pixels = _open_pixels(path, COPY_LONG_SIDE_PX, max_pixels)
    image = _fit(pixels, COPY_LONG_SIDE_PX)
    transparent_share = 0.0
    if image.hasalpha():
        transparent_share = 1 - image[-1].avg() / 255
        image = image.flatten(background=255)
    image = _pad(image, COPY_SHORT_SIDE_PX)
    source_width_px, source_height_px = _upright_size(header)
    return ProviderCopy(
        jpeg=_encode_jpeg(image, COPY_QUALITY),
        width_px=image.width,
        height_px=image.height,
        source_width_px=source_width_px,
        source_height_px=source_height_px,
        transparent_share=transparent_share,
    )


def _pad(image: Any, side_px: int) -> Any:
    """At least `side_px` a side, by repeating the edges: a frame of its own would be seen, too."""
    width, height = max(image.width, side_px), max(image.height, side_px)
    return image.gravity("centre", width, height, extend="copy")


def _make_thumbnail(path: str, max_pixels: int, box_px: int) -> Rendition:
    _, pixels = _open_pixels(path, box_px, max_pixels)
    image = _fit(pixels, box_px)
    if image.hasalpha():
        content, mime = bytes(image.pngsave_buffer(keep="none")), "image/png"
    else:
        content, mime = _encode_jpeg(image, THUMBNAIL_QUALITY), "image/jpeg"
    return Rendition(content, mime, image.width, image.height)


def _ask_to_be_ended() -> None:
    """Answers what anyio does not understand, which makes it kill this process and wait for it.

    Just to exit would race with that kill.
    """
    os.write(1, b"END\n")
    signal.pause()


# --- Measures ----------------------------------------------------------------------------------

_COLOUR_LEVELS = 32  # per channel
_PALETTE_COLOURS = 8


def name_colour(red: float, green: float, blue: float) -> str:
    """One of a dozen English names for an sRGB colour, each channel 0-255."""
    highest, lowest = max(red, green, blue), min(red, green, blue)
    value, chroma = highest / 255, (highest - lowest) / 255
    saturation = chroma / value if value else 0.0
    if value < 0.2:
        return "Black"
    if saturation < 0.12 or chroma < 0.06:
        return "White" if value > 0.9 else "Gray"
    return _name_hue(_hue_degrees(red, green, blue), saturation, value)


def _hue_degrees(red: float, green: float, blue: float) -> float:
    highest = max(red, green, blue)
    chroma = highest - min(red, green, blue)
    if highest == red:
        return 60 * ((green - blue) / chroma) % 360
    if highest == green:
        return 60 * ((blue - red) / chroma + 2)
    return 60 * ((red - green) / chroma + 4)


def _name_hue(hue: float, saturation: float, value: float) -> str:
    if hue >= 345 or hue < 12:
        return "Pink" if value > 0.75 and saturation < 0.5 else "Red"
    if hue < 70:
        # Dark orange and dark yellow are seen as brown.
        if value < 0.6 or (hue < 42 and value < 0.75 and saturation < 0.7):
            return "Brown"
        return "Orange" if hue < 42 else "Yellow"
    if hue < 160:
        return "Green"
    if hue < 195:
        return "Teal"
    if hue < 255:
        return "Blue"
    if hue < 290 or value < 0.5:
        return "Purple"
    return "Pink"


def _measure(jpeg: bytes) -> PixelMeasures:
    image = _loader("image/jpeg", "_buffer")(jpeg).copy_memory()
    grey = image.colourspace("b-w").cast("float").copy_memory()
    lightness = image.colourspace("lab")[0].copy_memory()
    counts = _count_colours(image)
    contrast = grey.deviate()
    return PixelMeasures(
        colour_shares=_colour_shares(counts),
        neutral_share=_share_where(_channel_spread(image) <= 12),
        dark_share=_share_where(lightness < 30),
        bright_share=_share_where(lightness > 75),
        flat_share=_share_where(_steps(grey) <= 2),
        palette_share=_palette_share(counts),
        contrast=contrast / 127.5,
        detail_share=(grey - grey.gaussblur(1)).deviate() / contrast if contrast else 0.0,
    )


def _share_where(condition: Any) -> float:
    """The share of pixels for which a comparison holds: libvips says 255 for true."""
    return float(condition.avg()) / 255


def _channel_spread(image: Any) -> Any:
    red, green, blue = image.bandsplit()
    highest, lowest = red.bandrank([green, blue], index=2), red.bandrank([green, blue], index=0)
    return highest - lowest


def _steps(grey: Any) -> Any:
    """How far each pixel is from its right or lower neighbour, whichever is further."""
    across = (grey - grey.wrap(x=grey.width - 1, y=0)).abs()
    down = (grey - grey.wrap(x=0, y=grey.height - 1)).abs()
    return across.bandrank([down], index=1)


def _count_colours(image: Any) -> Counter[tuple[int, int, int]]:
    """Pixels by colour, coarsened to `_COLOUR_LEVELS` levels a channel."""
    cube = image.hist_find_ndim(bins=_COLOUR_LEVELS).cast("uint")
    numbers = memoryview(cube.write_to_memory()).cast("I")
    counts: Counter[tuple[int, int, int]] = Counter()
    for index, number in enumerate(numbers):
        if number:
            rest, blue = divmod(index, _COLOUR_LEVELS)
            green, red = divmod(rest, _COLOUR_LEVELS)
            counts[red, green, blue] = number
    return counts


def _colour_shares(counts: Counter[tuple[int, int, int]]) -> tuple[tuple[str, float], ...]:
    width = 256 / _COLOUR_LEVELS
    areas: Counter[str] = Counter()
    for levels, number in counts.items():
        red, green, blue = ((level + 0.5) * width for level in levels)
        areas[name_colour(red, green, blue)] += number
    shares = ((name, area / counts.total()) for name, area in areas.items())
    return tuple(sorted(shares, key=lambda share: (-share[1], share[0])))


def _palette_share(counts: Counter[tuple[int, int, int]]) -> float:
    commonest = counts.most_common(_PALETTE_COLOURS)
    return sum(number for _, number in commonest) / counts.total()


# --- The pool ----------------------------------------------------------------------------------


class ImagePool:
    """A few child processes that decode. Made in the event loop's main thread, and used there.

    `start` belongs in a task that outlives the pool's use: anyio ends the children with the task at
    the root of it. A call waits for a free child without limit, then has `timeout_seconds` in it.
    A child that takes longer, dies, or whose caller is cancelled is killed and replaced before its
    place is given on.

    memory_bytes bounds what each child allocates (Linux only): an AVIF with alpha needs 16 bytes a
    pixel, interlaced PNG and progressive JPEG up to 8, others little.
    """

    def __init__(
        self,
        *,
        processes: int = 2,
        timeout_seconds: float = 30,
        max_pixels: int = 100_000_000,
        memory_bytes: int = 2_147_483_648,
    ) -> None:
        self._processes = processes
        self._timeout_seconds = timeout_seconds
        self._max_pixels = max_pixels
        self._memory_bytes = memory_bytes
        self._places = CapacityLimiter(processes)
        # anyio's own; never waited for, since it has room for whoever holds a place.
        self._limiter = CapacityLimiter(processes)
        self._is_closed = False

    async def start(self) -> None:
        """Returns when every child is ready for its first picture."""
        await self._in_each_place(self._spawn)

    async def provider_copy(self, path: Path) -> ProviderCopy:
        """The normalised JPEG of a picture's first frame.

        Raises ImageUnreadable, and OSError if there is no such file.
        """
        return await self._run(_make_provider_copy, str(path), self._max_pixels)

    async def thumbnail(self, path: Path, box_px: int = 300) -> Rendition:
        """The first frame inside a square, never enlarged: PNG if it has alpha, else JPEG.

        Raises ImageUnreadable, and OSError if there is no such file.
        """
        return await self._run(_make_thumbnail, str(path), self._max_pixels, box_px)

    async def measure(self, image: ProviderCopy) -> PixelMeasures:
        """Raises ImageUnreadable if no child could do it in time."""
        return await self._run(_measure, image.jpeg)

    async def close(self) -> None:
        """Ends the children, once what they are at is done. The pool cannot be used again."""
        self._is_closed = True
        with CancelScope(shield=True):
            await self._in_each_place(self._end_child)

    async def _in_each_place(self, work: Callable[[], Awaitable[None]]) -> None:
        async def run_in_place() -> None:
            async with self._places:
                await work()

        async with anyio.create_task_group() as tasks:
            for _ in range(self._processes):
                tasks.start_soon(run_in_place)

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        async with self._places:
            if self._is_closed:
                raise RuntimeError("the image pool is closed")
            try:
                with anyio.fail_after(self._timeout_seconds):
                    return await self._call(_run_in_child, self._memory_bytes, work, *args)
            except ImageUnreadable:
                raise
            except TimeoutError:
                await self._replace_child()
                limit = f"{self._timeout_seconds:g}"
                raise ImageUnreadable(f"The image took longer than {limit} s to read.") from None
            except BrokenWorkerProcess:
                await self._replace_child()
                raise ImageUnreadable("The image made its decoder crash.") from None
            except anyio.get_cancelled_exc_class():
                await self._replace_child()
                raise

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        with _main_module_hidden:
            return await anyio.to_process.run_sync(
                function, *args, cancellable=True, limiter=self._limiter
            )

    async def _spawn(self) -> None:
        await self._call(_run_in_child, self._memory_bytes, _warm_up)

    async def _replace_child(self) -> None:
        """As many warm-ups at once as there should be free children: one of them gets a new one."""
        if self._is_closed:
            return
        free = self._processes - self._places.borrowed_tokens
        with CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for _ in range(1 + int(free)):
                    tasks.start_soon(self._try_to_spawn)

    async def _try_to_spawn(self) -> None:
        # Should it fail, the next call tries again.
        with suppress(BrokenWorkerProcess, OSError):
            await self._spawn()

    async def _end_child(self) -> None:
        # anyio itself ends its children only with the event loop.
        with suppress(BrokenWorkerProcess):
            await self._call(_ask_to_be_ended)


class _HiddenMainModule:
    """While it is entered, anyio does not see the file of the main module.

    It would run that file in each new child, and with it import the whole application: slower to
    start, and larger by a hundred megabytes. The children need this module only.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._file: str | None = None

    def __enter__(self) -> None:
        if self._depth == 0:
            self._file = sys.modules["__main__"].__dict__.pop("__file__", None)
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            sys.modules["__main__"].__file__ = self._file


_main_module_hidden = _HiddenMainModule()
