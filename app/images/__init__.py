"""Pixels through libvips, nowhere else.

Headers are read in this process and pixels only in children (`ImagePool`), which are spawned,
bounded in memory, pixels and time, and end with their parent. Six formats are known by their first
bytes and each goes to its own loader; all other loaders are blocked, so that no SVG or PDF parser
can start.
"""

from app.images.headers import SNIFF_BYTES, ImageHeader, read_header, sniff_image
from app.images.measures import PixelMeasures
from app.images.pixels import ImageUnreadable, ProviderCopy, Rendition
from app.images.pool import ImagePool

__all__ = [
    "SNIFF_BYTES",
    "ImageHeader",
    "ImagePool",
    "ImageUnreadable",
    "PixelMeasures",
    "ProviderCopy",
    "Rendition",
    "read_header",
    "sniff_image",
]
