import resource
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.images import SNIFF_BYTES, ImageHeader, read_header, sniff_image
from tests import pictures
from tests.pictures import LABORIOUS, NOT_IMAGES, READABLE, UNREADABLE


def header_of(tmp_path: Path, content: bytes) -> ImageHeader | None:
    path = tmp_path / "picture"
    path.write_bytes(content)
    return read_header(path)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


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
