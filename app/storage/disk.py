"""What every storage does with its staging directory."""

import contextlib
import errno
import fcntl
import os
import shutil
from datetime import datetime
from pathlib import Path

from app.ids import new_id

_LOCK_SUFFIX = ".lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_TRIES = 100


class StagingDirectory:
    """A process's own directory below `shared`, and the lock that says that the process lives.

    `<shared>/<id>.lock` is locked from before `<shared>/<id>` is made until the process ends,
    however it ends: who can take the lock knows that nobody writes there any more. A file is
    locked, not the directory, since network file systems lock directories on one machine only.
    Where nothing can be locked, all stage into `shared` itself, and only age tells.

    path: the own directory, once it is open. Everything but `close` raises OSError.
    """

    def __init__(self, shared: Path) -> None:
        self.path = shared
        self._shared = shared
        self._lock: int | None = None

    def open(self) -> None:
        """Removes first what the dead have left: it may be what fills the disk."""
        self._shared.mkdir(parents=True, exist_ok=True)
        self.remove_dead()
        try:
            self.path, self._lock = _lock_new_directory(self._shared)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
        self.path.mkdir(exist_ok=True)

    def remove_dead(self) -> None:
        """Removes the directories of processes that have ended."""
        for directory in self._directories():
            with contextlib.suppress(OSError):  # then nobody can tell, and age has to
                _remove_if_dead(directory)

    def remove_older(self, before: datetime) -> None:
        """Removes the files, of the living too, that nobody has written to since."""
        for directory in (self._shared, *self._directories()):
            _remove_older_files(directory, before)

    def _directories(self) -> set[Path]:
        with os.scandir(self._shared) as entries:
            return {
                self._shared / entry.name.removesuffix(_LOCK_SUFFIX)
                for entry in entries
                if entry.name.endswith(_LOCK_SUFFIX) or entry.is_dir(follow_symlinks=False)
            }

    def close(self) -> None:
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            _remove(self.path)
        os.close(self._lock)
        self._lock = None


def _lock_new_directory(shared: Path) -> tuple[Path, int]:
    """Its path, where nothing is yet, and the descriptor that holds its lock."""
    for _ in range(_TRIES):
        directory = shared / new_id()
        try:
            lock = _take_lock(directory)
        except OSError:
            _lock_path(directory).unlink(missing_ok=True)
            raise
        if lock is not None:
            return directory, lock
    raise OSError(errno.EAGAIN, "others keep removing a new staging directory's lock")


def _take_lock(directory: Path) -> int | None:
    """The descriptor that holds the directory's lock; None if another holds it.

    None also when another has held it meanwhile and removed it: then it is a lock of nothing.
    """
    path = _lock_path(directory)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove_if_dead(directory: Path) -> None:
    lock = _take_lock(directory)
    if lock is None:
        return
    try:
        _remove(directory)
    finally:
        os.close(lock)


def _remove(directory: Path) -> None:
    """The lock, which is held, last: who dies in between leaves it to be found."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    _lock_path(directory).unlink(missing_ok=True)


def _lock_path(directory: Path) -> Path:
    return directory.with_name(directory.name + _LOCK_SUFFIX)


def _remove_older_files(directory: Path, before: datetime) -> None:
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) or entry.name.endswith(_LOCK_SUFFIX):
                continue
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < before.timestamp():
                    Path(entry).unlink()


def try_to_write(directory: Path) -> None:
    """Raises OSError when no file can be written there."""
    probe = directory / f".probe-{os.getpid()}"
    probe.write_bytes(b"x")
    # Somebody else's probe may have the same name, and may be faster.
    probe.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
