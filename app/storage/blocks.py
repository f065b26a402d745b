"""New files in large blocks, written past the system's page cache where the file system can.

To find, fill and write back a page for bytes that nobody may read soon is most of what it costs to
store them: up to ten times as much as to hand them to the disk. Source: open(2), O_DIRECT.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from io import FileIO
from pathlib import Path

BLOCK_BYTES = 256 * 1024
_PAGE_BYTES = 4096
_KEPT_BLOCKS = 16
_MODE = 0o666  # less the umask
_DIRECT: int = getattr(os, "O_DIRECT", 0)

# Pages that have been in use: to be given fresh ones costs more than to fill them.
_free_blocks: list[mmap.mmap] = []


class BlockFile:
    """A file that is not there yet. It gathers a block in memory, which `write_block` writes.

    Every method but `take` may wait for the disk; all but `discard` raise OSError. One call at a
    time, in any thread; only `discard` may come in between, and makes the other fail.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._block: mmap.mmap | None = None
        self._filled_bytes = 0
        self._written_bytes = 0
        self._is_direct = _DIRECT != 0
        self._is_discarded = False

    @property
    def is_in_memory(self) -> bool:
        """Whether nothing has been written yet."""
        return self._file is None

    @property
    def is_block_full(self) -> bool:
        return self._filled_bytes == BLOCK_BYTES

    @property
    def block(self) -> memoryview:
        """What has been taken since a block was written. To be released before the next call."""
        return memoryview(self._block or b"")[: self._filled_bytes]

    def take(self, piece: memoryview) -> int:
        """Takes what fits into the block; returns how many bytes that were."""
        if self._block is None:
            self._block = _take_block()
        start = self._filled_bytes
        size = min(len(piece), BLOCK_BYTES - start)
        self._block[start : start + size] = piece[:size]
        self._filled_bytes += size
        return size

    def write_block(self) -> None:
        """A block that is not full is the last one."""
        self._open()
        if self._block is None or not self._filled_bytes:
            return
        padding = -self._filled_bytes % _PAGE_BYTES if self._is_direct else 0
        end = self._filled_bytes + padding
        self._block[self._filled_bytes : end] = bytes(padding)
        with memoryview(self._block) as block, block[:end] as padded:
            self._write(padded)
        self._written_bytes += self._filled_bytes
        self._filled_bytes = 0
        if padding:
            self._open().truncate(self._written_bytes)

    def _open(self) -> FileIO:
        if self._file is None:
            if self._is_discarded:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            # Opened by `os`, which takes one system call where FileIO by itself takes three.
            self._file = FileIO(self._create(), "wb")
        return self._file

    def _create(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return _open_direct(self.path, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._is_direct = False
        self.path.unlink(missing_ok=True)  # made before it turned out
        return os.open(self.path, flags, _MODE)

    def _write(self, view: memoryview) -> None:
        file = self._open()
        while view:
            try:
                view = view[file.write(view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                # This file system wants more than whole pages at whole pages.
                fcntl.fcntl(file, fcntl.F_SETFL, 0)
                self._is_direct = False

    def complete(self) -> None:
        """Writes what is still in memory: nothing more can be taken."""
        self.write_block()
        block, self._block = self._block, None
        if block is not None and len(_free_blocks) < _KEPT_BLOCKS:
            _free_blocks.append(block)

    def sync(self) -> None:
        os.fsync(self._open().fileno())

    def close(self) -> None:
        self._open().close()

    def move(self, target: Path) -> None:
        """To a place from which `discard` does not remove it."""
        self.path.rename(target)
        self._is_discarded = True

    def discard(self) -> None:
        """Removes it, unless it has been moved."""
        if self._is_discarded:
            return
        self._is_discarded = True
        if self._file is None:
            return
        for step in (self._file.close, self.path.unlink):
            with contextlib.suppress(OSError):
                step()


def _open_direct(path: Path, flags: int) -> int:
    return os.open(path, flags | _DIRECT, _MODE)


def _take_block() -> mmap.mmap:
    try:
        return _free_blocks.pop()
    except IndexError:
        return mmap.mmap(-1, BLOCK_BYTES)
