"""`python -m app COMMAND`, as an operator meets it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.__main__ import COMMANDS, main
from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests import canaries

PROJECT = Path(__file__).resolve().parent.parent
SECONDS = 60.0

Environment = Callable[..., dict[str, str]]


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Environment:
    """Sets variables: a data folder of the test's own, both extensions off, and what is given."""

    def set_all(**variables: str) -> dict[str, str]:
        settings = {
            "LOUPE_DATA_DIR": str(tmp_path / "data"),
            "LOUPE_GOOGLE_AUTO_TAGGING": "off",
            "LOUPE_AWS_AUTO_TAGGING": "off",
            **variables,
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return dict(os.environ)

    return set_all


def run(command: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    finished = subprocess.run(
        [sys.executable, "-m", "app", command],
        cwd=PROJECT,
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    canaries.check(f"what {command} printed", finished.stderr)
    return finished


def refusal_of(command: str) -> str:
    """What the command says as it stops: in a process of its own if it sets up logs."""
    if command in ("serve", "worker"):
        stopped = run(command, dict(os.environ))
        assert stopped.returncode == 1
        return stopped.stderr.strip()
    with pytest.raises(SystemExit) as stopping:
        main([command])
    assert isinstance(stopping.value.code, str)  # printed to standard error, with exit status 1
    return stopping.value.code


def assert_one_sentence(text: str, *names: str) -> None:
    assert text.startswith("loupe: ")
    assert text.endswith(".")
    assert "\n" not in text
    for name in names:
        assert name in text


# --- wrong values --------------------------------------------------------------------------------

WRONG_VALUES = [
    ("LOUPE_PORT", "abc"),
    ("LOUPE_PORT", "65536"),
    ("LOUPE_DATABASE_URL", "mysql://user@host/name"),
    ("LOUPE_DATABASE_URL", "sqlite://"),
    ("LOUPE_DATABASE_URL", "sqlite:///"),
    ("LOUPE_DATABASE_URL", "sqlite:///:memory:"),
    ("LOUPE_DATABASE_URL", "postgresql+psycopg://user@host:port/name"),
    ("LOUPE_STORAGE_URL", "ftp://bucket/prefix"),
    ("LOUPE_STORAGE_URL", "file://relative"),
    ("LOUPE_PUBLIC_URL", "example.com"),
    ("LOUPE_PUBLIC_URL", "ftp://example.com"),
    ("LOUPE_PUBLIC_URL", "https://example.com/?a=b"),
    ("LOUPE_PUBLIC_URL", "http://[x"),
    ("LOUPE_IMAGEKIT_ID", "a/b"),
    ("LOUPE_IMAGEKIT_ID", "v1"),
    ("LOUPE_PRIVATE_KEYS", "private_a"),
    ("LOUPE_PUBLIC_KEYS", "public_a,public_b"),
    ("LOUPE_MAX_UPLOAD_BYTES", "0"),
    ("LOUPE_MAX_UPLOAD_BYTES", "25MB"),
    ("LOUPE_MAX_PIXELS", "-1"),
    ("LOUPE_SYNC_BUDGET_SECONDS", "nan"),
    ("LOUPE_SYNC_BUDGET_SECONDS", "-1"),
    ("LOUPE_PROVIDER_TIMEOUT_SECONDS", "0"),
    ("LOUPE_PROVIDER_TIMEOUT_SECONDS", "inf"),
    ("LOUPE_PROVIDER_CONCURRENCY", "0"),
    ("LOUPE_WEBHOOK_SECRET", "short"),
    ("LOUPE_WEBHOOK_ALLOW_CIDRS", "10.0.0.0/8,10.0.0.1/99"),
    ("LOUPE_WEBHOOK_ALLOW_CIDRS", "10.0.0.1/8"),
    ("LOUPE_WEBHOOK_SCHEDULE", "0,soon"),
    ("LOUPE_WEBHOOK_SCHEDULE", "0,-5"),
    ("LOUPE_WEBHOOK_SCHEDULE", ","),
    ("LOUPE_WEBHOOK_ON", "never"),
    ("LOUPE_LOCAL_DELAY_SECONDS", "long"),
    ("LOUPE_LOCAL_DELAY_SECONDS", "other-extension=1"),
    ("LOUPE_LOCAL_FAULT", "on-fire"),
    ("LOUPE_VISION_ENDPOINT", "https://vision.example.com"),
    ("LOUPE_VISION_INSECURE", "perhaps"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_a_wrong_value_is_refused_in_one_sentence_that_names_it(
    env: Environment, name: str, value: str
) -> None:
    env(**{name: value})
    assert_one_sentence(refusal_of("settings"), name)


@pytest.mark.parametrize(
    ("name", "value"), [("LOUPE_PORT", "abc"), ("LOUPE_LOCAL_FAULT", "on-fire")]
)
def test_a_wrong_value_stops_the_server_before_it_makes_anything(
    env: Environment, tmp_path: Path, name: str, value: str
) -> None:
    env(**{name: value})
    assert_one_sentence(refusal_of("serve"), name)
    assert list(tmp_path.iterdir()) == []


def test_a_provider_that_does_not_exist_stops_the_server(env: Environment) -> None:
    env(LOUPE_GOOGLE_AUTO_TAGGING="visoin", LOUPE_PORT=str(free_port()))
    main(["migrate"])
    assert_one_sentence(refusal_of("serve"), "LOUPE_GOOGLE_AUTO_TAGGING", "vision")


def test_the_development_pair_is_refused_off_loopback(env: Environment) -> None:
    env(
        LOUPE_HOST="0.0.0.0",
        LOUPE_PRIVATE_KEYS=DEVELOPMENT_PRIVATE_KEY,
        LOUPE_PUBLIC_KEYS=DEVELOPMENT_PUBLIC_KEY,
    )
    assert_one_sentence(refusal_of("settings"), "LOUPE_HOST", "development")


def test_a_wrong_value_is_not_repeated_when_it_is_a_secret(env: Environment) -> None:
    env(LOUPE_DATABASE_URL="postgres://loupe:hunter2secret@db/loupe")
    assert "hunter2secret" not in refusal_of("settings")


@pytest.mark.parametrize("command", ["migrate", "serve"])
def test_a_data_folder_that_cannot_be_made_is_named(
    env: Environment, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").touch()
    env(LOUPE_DATA_DIR=str(tmp_path / "file" / "data"), LOUPE_PORT=str(free_port()))
    assert_one_sentence(refusal_of(command), "LOUPE_DATA_DIR", str(tmp_path))


def test_a_storage_folder_that_cannot_be_made_is_named(env: Environment, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    variables = env(LOUPE_STORAGE_URL=f"file://{tmp_path}/file/blobs", LOUPE_PORT=str(free_port()))
    main(["migrate"])
    stopped = run("serve", variables)
    assert stopped.returncode == 1
    assert_one_sentence(stopped.stderr.strip(), "LOUPE_STORAGE_URL", str(tmp_path))


@pytest.mark.parametrize("command", ["migrate", "serve"])
def test_a_folder_of_the_database_that_is_missing_is_told(
    env: Environment, tmp_path: Path, command: str
) -> None:
    url = f"sqlite:///{tmp_path}/missing/loupe.db"
    env(LOUPE_DATABASE_URL=url, LOUPE_PORT=str(free_port()))
    refusal = refusal_of(command)
    assert refusal.startswith("loupe: LOUPE_DATABASE_URL: ")
    assert "\n" not in refusal


def test_a_database_that_does_not_answer_is_told_without_its_password(env: Environment) -> None:
    url = f"postgresql+psycopg://loupe:hunter2secret@127.0.0.1:{free_port()}/loupe"
    env(LOUPE_DATABASE_URL=url)
    refusal = refusal_of("migrate")
    assert refusal.startswith("loupe: LOUPE_DATABASE_URL: ")
    assert "hunter2secret" not in refusal


def test_a_port_that_is_taken_is_told(env: Environment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env(LOUPE_PORT=port)
        assert_one_sentence(refusal_of("serve"), "LOUPE_PORT", port, "in use")


def test_a_host_that_does_not_exist_is_told(env: Environment) -> None:
    env(LOUPE_HOST="host.invalid")
    assert_one_sentence(refusal_of("serve"), "LOUPE_HOST", "host.invalid")


@pytest.mark.parametrize("command", ["keys", "serve"])
def test_a_schema_that_is_missing_is_told_with_the_way_out(
    env: Environment, tmp_path: Path, command: str
) -> None:
    (tmp_path / "data").mkdir()
    env(LOUPE_PORT=str(free_port()))
    assert_one_sentence(refusal_of(command), "python -m app migrate")


def test_a_worker_needs_postgresql(env: Environment) -> None:
    env()
    assert_one_sentence(refusal_of("worker"), "LOUPE_DATABASE_URL", "PostgreSQL")


def test_a_name_that_is_no_setting_is_warned_of(
    env: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    env(LOUPE_SYNC_BUDGET="1")
    main(["settings"])
    assert "LOUPE_SYNC_BUDGET " in capsys.readouterr().err


# --- settings, keys, migrate ---------------------------------------------------------------------


def test_every_command_is_listed_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def printed_settings(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    main(["settings"])
    settings = {}
    for line in capsys.readouterr().out.splitlines():
        assignment, _, source = line.rpartition("  ")
        name, _, value = assignment.partition("=")
        settings[name] = (value, source)
    return settings


def test_settings_are_printed_with_their_values_and_sources(
    env: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env(LOUPE_PORT="8123", LOUPE_LOCAL_DELAY_SECONDS="aws-auto-tagging=5")
    settings = printed_settings(capsys)
    assert settings["LOUPE_PORT"] == ("8123", "(environment)")
    assert settings["LOUPE_HOST"] == ("127.0.0.1", "(default)")
    assert settings["LOUPE_PUBLIC_URL"] == ("http://127.0.0.1:8123", "(default)")
    assert settings["LOUPE_DATABASE_URL"][0] == f"sqlite:///{tmp_path}/data/loupe.db"
    assert settings["LOUPE_LOCAL_DELAY_SECONDS"] == ("aws-auto-tagging=5", "(environment)")
    assert settings["LOUPE_VISION_INSECURE"] == ("False", "(default)")


def test_settings_show_no_secret(env: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    env(
        LOUPE_PRIVATE_KEYS="private_Xk3v9QpTz7,private_Zt5w1RmYb2",
        LOUPE_PUBLIC_KEYS="public_one,public_two",
        LOUPE_WEBHOOK_SECRET="whsec_Vb8n4LcHd6JgSf0aPuEi",
        LOUPE_DATABASE_URL="postgresql+psycopg://loupe:hunter2secret@db.internal:5432/loupe",
    )
    settings = printed_settings(capsys)
    shown = repr(settings)
    for secret in ("Xk3v9QpTz7", "Zt5w1RmYb2", "Vb8n4LcHd6JgSf0aPuEi", "hunter2secret"):
        assert secret not in shown
    assert settings["LOUPE_PUBLIC_KEYS"][0] == "public_one,public_two"
    assert settings["LOUPE_DATABASE_URL"][0].endswith("@db.internal:5432/loupe")


def printed_keys(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["keys"])
    return capsys.readouterr().out


def test_keys_are_the_development_pair_on_loopback_and_a_kept_secret(
    env: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    env()
    main(["migrate"])
    first = printed_keys(capsys)
    assert DEVELOPMENT_PUBLIC_KEY in first
    assert DEVELOPMENT_PRIVATE_KEY in first
    assert "whsec_" in first
    assert printed_keys(capsys) == first


def test_keys_are_generated_once_off_loopback(
    env: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    env(LOUPE_HOST="0.0.0.0")
    main(["migrate"])
    first = printed_keys(capsys)
    assert "development" not in first
    private = next(line.split()[2] for line in first.splitlines() if line.startswith("private"))
    assert private.startswith("private_")
    assert len(private) >= len("private_") + 32
    assert printed_keys(capsys) == first


def test_keys_of_the_environment_are_shown_in_pairs(
    env: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    env(
        LOUPE_HOST="0.0.0.0",
        LOUPE_PRIVATE_KEYS="private_new, private_old",
        LOUPE_PUBLIC_KEYS="public_new,public_old",
        LOUPE_WEBHOOK_SECRET="whsec_of-the-environment",
    )
    main(["migrate"])
    words = printed_keys(capsys).split()
    keys = [word for word in words if word.startswith(("public_", "private_", "whsec_"))]
    assert keys == [
        "public_new",
        "private_new",
        "public_old",
        "private_old",
        "whsec_of-the-environment",
    ]


@pytest.mark.parametrize("engine", ["sqlite", pytest.param("pg", marks=pytest.mark.postgres)])
def test_several_migrations_at_once_are_safe(
    env: Environment, tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/loupe.db"
    if engine == "pg":
        server = request.getfixturevalue("postgres")
        url = server.create(f"empty-{os.getpid()}")
    variables = env(LOUPE_DATABASE_URL=url)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "app", "migrate"],
            cwd=PROJECT,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    ended = [(process.communicate(timeout=SECONDS)[1], process.returncode) for process in started]
    if engine == "pg":
        server.drop(f"empty-{os.getpid()}")
    assert ended == [(b"", 0)] * 3


# --- serve and worker ----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(
    command: str, variables: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a group of its own; killed at the end if it still runs."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", command],
            cwd=PROJECT,
            env=variables,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(SECONDS)


def wait_for_line(process: "subprocess.Popen[bytes]", log: Path, event: str) -> None:
    deadline = time.monotonic() + SECONDS
    while f'"event":"{event}' not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["SIGTERM to the server", "Ctrl-C to its whole group"])
def test_the_server_ends_cleanly_when_it_is_told_to(
    env: Environment, tmp_path: Path, how: str
) -> None:
    log = tmp_path / "log"
    variables = env(LOUPE_PORT=str(free_port()), LOUPE_TYPO="1")
    main(["migrate"])
    with started("serve", variables, log) as process:
        wait_for_line(process, log, "Started server process")
        url = f"http://127.0.0.1:{variables['LOUPE_PORT']}"
        assert httpx.get(f"{url}/readyz", timeout=SECONDS).status_code == 200
        if how.startswith("SIGTERM"):
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(SECONDS) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]  # a traceback is no JSON
    assert [line["name"] for line in lines if "unknown setting" in line["event"]] == ["LOUPE_TYPO"]


def test_a_second_process_on_one_sqlite_file_is_refused(env: Environment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    variables = env(LOUPE_PORT=str(free_port()))
    main(["migrate"])
    with started("serve", variables, log) as process:
        wait_for_line(process, log, "serving")
        second = run("serve", variables | {"LOUPE_PORT": str(free_port())})
    assert second.returncode == 1
    assert_one_sentence(
        second.stderr.strip().splitlines()[-1], "LOUPE_DATABASE_URL", "another", "PostgreSQL"
    )


@pytest.mark.postgres
def test_a_worker_beside_the_server_ends_cleanly(
    env: Environment, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("postgres")
    name = f"worker-{os.getpid()}"
    url = server.create(name, template=f"template-{os.getpid()}")
    log = tmp_path / "log"
    with started("worker", env(LOUPE_DATABASE_URL=url), log) as process:
        wait_for_line(process, log, "worker ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    server.drop(name)
    assert all(json.loads(line) for line in log.read_text().splitlines())
