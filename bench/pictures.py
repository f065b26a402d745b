"""The pictures that are uploaded and rendered: made here, the same on every machine."""

from collections.abc import Mapping
from pathlib import Path

import pyvips

# Name -> width, height, JPEG quality. What comes out has about 100 KB and 3 MB.
SIZES = {"100k": (800, 600, 89), "3m": (4000, 3000, 94)}


def make_pictures(directory: Path) -> Mapping[str, Path]:
    """Photo-like JPEGs: smooth areas, hard edges and some noise."""
    made = {}
    for name, (width, height, quality) in SIZES.items():
        made[name] = directory / f"{name}.jpg"
        _scene(width, height).jpegsave(str(made[name]), Q=quality, keep="none", subsample_mode="on")
    return made


def _scene(width: int, height: int) -> "pyvips.Image":
    bands = [_band(width, height, seed) for seed in (1, 2, 3)]
    scene = bands[0].bandjoin(bands[1:])
    return scene.cast("uchar").copy(interpretation="srgb")


def _band(width: int, height: int, seed: int) -> "pyvips.Image":
    """Clouds, cut into steps here and there, under grain."""
    clouds = pyvips.Image.perlin(width, height, cell_size=width // 8, seed=seed) * 80 + 128
    blots = pyvips.Image.worley(width, height, cell_size=width // 16, seed=seed) > width / 36
    grain = pyvips.Image.gaussnoise(width, height, sigma=6, mean=0, seed=seed)
    return clouds + blots / 255 * 40 + grain
