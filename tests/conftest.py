"""Fixtures that everything shares: databases, and servers on them."""

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import structlog

from app import schema
from app.clock import Clock
from app.images import ImagePool
from app.settings import Settings, load_settings
from tests import canaries
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.s3 import S3Emulator
from tests.emulators.vision import VisionEmulator
from tests.postgres import Postgres, running_postgres
from tests.postgres import is_available as postgres_is_available
from tests.server import EventLoop, LoupeServer
from tests.strace import is_available as strace_is_available

Serve = Callable[..., LoupeServer]

# What tests with these markers need, and what is told when it is not here.
TOOLS: dict[str, tuple[Callable[[], bool], str]] = {
    "postgres": (
        postgres_is_available,
        "PostgreSQL was not found (no server binaries, no LOUPE_TEST_POSTGRES_URL)",
    ),
    "strace": (strace_is_available, "strace was not found, or may not trace"),
}

canaries.watch_logs()

# Tracebacks with every local variable, as is the default, take seconds to write.
structlog.configure(
    processors=[
        canaries.watch_event,
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment(monkeypatch)


def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting and no credential of whoever runs the tests."""
    for name in os.environ:
        if name.startswith(("LOUPE_", "AWS_", "GOOGLE_", "IMAGEKIT_", "IMAGE_KIT_")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.fixture(autouse=True)
def _no_secret_shows(request: pytest.FixtureRequest) -> Iterator[None]:
    has_directory = "tmp_path" in request.fixturenames
    directory = request.getfixturevalue("tmp_path") if has_directory else None
    yield
    if directory is not None:
        canaries.check_logs_below(directory)
    canaries.require_silence()


@pytest.fixture(scope="session")
def event_loop_thread() -> Iterator[EventLoop]:
    event_loop = EventLoop()
    yield event_loop
    event_loop.close()


@pytest.fixture(scope="session")
def shared_images(event_loop_thread: EventLoop) -> Iterator[ImagePool]:
    """One pool of children for all servers: starting them takes longer than most tests."""

    images = ImagePool()
    started = threading.Event()
    over = asyncio.Event()

    async def keep_open() -> None:
        # The children end with the task in which the first of them was started.
        await images.start()
        started.set()
        await over.wait()
        await images.close()

    keeping = asyncio.run_coroutine_threadsafe(keep_open(), event_loop_thread.loop)
    assert started.wait(60)
    yield images
    event_loop_thread.loop.call_soon_threadsafe(over.set)
    keeping.result(60)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "loupe.db"
    schema.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server whose database `template` is migrated and empty."""
    with running_postgres() as server:
        url = server.create(f"template-{os.getpid()}")
        schema.upgrade(url)
        yield server
        server.drop(f"template-{os.getpid()}")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database of the test's own, once on each engine."""
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        shutil.copy(template, tmp_path / "loupe.db")
        yield f"sqlite:///{tmp_path / 'loupe.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"test-{uuid4()}"
    yield server.create(name, template=f"template-{os.getpid()}")
    server.drop(name)


def start_server(
    event_loop: EventLoop,
    images: ImagePool,
    data_dir: Path,
    database_url: str,
    clock: Clock | None = None,
    **overrides: Any,
) -> LoupeServer:
    """A running server, to be stopped by the caller. overrides: of `Settings`."""
    # With its protocol named, or asyncio leaves Nagle's delay of 40 ms on.
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    settings = load_settings(
        Settings,
        **{
            "port": listening.getsockname()[1],
            "data_dir": data_dir,
            "database_url": database_url,
            "google_auto_tagging": "off",
            "aws_auto_tagging": "off",
            "webhook_allow_cidrs": "127.0.0.0/8",
            "webhook_schedule": "0,0.05,0.1",
            "result_ttl_days": 0,  # tests use the same pictures, and count calls
            "max_concurrent_uploads": 1000,
            **overrides,
        },
    )
    server = LoupeServer(event_loop, settings, images, clock)
    server.start(listening)
    return server


@pytest.fixture
def serve(
    database_url: str,
    tmp_path: Path,
    event_loop_thread: EventLoop,
    shared_images: ImagePool,
) -> Iterator[Serve]:
    """Starts servers: `serve(sync_budget_seconds=0.2)`. Extensions are off unless set.

    Settings are those of `Settings`; `clock` stands in for the process's clock.
    """
    running: list[LoupeServer] = []

    def start(*, clock: Clock | None = None, **overrides: Any) -> LoupeServer:
        server = start_server(
            event_loop_thread, shared_images, tmp_path, database_url, clock, **overrides
        )
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def server(serve: Serve) -> LoupeServer:
    """A server with the default settings and both extensions off."""
    return serve()


@pytest.fixture(scope="session")
def shared_server(
    event_loop_thread: EventLoop,
    shared_images: ImagePool,
    sqlite_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LoupeServer]:
    """One server, on SQLite, for all tests that neither mind nor change what others left.

    Most refusals are tested on it, since starting a server takes longer than they do.
    """
    directory = tmp_path_factory.mktemp("shared")
    path = shutil.copy(sqlite_template, directory / "loupe.db")
    with pytest.MonkeyPatch.context() as monkeypatch:
        clean_environment(monkeypatch)
        server = start_server(event_loop_thread, shared_images, directory, f"sqlite:///{path}")
    yield server
    server.stop()


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Iterator[VisionEmulator]:
    with VisionEmulator() as emulator:
        monkeypatch.setenv("LOUPE_VISION_ENDPOINT", emulator.endpoint)
        monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")
        yield emulator


@pytest.fixture
def rekognition(monkeypatch: pytest.MonkeyPatch) -> Iterator[RekognitionEmulator]:
    with RekognitionEmulator() as emulator:
        monkeypatch.setenv("AWS_ENDPOINT_URL_REKOGNITION", emulator.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canaries.AWS_SECRET_KEY)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield emulator


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Emulator]:
    with S3Emulator() as emulator:
        yield emulator


@pytest.fixture
def s3(s3_server: S3Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Emulator]:
    """An S3 server for `LOUPE_STORAGE_URL=s3://...`; each test makes a bucket of its own."""
    s3_server.set_environment(monkeypatch)
    yield s3_server
    s3_server.faults.clear()


def _missing_tools() -> list[str]:
    return [marker for marker, (is_available, _) in TOOLS.items() if not is_available()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = _missing_tools()
    left_out = [item for item in items if any(map(item.get_closest_marker, missing))]
    items[:] = [item for item in items if item not in left_out]
    # The longest first, so that no worker is left with them when the others have ended.
    items.sort(key=lambda item: "torture" not in item.path.parts)
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker in _missing_tools():
        terminalreporter.write_line(f"{TOOLS[marker][1]}: its tests were left out.", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _missing_tools() and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
