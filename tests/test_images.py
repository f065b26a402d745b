import asyncio
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pyvips
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.images import (
    SNIFF_BYTES,
    ImageHeader,
    ImagePool,
    ImageUnreadable,
    ProviderCopy,
    Rendition,
    read_header,
    sniff_image,
)
from tests import pictures
from tests.pictures import BLUE, LABORIOUS, NOT_IMAGES, QUADRANTS, READABLE, RED, UNREADABLE

T = TypeVar("T")

# Long enough for a machine that does much else.
DEADLINE_SECONDS = 30.0


class Studio:
    """One pool and one event loop, in a thread, for many tests."""

    def __init__(self, folder: Path, portal: BlockingPortal, pool: ImagePool) -> None:
        self._folder = folder
        self._portal = portal
        self._pool = pool

    def file(self, content: bytes) -> Path:
        path = self._folder / "picture"
        path.write_bytes(content)
        return path

    def copy(self, content: bytes) -> ProviderCopy:
        return self._portal.call(self._pool.provider_copy, self.file(content))

    def thumbnail(self, content: bytes, box_px: int = 300) -> Rendition:
        return self._portal.call(self._pool.thumbnail, self.file(content), box_px)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    # Not an asyncio.Runner: anyio ends its children with the first task that is run to its end.
    with start_blocking_portal() as portal:
        pool = ImagePool(processes=1)
        portal.call(pool.start)
        yield Studio(tmp_path_factory.mktemp("pictures"), portal, pool)
        portal.call(pool.close)


def run_with_pool(work: Callable[[ImagePool], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        pool = ImagePool(**{"processes": 1, **options})
        await pool.start()
        try:
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def header_of(tmp_path: Path, content: bytes) -> ImageHeader | None:
    path = tmp_path / "picture"
    path.write_bytes(content)
    return read_header(path)


def decode(content: bytes) -> Any:
    if content.startswith(b"\xff\xd8"):
        return pyvips.Image.jpegload_buffer(content)
    return pyvips.Image.pngload_buffer(content)


def quadrant_colours(image: Any) -> list[list[float]]:
    """The colours in the middle of each quarter, row by row."""
    across, down = image.width, image.height
    places = [(1, 1), (3, 1), (1, 3), (3, 3)]
    return [image(across * x // 4, down * y // 4) for x, y in places]


def is_near(colour: list[float], wanted: tuple[int, ...], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour, wanted, strict=False))


def children_of(pid: int) -> set[int]:
    return {int(kid) for kid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def own_children() -> set[int]:
    return children_of(os.getpid())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_until(is_true: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if is_true():
            return True
        time.sleep(0.02)
    return False


# --- Sniffing and headers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*READABLE, *UNREADABLE, *LABORIOUS])
def test_pictures_have_the_type_of_their_content(name: str) -> None:
    content = pictures.PICTURES[name]()
    assert sniff_image(content[:SNIFF_BYTES]) == f"image/{name.partition('-')[0]}"


@pytest.mark.parametrize("name", ["empty", "text", "random", "heic", "bmp", "svg", "pdf"])
def test_other_content_has_no_image_type(name: str) -> None:
    assert sniff_image(pictures.PICTURES[name]()[:SNIFF_BYTES]) is None


def test_an_avif_that_names_its_brand_only_among_the_compatible_ones_is_known() -> None:
    head = (28).to_bytes(4) + b"ftypmif1" + bytes(4) + b"mif1avifmiaf"
    assert sniff_image(head) == "image/avif"


@pytest.mark.parametrize("name", [*READABLE, *LABORIOUS])
def test_a_readable_picture_has_a_header(name: str, tmp_path: Path) -> None:
    header = header_of(tmp_path, pictures.PICTURES[name]())
    assert header is not None
    assert header.width_px > 0
    assert header.height_px > 0


@pytest.mark.parametrize("name", list(NOT_IMAGES))
def test_what_is_no_image_has_no_header(name: str, tmp_path: Path) -> None:
    assert header_of(tmp_path, NOT_IMAGES[name]()) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_orientation_and_the_size_as_stored(
    orientation: int, tmp_path: Path
) -> None:
    size = (240, 160) if orientation < 5 else (160, 240)
    content = pictures.oriented_jpeg(orientation)
    assert header_of(tmp_path, content) == ImageHeader("image/jpeg", *size, False, orientation)


def test_the_orientation_is_found_behind_megabytes_of_metadata(tmp_path: Path) -> None:
    header = header_of(tmp_path, pictures.long_metadata_jpeg())
    assert header == ImageHeader("image/jpeg", 160, 240, False, 6)


@pytest.mark.parametrize(
    ("name", "has_alpha"),
    [
        ("png-alpha", True),
        ("png-16-bit-alpha", True),
        ("webp-alpha", True),
        ("gif-1x1-transparent", True),
        ("png", False),
        ("png-palette", False),
        ("jpeg-cmyk", False),
        ("jpeg-grey", False),
        ("webp", False),
        ("avif", False),
        ("tiff", False),
    ],
)
def test_a_header_tells_whether_there_is_alpha(name: str, has_alpha: bool, tmp_path: Path) -> None:
    header = header_of(tmp_path, READABLE[name]())
    assert header is not None
    assert header.has_alpha is has_alpha


@pytest.mark.parametrize("name", ["gif-animated", "webp-animated"])
def test_an_animation_has_the_size_of_one_frame(name: str, tmp_path: Path) -> None:
    header = header_of(tmp_path, READABLE[name]())
    assert header is not None
    assert (header.width_px, header.height_px) == (240, 160)


def test_sizes_beyond_sense_are_told_as_they_are(tmp_path: Path) -> None:
    huge = header_of(tmp_path, pictures.bomb_header_png())
    assert huge is not None
    assert (huge.width_px, huge.height_px) == (50_000, 50_000)
    nothing = header_of(tmp_path, pictures.zero_png())
    assert nothing is not None
    assert (nothing.width_px, nothing.height_px) == (0, 0)


def test_a_truncated_jpeg_is_an_image_by_its_header(tmp_path: Path) -> None:
    header = header_of(tmp_path, pictures.truncated_jpeg())
    assert header == ImageHeader("image/jpeg", 600, 400, False, 1)


@pytest.mark.parametrize(
    "name",
    [
        *("png-50000x50000", "png-169-megapixels", "png-text-bomb", "png-many-chunks"),
        *("jpeg-many-markers", "gif-many-frames", "webp-many-frames", "tiff-many-pages"),
        *("jpeg-12000-wide", "tiff-circular"),
    ],
)
def test_reading_a_header_is_little_work_whatever_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.PICTURES[name]())
    read_header(path)
    cpu_seconds = time.process_time()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_header(path)
    assert time.process_time() - cpu_seconds < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 8 * 1024


def test_headers_leave_no_file_open(tmp_path: Path) -> None:
    files = []
    for name in [*READABLE, "jpeg-truncated", "png-broken-header", "text"]:
        files.append(tmp_path / name)
        files[-1].write_bytes(pictures.PICTURES[name]())
    before = open_files()
    for path in files * 3:
        read_header(path)
    assert open_files() == before


def test_headers_make_no_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ["jpeg-truncated", "png-broken-header", "tiff-circular", "random"]:
        header_of(tmp_path, pictures.PICTURES[name]())
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


_HEADER_SEEDS = [
    READABLE[name]()
    for name in ["jpeg", "png-palette", "webp-animated", "gif-animated", "tiff", "avif"]
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_content_makes_a_header_raise(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(data.draw(st.sampled_from(_HEADER_SEEDS)))
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, min(len(content), 600) - 1))
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    header = header_of(tmp_path, bytes(content[:end]))
    assert header is None or 1 <= header.orientation <= 8


def test_a_missing_file_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nothing")


# --- Provider copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(READABLE))
def test_a_provider_copy_keeps_to_every_providers_limits(name: str, studio: Studio) -> None:
    copy = studio.copy(READABLE[name]())
    image = decode(copy.jpeg)
    assert (image.width, image.height) == (copy.width_px, copy.height_px)
    assert min(image.width, image.height) >= 80
    assert max(image.width, image.height) <= 1024
    assert (image.bands, image.format, image.interpretation) == (3, "uchar", "srgb")
    assert len(copy.jpeg) < 4_000_000
    assert 0 <= copy.transparent_share <= 1


# 16 of 255 is what CMYK inks and JPEG cost these colours.
_FOUR_COLOURS = [
    *(f"jpeg-orientation-{n}" for n in range(1, 9)),
    *("jpeg-progressive", "jpeg-display-p3", "jpeg-12000-wide", "jpeg-with-html-tail"),
    *("png", "png-16-bit", "png-palette", "png-interlaced", "gif", "gif-animated"),
    *("webp", "webp-animated", "avif", "tiff"),
]


@pytest.mark.parametrize("name", _FOUR_COLOURS)
def test_a_provider_copy_is_upright_with_true_colours(name: str, studio: Studio) -> None:
    copy = studio.copy(READABLE[name]())
    colours = quadrant_colours(decode(copy.jpeg))
    for colour, wanted in zip(colours, QUADRANTS, strict=True):
        assert is_near(colour, wanted, 16), (colours, QUADRANTS)


@pytest.mark.parametrize("name", ["jpeg-cmyk", "jpeg-cmyk-without-profile"])
def test_a_cmyk_jpeg_keeps_its_colours_as_far_as_inks_can(name: str, studio: Studio) -> None:
    colours = quadrant_colours(decode(studio.copy(READABLE[name]()).jpeg))
    for colour, wanted in zip(colours, QUADRANTS, strict=True):
        assert is_near(colour, wanted, 60), (colours, QUADRANTS)


@pytest.mark.parametrize("name", ["jpeg-grey", "png-grey"])
def test_a_grey_picture_stays_grey(name: str, studio: Studio) -> None:
    for red, green, blue in quadrant_colours(decode(studio.copy(READABLE[name]()).jpeg)):
        assert red == green == blue


def test_a_wide_picture_is_shrunk_in_proportion(studio: Studio) -> None:
    copy = studio.copy(READABLE["jpeg-12000-wide"]())
    assert (copy.width_px, copy.height_px) == (1024, 171)
    assert (copy.source_width_px, copy.source_height_px) == (12_000, 2_000)


def test_the_source_size_is_that_of_the_upright_picture(studio: Studio) -> None:
    copy = studio.copy(pictures.oriented_jpeg(6))
    assert (copy.source_width_px, copy.source_height_px) == (240, 160)


def test_a_small_picture_is_not_enlarged(studio: Studio) -> None:
    copy = studio.copy(pictures.jpeg(200, 100))
    assert (copy.width_px, copy.height_px) == (200, 100)


def test_one_pixel_is_padded_with_itself(studio: Studio) -> None:
    copy = studio.copy(pictures.dot_png())
    image = decode(copy.jpeg)
    assert (copy.width_px, copy.height_px) == (80, 80)
    assert (copy.source_width_px, copy.source_height_px) == (1, 1)
    assert all(is_near(image(x, y), RED, 6) for x, y in [(0, 0), (40, 40), (79, 79)])


def test_a_line_is_padded_on_its_short_side_only(studio: Studio) -> None:
    copy = studio.copy(pictures.line_png())
    assert (copy.width_px, copy.height_px) == (1024, 80)
    assert is_near(decode(copy.jpeg)(500, 40), BLUE, 10)


@pytest.mark.parametrize("name", ["png-alpha", "webp-alpha", "png-16-bit-alpha"])
def test_transparency_becomes_white_and_is_measured(name: str, studio: Studio) -> None:
    copy = studio.copy(READABLE[name]())
    top_left, top_right, _, _ = quadrant_colours(decode(copy.jpeg))
    assert is_near(top_left, (255, 255, 255), 6)
    assert is_near(top_right, QUADRANTS[1], 16)
    assert copy.transparent_share == pytest.approx(0.5, abs=0.02)


def test_the_spacer_gif_is_all_transparent(studio: Studio) -> None:
    copy = studio.copy(pictures.transparent_gif())
    assert copy.transparent_share == 1
    assert is_near(decode(copy.jpeg)(40, 40), (255, 255, 255), 3)


def test_metadata_is_stripped(studio: Studio) -> None:
    image = pictures.quadrants().copy()
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Copyright", "somebody")
    image = image.icc_transform("p3", input_profile="srgb")
    stored = pictures.as_jpeg(image)
    assert b"somebody" in stored
    for content in (studio.copy(stored).jpeg, studio.thumbnail(stored).content):
        assert not {"exif-data", "icc-profile-data", "orientation"} & set(
            decode(content).get_fields()
        )


@pytest.mark.parametrize("name", list(UNREADABLE))
def test_broken_or_excessive_pixels_are_unreadable(name: str, studio: Studio) -> None:
    for work in (studio.copy, studio.thumbnail):
        with pytest.raises(ImageUnreadable):
            work(UNREADABLE[name]())


@pytest.mark.parametrize("name", ["jpeg", "jpeg-progressive", "png", "webp", "gif", "avif", "tiff"])
def test_a_picture_cut_in_half_is_unreadable(name: str, studio: Studio) -> None:
    whole = READABLE[name]()
    with pytest.raises(ImageUnreadable, match="broken or incomplete"):
        studio.copy(whole[: len(whole) // 2])


def test_a_large_jpeg_that_lacks_its_end_is_unreadable(studio: Studio) -> None:
    whole = READABLE["jpeg-12000-wide"]()
    with pytest.raises(ImageUnreadable):
        studio.copy(whole[: len(whole) * 9 // 10])


def test_a_broken_colour_profile_does_not_matter(studio: Studio) -> None:
    image = pictures.quadrants().copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", b"nonsense" * 40)
    colours = quadrant_colours(decode(studio.copy(pictures.as_jpeg(image)).jpeg))
    assert is_near(colours[0], RED, 16)


def test_what_is_no_image_is_unreadable(studio: Studio) -> None:
    for name in ["text", "svg", "heic", "empty"]:
        with pytest.raises(ImageUnreadable):
            studio.copy(NOT_IMAGES[name]())


def test_a_file_that_is_gone_is_not_called_a_broken_image(tmp_path: Path) -> None:
    async def work(pool: ImagePool) -> None:
        with pytest.raises(FileNotFoundError):
            await pool.provider_copy(tmp_path / "nothing")

    run_with_pool(work)


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        with pytest.raises(ImageUnreadable, match="more than 1,000 pixels"):
            await pool.provider_copy(path)

    run_with_pool(work, max_pixels=1_000)


# --- Thumbnails --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(READABLE))
def test_a_thumbnail_fits_and_is_never_enlarged(name: str, studio: Studio) -> None:
    header = read_header(studio.file(READABLE[name]()))
    assert header is not None
    made = studio.thumbnail(READABLE[name]())
    image = decode(made.content)
    assert (image.width, image.height) == (made.width_px, made.height_px)
    assert max(image.width, image.height) <= min(300, max(header.width_px, header.height_px))
    assert made.mime == ("image/png" if header.has_alpha else "image/jpeg")
    assert sniff_image(made.content) == made.mime
    assert bool(image.hasalpha()) is header.has_alpha


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_thumbnail_is_upright(orientation: int, studio: Studio) -> None:
    made = studio.thumbnail(pictures.oriented_jpeg(orientation), 100)
    assert (made.width_px, made.height_px) == (100, 67)
    for colour, wanted in zip(quadrant_colours(decode(made.content)), QUADRANTS, strict=True):
        assert is_near(colour, wanted, 16)


def test_a_thumbnail_keeps_its_transparency(studio: Studio) -> None:
    image = decode(studio.thumbnail(pictures.alpha_png()).content)
    assert image(10, 10)[3] == 0
    assert image(230, 10)[3] == 255


# --- The children ------------------------------------------------------------------------------


# Evaluated among the names of `app.images`, so that the child imports no test.
_CHILD_FACTS = """{
    "links": {
        int(name): os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{name}")
    },
    "modules": sorted(sys.modules),
    "main_module": "__main__" in sys.modules,
    "memory_bytes": resource.getrlimit(resource.RLIMIT_DATA)[0],
    "status": Path("/proc/self/status").read_text(),
    "concurrency": pyvips.vips_lib.vips_concurrency_get(),
    "cached_operations": pyvips.cache_get_size(),
}"""


async def ask_child(pool: ImagePool, function: Callable[..., T], *args: Any) -> T:
    """Anything runs in a child the same way as the pool's own work."""
    return await pool._run(function, *args)


async def child_facts(pool: ImagePool) -> dict[str, Any]:
    facts: dict[str, Any] = await ask_child(pool, eval, _CHILD_FACTS)
    return facts


def test_a_child_that_takes_too_long_is_killed_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    others = own_children()

    async def work(pool: ImagePool) -> None:
        slow = own_children() - others
        assert len(slow) == 1
        with pytest.raises(ImageUnreadable, match="longer than 1 s"):
            await ask_child(pool, time.sleep, 60)
        assert not any(is_running(pid) for pid in slow)
        assert len(own_children() - others) == 1
        assert (await pool.provider_copy(path)).width_px == 240

    run_with_pool(work, timeout_seconds=1)


def test_a_child_that_crashes_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())
    others = own_children()

    async def work(pool: ImagePool) -> None:
        before = own_children() - others
        with pytest.raises(ImageUnreadable, match="crash"):
            await ask_child(pool, os.abort)
        after = own_children() - others
        assert len(after) == 2
        assert len(after & before) == 1
        assert (await pool.provider_copy(path)).width_px == 240

    run_with_pool(work, processes=2)


def test_a_cancelled_call_kills_its_child_and_the_pool_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    others = own_children()

    async def work(pool: ImagePool) -> None:
        slow = own_children() - others
        assert len(slow) == 1
        task = asyncio.create_task(ask_child(pool, time.sleep, 60))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any(is_running(pid) for pid in slow)
        assert (await pool.provider_copy(path)).width_px == 240

    run_with_pool(work)


def test_calls_wait_for_a_free_child_without_using_up_their_time(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        slow = asyncio.gather(*(ask_child(pool, time.sleep, 1.2) for _ in range(2)))
        await asyncio.sleep(0)
        assert (await pool.provider_copy(path)).width_px == 240
        await slow

    run_with_pool(work, timeout_seconds=2)


def test_a_closed_pool_has_no_children_and_takes_no_work(tmp_path: Path) -> None:
    async def run() -> set[int]:
        pool = ImagePool(processes=2)
        await pool.start()
        started = own_children()
        await pool.close()
        with pytest.raises(RuntimeError):
            await pool.provider_copy(tmp_path / "picture")
        return started

    before = own_children()
    started = asyncio.run(run()) - before
    assert len(started) == 2
    assert not any(is_running(pid) for pid in started)


def test_a_started_pool_spawns_no_more(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        before = own_children()
        await asyncio.gather(*(pool.thumbnail(path) for _ in range(6)))
        assert own_children() == before

    run_with_pool(work, processes=2)


def test_a_child_inherits_no_socket_and_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(server.fileno(), True)
        os.set_inheritable(lock.fileno(), True)
        facts = run_with_pool(child_facts)
    # Beside its three streams only what it opened itself.
    assert facts["links"].pop(2) == "/dev/null"
    assert {0, 1} <= facts["links"].keys()
    others = [link for number, link in facts["links"].items() if number > 2]
    assert {link for link in others if Path(link).exists()} <= {"/dev/null"}


def test_a_child_loads_little_and_is_bounded() -> None:
    facts = run_with_pool(child_facts)
    loaded = set(facts["modules"])
    assert not loaded & {"pydantic", "sqlalchemy", "fastapi", "grpc", "boto3", "pytest"}
    assert not facts["main_module"]
    assert facts["memory_bytes"] == 2 * 1024**3
    assert (facts["concurrency"], facts["cached_operations"]) == (1, 0)


def test_the_main_modules_file_is_back_after_each_call(studio: Studio) -> None:
    before = sys.modules["__main__"].__dict__.get("__file__")
    studio.copy(pictures.png())
    assert sys.modules["__main__"].__dict__.get("__file__") == before


_PARENT = """
import asyncio, sys, time
from pathlib import Path
from app.images import ImagePool

async def main():
    pool = ImagePool(processes=2)
    await pool.start()
    asyncio.create_task(pool._run(time.sleep, 600))
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_busy_and_idle_children_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        kids = children_of(parent.pid)
        assert len(kids) == 2
        assert all(is_running(pid) for pid in kids)
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(is_running(pid) for pid in kids))


def peak_memory_kib(work: Callable[[ImagePool], Awaitable[Any]], **options: Any) -> int:
    async def measured(pool: ImagePool) -> int:
        await work(pool)
        status = (await child_facts(pool))["status"]
        return int(status.partition("VmHWM:")[2].split()[0])

    return run_with_pool(measured, **options)


@pytest.mark.parametrize("name", list(LABORIOUS))
def test_laborious_files_are_read_in_bounded_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(LABORIOUS[name]())

    async def work(pool: ImagePool) -> None:
        await pool.provider_copy(path)

    assert peak_memory_kib(work) < 400 * 1024


def test_a_wide_jpeg_is_cheap(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(READABLE["jpeg-12000-wide"]())

    async def work(pool: ImagePool) -> None:
        await pool.provider_copy(path)

    # Its pixels would be 72 MB.
    assert peak_memory_kib(work) < 64 * 1024


def test_a_picture_that_needs_more_memory_than_there_is_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    image = pictures.plain(6_000, 6_000, RED).bandjoin(200).copy(interpretation="srgb")
    path.write_bytes(pictures.as_png(image, interlace=True))
    small = tmp_path / "small"
    small.write_bytes(pictures.png())

    async def work(pool: ImagePool) -> None:
        with pytest.raises(ImageUnreadable):
            await pool.provider_copy(path)
        assert (await pool.provider_copy(small)).width_px == 240

    run_with_pool(work, memory_bytes=100 * 1024 * 1024)


def test_what_crosses_between_processes_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ImageUnreadable("why")))
    assert isinstance(error, ImageUnreadable)
    assert str(error) == "why"


def test_children_write_no_file(tmp_path: Path) -> None:
    target = tmp_path / "written"

    async def work(pool: ImagePool) -> None:
        with pytest.raises(OSError, match="too large"):
            await ask_child(pool, target.write_text, "something")

    run_with_pool(work)
    assert target.read_text() == ""


def test_uvloop_runs_the_pool_as_well(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")
    path = tmp_path / "picture"
    path.write_bytes(pictures.png())

    async def run() -> int:
        pool = ImagePool(processes=1, timeout_seconds=1)
        await pool.start()
        with pytest.raises(ImageUnreadable):
            await ask_child(pool, time.sleep, 60)
        width = (await pool.provider_copy(path)).width_px
        await pool.close()
        return width

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == 240
