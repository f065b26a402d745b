"""The `local` tagger: measures a picture's pixels on this machine. No key, no network.

It says what can be measured, not what is shown. Confidence is a label's measure x 100:

Red, Orange, Yellow, Green, Teal, Blue, Purple, Pink, Brown, Black, White, Gray
    Share of the area in that colour, from 0.05.
Black and White
    Share of the pixels without colour, from 0.9.
Dark, Bright
    Share of the pixels with a lightness (CIE L*) below 30, above 75 of 100; from 0.5.
Square
    The shorter side as a share of the longer, from 0.95.
Portrait, Landscape
    1 if taller than wide, wider than tall, and not Square.
Panorama
    1 if one side is at least twice the other; besides Portrait or Landscape.
Transparent
    Mean transparency, from 0.01.
Graphic, Photograph
    Mean of the share of flat area and of the area in the eight commonest colours, or 1 - that,
    whichever is larger.
Sharp, Blurry
    d / (d + 0.03), d being the share of contrast that a blur of one pixel takes away, or 1 - that,
    whichever is larger. Neither where there is next to no contrast to judge by.
"""

import math
from collections.abc import Iterator
from typing import ClassVar, Final

import anyio
from pydantic import field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.extensions.provider import Answer, CallLimits, Label, Provider, ProviderError, Reason
from app.extensions.schemas import EXTENSIONS
from app.images import ImagePool, ImageUnreadable, PixelMeasures, ProviderCopy
from app.settings import load_settings

MAX_DELAY_SECONDS = 3600.0

NO_FAULT = "none"
# What `LOUPE_LOCAL_FAULT` may name. A timeout is no answer at all, until the caller gives up.
FAULTS: dict[str, Reason] = {
    "timeout": Reason.TIMEOUT,
    "throttled": Reason.THROTTLED,
    "unavailable": Reason.UNAVAILABLE,
    "bad_reply": Reason.BAD_REPLY,
    "credentials": Reason.CREDENTIALS,
    "image_rejected": Reason.IMAGE_REJECTED,
}

_MIN_COLOUR_SHARE = 0.05
_MIN_NEUTRAL_SHARE = 0.9
_MIN_LIGHTNESS_SHARE = 0.5
_MIN_SQUARE_RATIO = 0.95
_MAX_PANORAMA_RATIO = 0.5
_MIN_TRANSPARENT_SHARE = 0.01
_MIN_CONTRAST = 0.04
# The share of contrast at which a picture is as sharp as it is blurry.
_HALF_SHARP = 0.03


class LocalSettings(BaseSettings):
    """For development. delay_seconds: how long each call takes at least. fault: how each one ends,
    "none" or one of `FAULTS`. One value for both extensions, or `extension=value` for some,
    separated by commas."""

    model_config = SettingsConfigDict(
        env_prefix="LOUPE_LOCAL_", env_ignore_empty=True, coerce_numbers_to_str=True
    )

    delay_seconds: str = "0"
    fault: str = NO_FAULT

    @field_validator("delay_seconds")
    @classmethod
    def _delays_are_seconds(cls, text: str) -> str:
        for value in _by_extension(text, "LOUPE_LOCAL_DELAY_SECONDS").values():
            _check_delay(value)
        return text

    @field_validator("fault")
    @classmethod
    def _faults_are_known(cls, text: str) -> str:
        for value in _by_extension(text, "LOUPE_LOCAL_FAULT").values():
            if value not in (NO_FAULT, *FAULTS):
                known = ", ".join((NO_FAULT, *FAULTS))
                raise ValueError(f"LOUPE_LOCAL_FAULT does not know {value!r}, only {known}")
        return text

    def delay_for(self, extension: str) -> float:
        """Seconds."""
        delays = _by_extension(self.delay_seconds, "LOUPE_LOCAL_DELAY_SECONDS")
        return float(delays.get(extension, "0"))

    def fault_for(self, extension: str) -> Reason | None:
        faults = _by_extension(self.fault, "LOUPE_LOCAL_FAULT")
        return FAULTS.get(faults.get(extension, NO_FAULT))


def _by_extension(text: str, setting: str) -> dict[str, str]:
    """The value that holds for each extension that has one."""
    if "=" not in text:
        return dict.fromkeys(EXTENSIONS, text.strip())
    values: dict[str, str] = {}
    for part in text.split(","):
        extension, _, value = (piece.strip() for piece in part.partition("="))
        if extension not in EXTENSIONS:
            known = " and ".join(EXTENSIONS)
            raise ValueError(f"{setting} does not know the extension {extension!r}, only {known}")
        if extension in values:
            raise ValueError(f"{setting} names {extension} twice")
        values[extension] = value
    return values


def _check_delay(value: str) -> None:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_DELAY_SECONDS:
        raise ValueError(
            f"LOUPE_LOCAL_DELAY_SECONDS wants seconds from 0 to {MAX_DELAY_SECONDS:g},"
            f" not {value!r}"
        )


class Local:
    """Implements Provider by measuring."""

    name: ClassVar[str] = "local"
    ANSWER_VERSION: ClassVar[int] = 1
    is_billed: ClassVar[bool] = False
    settings_class: ClassVar[type[BaseSettings]] = LocalSettings

    def __init__(self, extension: str, limits: CallLimits, images: ImagePool) -> None:
        settings = load_settings(LocalSettings)
        self._delay_seconds = settings.delay_for(extension)
        self._fault = settings.fault_for(extension)
        self._images = images

    async def open(self) -> None:
        """There is nothing to connect to: the pool is started by whoever made it."""

    async def detect_labels(self, image: ProviderCopy) -> Answer:
        """All labels that the picture has, best first. Raises ProviderError."""
        await anyio.sleep(self._delay_seconds)
        if self._fault is Reason.TIMEOUT:
            await anyio.sleep_forever()
        if self._fault is not None:
            raise ProviderError(self._fault, "The local tagger is set to fail like this.")
        try:
            measures = await self._images.measure(image)
        except ImageUnreadable as error:
            raise ProviderError(
                Reason.UNAVAILABLE, "The local tagger could not measure the image."
            ) from error
        labels = label_picture(image, measures)
        return Answer(sorted(labels, key=lambda label: (-label.confidence, label.name)))

    async def close(self) -> None:
        """Nothing of its own to close."""


def label_picture(image: ProviderCopy, measures: PixelMeasures) -> Iterator[Label]:
    """Every label of the table above that the measures give."""
    for name, share in _scores(image, measures):
        yield Label(name, min(max(share, 0.0), 1.0) * 100)


def _scores(image: ProviderCopy, measures: PixelMeasures) -> Iterator[tuple[str, float]]:
    for name, share in measures.colour_shares:
        yield from _at_least(_MIN_COLOUR_SHARE, name, share)
    yield from _at_least(_MIN_NEUTRAL_SHARE, "Black and White", measures.neutral_share)
    yield from _at_least(_MIN_LIGHTNESS_SHARE, "Dark", measures.dark_share)
    yield from _at_least(_MIN_LIGHTNESS_SHARE, "Bright", measures.bright_share)
    yield from _at_least(_MIN_TRANSPARENT_SHARE, "Transparent", image.transparent_share)
    yield from _shape(image.source_width_px, image.source_height_px)
    graphic = (measures.flat_share + measures.palette_share) / 2
    yield ("Graphic", graphic) if graphic >= 0.5 else ("Photograph", 1 - graphic)
    if measures.contrast >= _MIN_CONTRAST:
        sharp = measures.detail_share / (measures.detail_share + _HALF_SHARP)
        yield ("Sharp", sharp) if sharp >= 0.5 else ("Blurry", 1 - sharp)


def _at_least(least: float, name: str, share: float) -> Iterator[tuple[str, float]]:
    if share >= least:
        yield name, share


def _shape(width_px: int, height_px: int) -> Iterator[tuple[str, float]]:
    ratio = min(width_px, height_px) / max(width_px, height_px)
    if ratio >= _MIN_SQUARE_RATIO:
        yield "Square", ratio
        return
    yield ("Landscape" if width_px > height_px else "Portrait"), 1.0
    if ratio <= _MAX_PANORAMA_RATIO:
        yield "Panorama", 1.0


PROVIDER: Final[type[Provider]] = Local
