"""What is read of a usual JPEG without libvips is what libvips would read."""

from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.images import headers
from app.images.headers import ImageHeader, read_header
from app.images.jpeg import read_usual_jpeg
from tests import pictures

USUAL = {
    **{f"orientation {number}": pictures.oriented_jpeg(number) for number in range(1, 9)},
    "progressive": pictures.progressive_jpeg(),
    "grey": pictures.grey_jpeg(),
    "profile": pictures.display_p3_jpeg(),
    "long metadata": pictures.long_metadata_jpeg(),
    "truncated": pictures.truncated_jpeg(),
}


def head_of(content: bytes) -> bytes:
    return headers._jpeg_head(BytesIO(content))


def by_libvips(content: bytes) -> ImageHeader | None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(headers, "read_usual_jpeg", lambda head: None)
        return read_header(content)


@pytest.mark.parametrize("name", list(USUAL))
def test_a_usual_jpeg_is_read_without_libvips(name: str) -> None:
    usual = read_usual_jpeg(head_of(USUAL[name]))
    assert usual is not None
    width_px, height_px, orientation = usual
    expected = ImageHeader("image/jpeg", width_px, height_px, False, orientation)
    assert by_libvips(USUAL[name]) == expected


def test_an_unusual_jpeg_is_left_to_libvips() -> None:
    assert read_usual_jpeg(head_of(pictures.cmyk_jpeg())) is None


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_wrong_with_it_a_jpeg_is_what_libvips_says(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(list(USUAL.values())))[:20_000])
    odd = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 255]))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(3, min(len(content), 700) - 1))] = data.draw(odd)
    assert read_header(bytes(content)) == by_libvips(bytes(content))
