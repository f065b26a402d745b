"""What the local tagger wants to know of a picture. Runs in a child process."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from app.images.vips import loader

_COLOUR_LEVELS = 32  # per channel
_PALETTE_COLOURS = 8


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


def measure(jpeg: bytes) -> PixelMeasures:
    image = loader("image/jpeg", "_buffer")(jpeg).copy_memory()
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
