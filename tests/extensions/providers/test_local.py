import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pyvips
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import ValidationError

from app.extensions.provider import CallLimits, Label, ProviderError, Reason
from app.extensions.providers.local import FAULTS, PROVIDER, Local, LocalSettings
from app.extensions.schemas import AWS, GOOGLE
from app.images import ImagePool, ProviderCopy
from app.settings import SettingsError
from tests import pictures

LIMITS = CallLimits(timeout_seconds=10, concurrency=4)

SAMPLE = Path(__file__).parents[3] / "demo" / "sample.jpg"


class Studio:
    """A pool and its event loop for all tests of this module."""

    def __init__(self, folder: Path, portal: BlockingPortal, pool: ImagePool) -> None:
        self._folder = folder
        self._portal = portal
        self.pool = pool

    def copy(self, content: bytes) -> ProviderCopy:
        path = self._folder / "picture"
        path.write_bytes(content)
        return self._portal.call(self.pool.provider_copy, path)

    def label(self, content: bytes, extension: str = AWS) -> list[Label]:
        return self.ask(Local(extension, LIMITS, self.pool), content)

    def ask(self, provider: Local, content: bytes) -> list[Label]:
        return self._portal.call(provider.detect_labels, self.copy(content)).labels

    def confidences(self, content: bytes) -> dict[str, float]:
        return {label.name: label.confidence for label in self.label(content)}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with start_blocking_portal() as portal:
        pool = ImagePool(processes=1)
        portal.call(pool.start)
        yield Studio(tmp_path_factory.mktemp("pictures"), portal, pool)
        portal.call(pool.close)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOUPE_LOCAL_DELAY_SECONDS", raising=False)
    monkeypatch.delenv("LOUPE_LOCAL_FAULT", raising=False)


def plain(*colour: int, width: int = 200, height: int = 200) -> bytes:
    return pictures.as_png(pictures.plain(width, height, (colour[0], colour[1], colour[2])))


def noise() -> Any:
    return pictures.noise(400, 300)


def stripes() -> Any:
    """Black and white bars, thirty pixels wide."""
    bars = pyvips.Image.xyz(300, 200)[0] % 60 < 30
    return bars.copy(interpretation="b-w")


NOISE = pictures.as_png(noise())
STRIPES = pictures.as_png(stripes())
BLURRED = pictures.as_png(stripes().gaussblur(6))


# --- Labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("Red", (220, 20, 30)),
        ("Orange", (250, 140, 20)),
        ("Yellow", (245, 220, 40)),
        ("Green", (30, 150, 60)),
        ("Teal", (20, 150, 150)),
        ("Blue", (30, 70, 220)),
        ("Purple", (120, 40, 170)),
        ("Pink", (250, 130, 190)),
        ("Brown", (120, 75, 30)),
        ("Black", (10, 10, 12)),
        ("White", (252, 252, 252)),
        ("Gray", (130, 130, 130)),
    ],
)
def test_a_picture_of_one_colour_has_its_name(
    name: str, colour: tuple[int, int, int], studio: Studio
) -> None:
    confidences = studio.confidences(plain(*colour))
    assert confidences[name] > 99
    all_colours = {"Red", "Orange", "Yellow", "Green", "Teal", "Blue", "Purple", "Pink", "Brown"}
    all_colours |= {"Black", "White", "Gray"}
    assert set(confidences) & all_colours == {name}


def test_a_colours_confidence_is_its_share_of_the_area(studio: Studio) -> None:
    confidences = studio.confidences(pictures.jpeg())
    for name in ("Red", "Green", "Blue", "Yellow"):
        assert confidences[name] == pytest.approx(25, abs=2)


def test_a_colour_on_a_sliver_of_the_area_is_left_out(studio: Studio) -> None:
    image = pictures.plain(200, 200, pictures.BLUE)
    image = image.insert(pictures.plain(40, 40, pictures.RED), 80, 80)
    assert "Red" not in studio.confidences(pictures.as_png(image))


# For each label a picture that gives it and one that does not.
@pytest.mark.parametrize(
    ("name", "given", "not_given"),
    [
        ("Black and White", STRIPES, pictures.jpeg()),
        ("Dark", plain(20, 10, 40), plain(240, 240, 200)),
        ("Bright", plain(240, 240, 200), plain(20, 10, 40)),
        ("Square", plain(9, 9, 9), plain(9, 9, 9, width=300)),
        ("Portrait", plain(9, 9, 9, height=300), plain(9, 9, 9, width=300)),
        ("Landscape", plain(9, 9, 9, width=300), plain(9, 9, 9, height=300)),
        ("Panorama", plain(9, 9, 9, width=500), plain(9, 9, 9, width=300)),
        ("Transparent", pictures.alpha_png(), pictures.png()),
        ("Graphic", pictures.png(), NOISE),
        ("Photograph", NOISE, pictures.png()),
        ("Sharp", STRIPES, BLURRED),
        ("Blurry", BLURRED, STRIPES),
    ],
)
def test_a_label_is_given_where_it_holds_and_only_there(
    name: str, given: bytes, not_given: bytes, studio: Studio
) -> None:
    assert studio.confidences(given)[name] >= 50
    assert name not in studio.confidences(not_given)


def test_transparency_is_told_in_percent(studio: Studio) -> None:
    assert studio.confidences(pictures.alpha_png())["Transparent"] == pytest.approx(50, abs=2)


def test_shape_is_that_of_the_upright_upload_not_of_the_padded_copy(studio: Studio) -> None:
    for orientation in range(1, 9):
        assert "Landscape" in studio.confidences(pictures.oriented_jpeg(orientation))
    assert {"Landscape", "Panorama"} <= studio.confidences(pictures.line_png()).keys()


def test_a_plain_picture_is_neither_sharp_nor_blurry(studio: Studio) -> None:
    assert not {"Sharp", "Blurry"} & studio.confidences(plain(90, 90, 90)).keys()


@pytest.mark.parametrize("name", list(pictures.READABLE))
def test_every_picture_has_labels_with_sound_confidences(name: str, studio: Studio) -> None:
    labels = studio.label(pictures.READABLE[name]())
    assert labels
    assert len({label.name for label in labels}) == len(labels)
    assert all(0 < label.confidence <= 100 for label in labels)
    assert labels == sorted(labels, key=lambda label: (-label.confidence, label.name))


def test_the_same_image_gives_the_same_labels(studio: Studio) -> None:
    content = pictures.as_jpeg(noise())
    assert studio.label(content, AWS) == studio.label(content, GOOGLE)


def test_the_shipped_sample_is_small_and_colourful(studio: Studio) -> None:
    content = SAMPLE.read_bytes()
    assert len(content) < 200_000
    confidences = studio.confidences(content)
    assert {"Landscape", "Graphic", "Purple", "Pink", "Red", "Green"} <= confidences.keys()


# --- Delays and faults -------------------------------------------------------------------------


def test_a_delay_is_waited_for(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOUPE_LOCAL_DELAY_SECONDS", f"{AWS}=0.3")
    start = time.monotonic()
    assert studio.label(pictures.png(), AWS)
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "timeout"])
def test_a_fault_is_the_error_of_its_name(
    fault: str, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOUPE_LOCAL_FAULT", fault)
    with pytest.raises(ProviderError) as raised:
        studio.label(pictures.png())
    assert raised.value.reason == FAULTS[fault]


def test_the_fault_timeout_is_no_answer_until_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOUPE_LOCAL_FAULT", "timeout")
    provider = Local(AWS, LIMITS, ImagePool())
    copy = ProviderCopy(b"", 80, 80, 80, 80, 0.0)

    async def call() -> None:
        async with asyncio.timeout(0.2):
            await provider.detect_labels(copy)

    with pytest.raises(TimeoutError):
        asyncio.run(call())


def test_a_fault_for_one_extension_leaves_the_other_alone(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOUPE_LOCAL_FAULT", f"{AWS}=throttled")
    with pytest.raises(ProviderError):
        studio.label(pictures.png(), AWS)
    assert studio.label(pictures.png(), GOOGLE)


def test_a_picture_that_cannot_be_measured_is_tried_again(studio: Studio) -> None:
    async def ask() -> None:
        pool = ImagePool(processes=1)
        await pool.start()
        try:
            provider = Local(AWS, LIMITS, pool)
            await provider.detect_labels(ProviderCopy(b"nonsense", 80, 80, 80, 80, 0.0))
        finally:
            await pool.close()

    with pytest.raises(ProviderError) as raised:
        asyncio.run(ask())
    assert raised.value.reason == Reason.UNAVAILABLE


# --- Settings ----------------------------------------------------------------------------------


def test_one_value_holds_for_both_extensions() -> None:
    settings = LocalSettings(delay_seconds="1.5", fault="throttled")
    for extension in (AWS, GOOGLE):
        assert settings.delay_for(extension) == 1.5
        assert settings.fault_for(extension) is Reason.THROTTLED


def test_each_extension_can_have_its_own_value() -> None:
    settings = LocalSettings(delay_seconds=f"{AWS}=5, {GOOGLE}=0", fault=f"{GOOGLE}=credentials")
    assert (settings.delay_for(AWS), settings.delay_for(GOOGLE)) == (5, 0)
    assert settings.fault_for(AWS) is None
    assert settings.fault_for(GOOGLE) is Reason.CREDENTIALS


def test_nothing_set_means_neither_delay_nor_fault() -> None:
    settings = LocalSettings()
    assert settings.delay_for(AWS) == 0
    assert settings.fault_for(AWS) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("delay_seconds", "soon", "wants seconds from 0 to 3600, not 'soon'"),
        ("delay_seconds", "-1", "wants seconds from 0 to 3600, not '-1'"),
        ("delay_seconds", "nan", "wants seconds from 0 to 3600, not 'nan'"),
        ("delay_seconds", "1e9", "wants seconds from 0 to 3600"),
        ("delay_seconds", f"{AWS}=", "wants seconds from 0 to 3600, not ''"),
        ("delay_seconds", f"{AWS}=5,3", "does not know the extension '3'"),
        ("delay_seconds", "tagging=5", "does not know the extension 'tagging'"),
        ("delay_seconds", f"{AWS}=5,{AWS}=6", f"names {AWS} twice"),
        ("fault", "explode", "LOUPE_LOCAL_FAULT does not know 'explode', only none, timeout"),
        ("fault", f"{AWS}=explode", "does not know 'explode'"),
    ],
)
def test_a_wrong_setting_is_refused_with_one_sentence(name: str, value: str, message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        LocalSettings.model_validate({name: value})
    (error,) = raised.value.errors()
    assert message in error["msg"]
    assert "\n" not in error["msg"]


def test_a_wrong_setting_stops_the_provider_from_being_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOUPE_LOCAL_FAULT", "explode")
    with pytest.raises(SettingsError, match="explode"):
        PROVIDER(AWS, LIMITS, ImagePool())


def test_opening_and_closing_need_nothing() -> None:
    async def run() -> None:
        provider = PROVIDER(AWS, LIMITS, ImagePool())
        await provider.open()
        await provider.close()

    asyncio.run(run())
