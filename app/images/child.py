"""What a child process does around its work on pixels."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from app.images.pixels import BROKEN, COPY_QUALITY, ImageUnreadable, encode_jpeg
from app.images.vips import pyvips

T = TypeVar("T")

_TOO_MUCH = "The image needs too much memory."


def run_in_child(memory_bytes: int, work: Callable[..., T], *args: Any) -> T:
    _confine(memory_bytes)
    try:
        return work(*args)
    except (pyvips.Error, MemoryError) as error:
        # The words themselves may name a file of ours.
        words = str(error).lower()
        is_too_much = isinstance(error, MemoryError) or "alloc" in words or "out of mem" in words
        raise ImageUnreadable(_TOO_MUCH if is_too_much else BROKEN) from None


@cache
def _confine(memory_bytes: int) -> None:
    """Bounds what this process can use, however wrong a decoder goes. Once is for good."""
    # A terminal's Ctrl-C and a service manager's stop reach the whole group; the parent, which
    # still answers its last requests, is the one to end this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Pixels never go through a file, also not through one that libvips makes for large pictures.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, resource.RLIM_INFINITY))
        # A busy child would notice only afterwards that its parent is gone.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # What a library prints would fill a pipe that nobody reads.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def warm_up() -> None:
    """Loads what the first picture would otherwise wait for."""
    encode_jpeg(pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb"), COPY_QUALITY)


def ask_to_be_ended() -> None:
    """Answers what anyio does not understand, which makes it kill this process and wait for it.

    Just to exit would race with that kill.
    """
    os.write(1, b"END\n")
    signal.pause()
