"""Backing up while uploads go on, and restoring, as docs/scaling.md tells it."""

import os
import shutil
import sqlite3
import time
from pathlib import Path

import httpx
import pytest

from app.files.sweep import Sweep
from app.images import ImagePool
from tests.conftest import start_server
from tests.files.helpers import on_sqlite_only
from tests.server import EventLoop, LoupeServer

pytestmark = on_sqlite_only


def sweep(server: LoupeServer) -> None:
    resources = server.resources
    deadline_seconds = resources.settings.upload_deadline_seconds
    server.run(Sweep(resources.db, resources.storage, deadline_seconds).sweep())


def blobs(server: LoupeServer) -> set[bytes]:
    folder = server.resources.settings.storage_dir / "blobs"
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def back_up(server: LoupeServer, target: Path) -> None:
    """The database first, then the files; meanwhile one file is uploaded and one deleted."""
    target.mkdir()
    gone = server.upload(b"gone", "gone.txt", useUniqueFileName="false").json()
    server.upload(b"kept", "kept.txt", useUniqueFileName="false")
    database = server.resources.settings.sqlalchemy_url.removeprefix("sqlite:///")
    connection = sqlite3.connect(database)
    connection.execute("VACUUM INTO ?", [str(target / "loupe.db")])
    connection.close()
    server.upload(b"newer", "newer.txt")
    server.client.delete(f"/v1/files/{gone['fileId']}")
    shutil.copytree(server.resources.settings.storage_dir, target / "files")
    long_ago = time.time() - 4 * 3600
    for path in (target / "files" / "blobs").rglob("*"):
        os.utime(path, (long_ago, long_ago))


def restore(backup: Path, event_loop: EventLoop, images: ImagePool) -> LoupeServer:
    return start_server(event_loop, images, backup, f"sqlite:///{backup / 'loupe.db'}")


@pytest.mark.parametrize("is_sweep_held_off", [True, False])
def test_restored_backup_has_every_file_of_its_database_and_sweeps_only_when_it_is_let(
    server: LoupeServer,
    tmp_path: Path,
    event_loop_thread: EventLoop,
    shared_images: ImagePool,
    is_sweep_held_off: bool,
) -> None:
    backup = tmp_path / "backup"
    back_up(server, backup)
    mark = backup / "files" / "owner"
    belongs_to = mark.read_text()
    if is_sweep_held_off:
        mark.write_text("nobody, for now")
    restored = restore(backup, event_loop_thread, shared_images)
    try:
        sweep(restored)
        found = httpx.get(f"{restored.url}/demo/kept.txt")
        assert (found.status_code, found.content) == (200, b"kept")
        assert httpx.get(f"{restored.url}/demo/gone.txt").status_code == 404
        assert blobs(restored) == ({b"kept", b"newer"} if is_sweep_held_off else {b"kept"})
        mark.write_text(belongs_to)
        sweep(restored)
        assert blobs(restored) == {b"kept"}
    finally:
        restored.stop()
