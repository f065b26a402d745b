"""A throw-away PostgreSQL cluster on loopback, or the server that LOUPE_TEST_POSTGRES_URL names."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from tests.canaries import POSTGRES_PASSWORD

URL_VARIABLE = "LOUPE_TEST_POSTGRES_URL"


def find_binaries() -> Path | None:
    """The directory with `initdb` and `postgres`, the newest version first."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).parent
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
    )
    return found[-1].parent if found else None


def is_available() -> bool:
    return URL_VARIABLE in os.environ or find_binaries() is not None


class Postgres:
    """Makes databases in one server, each a copy of a migrated template."""

    def __init__(self, url: URL, control: Callable[..., None] | None = None) -> None:
        """control: runs `pg_ctl`, if the server is ours."""
        self.url = url
        self.control = control
        self._admin = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def create(self, name: str, template: str | None = None) -> str:
        """The new database's URL."""
        like = f' TEMPLATE "{template}"' if template else ""
        self._execute(f'CREATE DATABASE "{name}"{like}')
        return self.url.set(database=name).render_as_string(hide_password=False)

    def drop(self, name: str) -> None:
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with self._admin.connect() as connection:
            connection.execute(text(statement))


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    if URL_VARIABLE in os.environ:
        yield Postgres(make_url(os.environ[URL_VARIABLE]))
        return
    binaries = find_binaries()
    assert binaries is not None
    directory = Path(tempfile.mkdtemp(prefix="loupe-postgres-"))
    account = _account()
    if account is not None:
        os.chown(directory, account.pw_uid, account.pw_gid)
    user = account.pw_name if account else None
    try:
        yield from _serve(binaries, directory, user)
    finally:
        shutil.rmtree(directory)


def _serve(binaries: Path, directory: Path, user: str | None) -> Iterator[Postgres]:
    cluster = directory / "cluster"
    _run([binaries / "initdb", "-D", cluster, "-U", "loupe", "-A", "trust", "-E", "UTF8"], user)
    port = free_port()
    options = (
        f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' "
        "-c fsync=off -c full_page_writes=off -c max_connections=400"
    )
    control: list[Path | str] = [binaries / "pg_ctl", "-D", cluster, "-w", "-l", directory / "log"]
    _run([*control, "-o", options, "start"], user)
    try:
        yield Postgres(
            make_url(f"postgresql+psycopg://loupe:{POSTGRES_PASSWORD}@127.0.0.1:{port}/postgres"),
            lambda *command: _run([*control, "-m", "immediate", *command], user),
        )
    finally:
        _run([*control, "-m", "immediate", "stop"], user)


def _account() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root: who runs it then. None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("no account to run PostgreSQL as")


def _run(command: Sequence[Path | str], user: str | None) -> None:
    subprocess.run(
        command,
        check=True,
        user=user,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def make_clock_movable(url: str) -> None:
    """From now on `clock_timestamp()`, in new connections, is ahead by what `clock_ahead` holds."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE clock_ahead AS SELECT interval '0' AS ahead_by",
            "CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS "
            "'SELECT pg_catalog.clock_timestamp() + ahead_by FROM clock_ahead'",
            f'ALTER DATABASE "{engine.url.database}" SET search_path = public, pg_catalog',
        ):
            connection.execute(text(statement))
    engine.dispose()
