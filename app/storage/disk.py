"""What every storage does with its staging directory."""

import contextlib
import os
from datetime import datetime
from pathlib import Path


def try_to_write(directory: Path) -> None:
    """Raises OSError when no file can be written there."""
    probe = directory / f".probe-{os.getpid()}"
    probe.write_bytes(b"x")
    # Somebody else's probe may have the same name, and may be faster.
    probe.unlink(missing_ok=True)


def remove_older(directory: Path, before: datetime) -> None:
    """Removes the files that nobody has written to since."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime < before.timestamp():
                    Path(entry).unlink()


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
