from pathlib import Path

import pytest
import pyvips

from app.images import ImagePool, ImageUnreadable, read_header, sniff_image
from tests import pictures
from tests.images.support import Studio, decode, is_near, quadrant_colours, run_with_pool
from tests.pictures import BLUE, NOT_IMAGES, QUADRANTS, READABLE, RED, UNREADABLE

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


@pytest.mark.parametrize("size", [(3600, 2398), (2398, 3600), (3625, 2415), (1406, 939)])
def test_a_thumbnails_size_does_not_depend_on_how_the_decoder_rounds(
    size: tuple[int, int], studio: Studio
) -> None:
    image = pictures.plain(*size, RED)
    jpeg = studio.thumbnail(pictures.as_jpeg(image))
    png = studio.thumbnail(pictures.as_png(image))
    assert (jpeg.width_px, jpeg.height_px) == (png.width_px, png.height_px)
    shrink = max(size) / 300
    assert (jpeg.width_px, jpeg.height_px) == tuple(round(side / shrink) for side in size)


# The least that is left to the resizer after each of the decoder's own factors, and the most.
@pytest.mark.parametrize("width", [900, 1780, 1800, 3580, 3600, 4800])
def test_a_thumbnail_looks_as_if_every_pixel_had_been_decoded(width: int, studio: Studio) -> None:
    image = pictures.noise(width, width * 3 // 4).gaussblur(width / 300)
    decoded = pyvips.Image.jpegload_buffer(stored := pictures.as_jpeg(image))
    wanted = decode(pictures.as_jpeg(decoded.thumbnail_image(300), Q=82))
    difference = decode(studio.thumbnail(stored).content) - wanted
    assert (difference**2).avg() ** 0.5 < 2  # of 255


@pytest.mark.parametrize("name", list(READABLE))
def test_every_picture_has_a_webp_thumbnail_too(name: str, studio: Studio) -> None:
    usual, made = (studio.thumbnail(READABLE[name](), as_webp=webp) for webp in (False, True))
    image = decode(made.content)
    assert made.mime == sniff_image(made.content) == "image/webp"
    assert (image.width, image.height) == (usual.width_px, usual.height_px)
    assert not {"exif-data", "icc-profile-data", "orientation"} & set(image.get_fields())


def test_a_webp_thumbnail_keeps_its_colours_and_transparency(studio: Studio) -> None:
    image = decode(studio.thumbnail(pictures.alpha_png(), as_webp=True).content)
    assert image(10, 10)[3] == 0
    assert image(230, 10)[3] == 255
    for colour, wanted in list(zip(quadrant_colours(image), QUADRANTS, strict=True))[1::2]:
        assert is_near(colour, wanted, 16)


def test_a_webp_thumbnail_is_lossy_and_small_even_with_transparency(studio: Studio) -> None:
    content = pictures.as_png(pictures.noise(300, 300).gaussblur(2).bandjoin(128))
    as_png, as_webp = (studio.thumbnail(content, as_webp=webp).content for webp in (False, True))
    assert len(as_webp) < len(as_png) / 4
