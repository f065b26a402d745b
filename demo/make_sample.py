"""Draws `sample.jpg`: hills by a lake at sunset, out of gradients, sine waves and noise.

Run from the project's directory: python -m demo.make_sample
"""

from pathlib import Path
from typing import Any

import pyvips

WIDTH, HEIGHT = 1200, 800
HORIZON = 470
SAMPLE = Path(__file__).with_name("sample.jpg")

Colour = tuple[int, int, int]

# From the zenith down to the horizon.
SKY: tuple[Colour, ...] = ((46, 38, 110), (128, 58, 140), (232, 92, 96), (255, 160, 70))
SKY_STOPS = (0, 190, 350, HORIZON)
SUN: Colour = (255, 226, 130)
SUN_CENTRE = (790, 395)
SUN_RADIUS = 62
# Each hill: its top, the height and length of its waves, its colour; the far ones first.
HILLS: tuple[tuple[int, int, float, Colour], ...] = (
    (400, 38, 1.3, (122, 62, 122)),
    (430, 26, 2.1, (84, 44, 100)),
    (455, 14, 3.7, (44, 30, 70)),
)
SHORE: tuple[int, int, float, Colour] = (742, 16, 1.7, (34, 74, 44))


def fill(colour: Colour) -> Any:
    return pyvips.Image.black(WIDTH, HEIGHT, bands=3) + list(colour)


def paint(picture: Any, mask: Any, colour: Colour) -> Any:
    """The colour where the mask is 255, the picture where it is 0, between them a mixture."""
    share = mask / 255
    return picture * (1 - share) + fill(colour) * share


def draw_sky(y: Any) -> Any:
    sky = fill(SKY[0])
    stops = zip(SKY_STOPS[:-1], SKY_STOPS[1:], SKY[1:], strict=True)
    for start, end, colour in stops:
        share = ((y - start) / (end - start)).maxpair(0).minpair(1)
        sky = sky * (1 - share) + fill(colour) * share
    return sky


def draw_sun(sky: Any, x: Any, y: Any) -> Any:
    distance = ((x - SUN_CENTRE[0]) ** 2 + (y - SUN_CENTRE[1]) ** 2) ** 0.5
    glow = (distance * -0.008).exp() * 150
    disc = ((SUN_RADIUS - distance + 0.5) * 255).maxpair(0).minpair(255)
    return paint(paint(sky, glow, (255, 190, 90)), disc, SUN)


def draw_hill(picture: Any, x: Any, y: Any, hill: tuple[int, int, float, Colour]) -> Any:
    top, height, waves, colour = hill
    turns = x / WIDTH * 360 * waves
    ridge = (turns + top).sin() * height + (turns * 2.7 + 40).sin() * (height / 3) + top
    mask = ((y - ridge + 0.5) * 255).maxpair(0).minpair(255)
    return paint(picture, mask, colour)


def draw_lake(picture: Any, y: Any) -> Any:
    """The upper part upside down, darker, bluer and shaken by ripples that grow with nearness."""
    depth = (y - HORIZON).maxpair(0)
    xy = pyvips.Image.xyz(WIDTH, HEIGHT)
    ripple = ((depth**0.6 * 60) + xy[0] * 0.9).sin() * (depth * 0.05)
    across = (xy[0] + ripple).maxpair(0).minpair(WIDTH - 2)
    source = across.bandjoin(HORIZON - depth * 1.25 + ripple)
    mirrored = picture.mapim(source, extend="copy")
    water = mirrored * 0.66 + [18, 14, 40]
    return (y > HORIZON).ifthenelse(water, picture)


def draw() -> Any:
    xy = pyvips.Image.xyz(WIDTH, HEIGHT)
    x, y = xy[0], xy[1]
    picture = draw_sun(draw_sky(y), x, y)
    for hill in HILLS:
        picture = draw_hill(picture, x, y, hill)
    picture = draw_hill(draw_lake(picture, y), x, y, SHORE)
    grain = pyvips.Image.gaussnoise(WIDTH, HEIGHT, mean=0, sigma=1, seed=1)
    return (picture + grain).cast("uchar").copy(interpretation="srgb")


def main() -> None:
    draw().jpegsave(str(SAMPLE), Q=86, keep="none")
    print(f"{SAMPLE}: {SAMPLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
