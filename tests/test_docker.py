"""The image's own commands, run here on the files that it would hold, without a Docker engine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from demo.server import free_port

PROJECT = Path(__file__).resolve().parent.parent
DOCKERFILE = (PROJECT / "Dockerfile").read_text().replace("\\\n", " ")
SECONDS = 60.0


def command_of(instruction: str) -> list[str]:
    found = re.search(rf"^{instruction}(\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    command: list[str] = json.loads(found[1])
    return command


def test_the_image_migrates_serves_reports_its_health_and_ends_when_it_is_told_to(
    tmp_path: Path,
) -> None:
    final_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    for name in re.findall(r"^COPY (?!--)(\S+) \S+$", final_stage, re.MULTILINE):
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, tmp_path / name)
    env = {
        **os.environ,
        **dict(re.findall(r"(LOUPE_\w+)=(\S+)", final_stage)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LOUPE_HOST": "127.0.0.1",
        "LOUPE_PORT": str(free_port()),
        "LOUPE_DATA_DIR": str(tmp_path / "volume"),
        "LOUPE_GOOGLE_AUTO_TAGGING": "local",
        "LOUPE_AWS_AUTO_TAGGING": "off",
    }
    process = subprocess.Popen(
        command_of("CMD "), cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until_healthy(process, env)
        ready = httpx.get(f"http://127.0.0.1:{env['LOUPE_PORT']}/readyz", timeout=SECONDS).json()
        assert ready["providers"]["google-auto-tagging"] == "local"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, log
    finally:
        process.kill()
        process.wait(SECONDS)
    assert (tmp_path / "volume" / "loupe.db").exists()
    assert subprocess.run(health_check(), env=env, stderr=subprocess.DEVNULL).returncode == 1


def health_check() -> list[str]:
    return command_of("HEALTHCHECK .* CMD ")


def wait_until_healthy(process: "subprocess.Popen[str]", env: dict[str, str]) -> None:
    deadline = time.monotonic() + SECONDS
    while subprocess.run(health_check(), env=env, stderr=subprocess.DEVNULL).returncode != 0:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_image_runs_what_make_run_runs() -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "run"], cwd=PROJECT, capture_output=True, text=True, timeout=30
    )
    steps = re.findall(r"python -m app (\w+)", plan.stdout)
    assert steps == re.findall(r"python -m app (\w+)", command_of("CMD ")[-1])
    assert steps == ["migrate", "serve"]


def test_the_image_is_built_of_locked_packages_and_runs_as_nobody_special() -> None:
    assert "pip install --require-hashes -r requirements.lock" in DOCKERFILE
    assert re.search(r"^USER loupe$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^VOLUME /data$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("name", re.findall(r"^COPY (?!--)(\S+) \S+$", DOCKERFILE, re.MULTILINE))
def test_what_the_image_copies_is_sent_to_the_engine(name: str) -> None:
    assert f"!{name}" in (PROJECT / ".dockerignore").read_text().splitlines()
