"""ImageKit's official Node SDK, unchanged but for its base URL, driven by scripts in `node/`.

Needs Node.js 18 or later, npm and its registry. Where one of them is missing the tests are
skipped, but not with CI=true.
"""

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests import pictures
from tests.conftest import Serve
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.server import LoupeServer

SCRIPTS = Path(__file__).parent / "node"
OLDEST_NODE = 18
INSTALL_SECONDS = 120
SCRIPT_SECONDS = 60

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def leave_out(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def scripts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts beside an installed SDK, which pytest's cache keeps for the next time."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        leave_out("Node.js and npm are not installed: the Node SDK was not tested.")
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    if int(version.removeprefix("v").partition(".")[0] or 0) < OLDEST_NODE:
        leave_out(f"Node.js {version.strip()} is too old: the Node SDK was not tested.")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(SCRIPTS, folder, dirs_exist_ok=True)
    installed = _kept_packages(request, folder / "package.json")
    if installed is not None and installed.exists():
        shutil.copytree(installed, folder / "node_modules")
        return folder
    _install(npm, folder)
    if installed is not None:
        _keep(folder / "node_modules", installed)
    return folder


def _kept_packages(request: pytest.FixtureRequest, manifest: Path) -> Path | None:
    """Where packages for this very manifest are kept; None if pytest keeps nothing."""
    cache = getattr(request.config, "cache", None)
    if cache is None:
        return None
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    return Path(cache.mkdir("node-sdk")) / digest


def _install(npm: str, folder: Path) -> None:
    command = [npm, "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        leave_out(f"npm took over {INSTALL_SECONDS} s: the Node SDK was not tested.")
    if done.returncode != 0:
        why = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        leave_out(f"npm could not install: the Node SDK was not tested. {' '.join(why[:3])}")


def _keep(packages: Path, kept: Path) -> None:
    """Complete or not at all, also when several test processes do it at once."""
    half = kept.with_name(f"{kept.name}-{os.getpid()}")
    shutil.copytree(packages, half)
    try:
        half.rename(kept)
    except OSError:
        shutil.rmtree(half)


@contextmanager
def running(script: Path, server: LoupeServer, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The script as a process, which has to end well."""
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(pictures.jpeg())
    environment = {
        **os.environ,
        "BASE_URL": server.url,
        "PRIVATE_KEY": DEVELOPMENT_PRIVATE_KEY,
        "PUBLIC_KEY": DEVELOPMENT_PUBLIC_KEY,
        "WEBHOOK_SECRET": server.resources.keys.webhook_secret,
    }
    with subprocess.Popen(
        ["node", script.name, str(picture)],
        cwd=script.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(SCRIPT_SECONDS, process.kill)
        watchdog.start()
        try:
            yield process
            _, errors = process.communicate()
        finally:
            watchdog.cancel()
            process.kill()
    assert process.returncode == 0, errors


def test_the_sdk_uploads_reads_updates_lists_and_deletes(
    serve: Serve, scripts: Path, vision: VisionEmulator, tmp_path: Path
) -> None:
    server = serve(google_auto_tagging="vision")
    with running(scripts / "library.mjs", server, tmp_path):
        pass


def test_the_sdk_unwraps_both_kinds_of_webhook(
    serve: Serve,
    scripts: Path,
    vision: VisionEmulator,
    rekognition: RekognitionEmulator,
    tmp_path: Path,
) -> None:
    server = serve(
        google_auto_tagging="vision", aws_auto_tagging="rekognition", sync_budget_seconds=0.05
    )
    vision.hold()
    rekognition.hold()
    rekognition.fault = "image_rejected"
    with running(scripts / "webhooks.mjs", server, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "pending\n"
        vision.release()
        rekognition.release()
