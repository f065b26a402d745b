"""libvips, set up alike in this process and in every child: whoever needs it gets it here."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pyvips

__all__ = ["loader", "pyvips"]

_LOADERS = {
    "image/jpeg": "jpegload",
    "image/png": "pngload",
    "image/webp": "webpload",
    "image/gif": "gifload",
    "image/tiff": "tiffload",
    "image/avif": "heifload",
}
_LOADER_CLASSES = ("Jpeg", "Png", "Webp", "Nsgif", "Tiff", "Heif")


def _set_up() -> None:
    # Its warnings would be noise: what they tell is in the header, or in ImageUnreadable.
    logging.getLogger("pyvips").setLevel(logging.CRITICAL + 1)
    # The cache would keep files open and pixels in memory after their use.
    pyvips.cache_set_max(0)
    pyvips.vips_lib.vips_concurrency_set(1)
    pyvips.operation_block_set("VipsForeignLoad", True)
    for name in _LOADER_CLASSES:
        pyvips.operation_block_set(f"VipsForeignLoad{name}", False)


_set_up()


def loader(mime: str, suffix: str = "") -> Callable[..., Any]:
    return partial(pyvips.Operation.call, _LOADERS[mime] + suffix)
