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
import yaml  # type: ignore[import-untyped]

from app.settings import Settings, unknown_variables
from app.shutdown import CLOSE_SECONDS
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


# --- the compose files -------------------------------------------------------------------------

COMPOSE = {
    name: yaml.safe_load((PROJECT / name).read_text())["services"]
    for name in ("docker-compose.yml", "compose.scale.yml")
}
SERVICES = [(name, service) for name, services in COMPOSE.items() for service in services]
OURS = [(name, service) for name, service in SERVICES if "build" in COMPOSE[name][service]]


def command_of_service(name: str, service: str) -> str:
    """The command after `python -m app`; the image's own ends in `serve`."""
    command: list[str] = COMPOSE[name][service].get("command", ["serve"])
    return command[-1]


def waits_of(name: str, service: str) -> dict[str, str]:
    """service -> the condition in which it has to be."""
    found = COMPOSE[name][service].get("depends_on", {})
    if isinstance(found, list):
        return dict.fromkeys(found, "service_started")
    return {other: wait["condition"] for other, wait in found.items()}


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_service_is_started_again_and_waits_for_what_can_come_true(name: str, service: str) -> None:
    services = COMPOSE[name]
    assert services[service]["restart"] in ("unless-stopped", "on-failure")
    for other, condition in waits_of(name, service).items():
        if condition == "service_completed_successfully":
            assert services[other]["restart"] == "on-failure"
        if condition == "service_healthy":
            has_check = "build" in services[other] or "test" in services[other]["healthcheck"]
            assert has_check
            assert not services[other].get("healthcheck", {}).get("disable")


@pytest.mark.parametrize(("name", "service"), OURS)
def test_every_setting_that_a_service_gets_exists(name: str, service: str) -> None:
    environment = COMPOSE[name][service].get("environment", {})
    assert unknown_variables(environment, Settings) == []


@pytest.mark.parametrize(("name", "service"), OURS)
def test_only_a_service_that_answers_requests_has_the_image_s_health_check(
    name: str, service: str
) -> None:
    is_checked = not COMPOSE[name][service].get("healthcheck", {}).get("disable", False)
    assert is_checked == (command_of_service(name, service) == "serve")


@pytest.mark.parametrize(("name", "service"), OURS)
def test_service_has_time_to_finish_what_is_in_flight(name: str, service: str) -> None:
    grace_seconds = int(COMPOSE[name][service]["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > Settings().shutdown_seconds + CLOSE_SECONDS


def test_proxy_speaks_to_the_replicas_and_lets_the_largest_upload_pass() -> None:
    configuration = (PROJECT / "deploy/nginx.conf").read_text()
    upstreams = set(re.findall(r"server ([\w-]+):8000", configuration))
    scaled = COMPOSE["compose.scale.yml"]
    assert upstreams == set(waits_of("compose.scale.yml", "proxy"))
    assert all(command_of_service("compose.scale.yml", each) == "serve" for each in upstreams)
    [listening] = re.findall(r"listen (\d+);", configuration)
    assert scaled["proxy"]["ports"] == [f"{listening}:{listening}"]
    [megabytes] = re.findall(r"client_max_body_size (\d+)m;", configuration)
    assert int(megabytes) * 2**20 > Settings().max_upload_bytes * 4 / 3


def test_configuration_of_the_store_is_json_with_the_replicas_keys() -> None:
    scaled = yaml.safe_load((PROJECT / "compose.scale.yml").read_text())
    [identity] = json.loads(scaled["configs"]["store"]["content"])["identities"]
    environment = scaled["x-loupe"]["environment"]
    assert identity["credentials"] == [
        {
            "accessKey": environment["AWS_ACCESS_KEY_ID"],
            "secretKey": environment["AWS_SECRET_ACCESS_KEY"],
        }
    ]
