"""Whether an upload may begin: room on the disk, and not too many at once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import ApiError
from app.storage.base import system_errors_as_unavailable

RETRY_AFTER_SECONDS = 5


class NoRoom(ApiError):
    """503: the same upload may go through a little later."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, headers={"retry-after": str(RETRY_AFTER_SECONDS)})


class Admission:
    """Counts uploads under way in this process.

    reserve_bytes: what has to stay free where uploads are staged, for the database and reads.
    """

    def __init__(self, directory: Path, *, max_concurrent: int, reserve_bytes: int) -> None:
        self._directory = directory
        self._max_concurrent = max_concurrent
        self._reserve_bytes = reserve_bytes
        self._under_way = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises NoRoom and StorageUnavailable before anything of the body has been read."""
        if self._under_way >= self._max_concurrent:
            raise NoRoom("Too many uploads are under way. Please try again later.")
        with system_errors_as_unavailable("cannot tell what room there is"):
            free_bytes = shutil.disk_usage(self._directory).free
        if free_bytes < self._reserve_bytes:
            raise NoRoom("There is no room for uploads at the moment. Please try again later.")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
