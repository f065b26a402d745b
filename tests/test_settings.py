"""What the environment may say, and the one sentence for what it may not."""

import ipaddress
from pathlib import Path

import pytest

from app.settings import (
    BudgetExhausted,
    Settings,
    SettingsError,
    WebhookOn,
    describe,
    load_settings,
    unknown_variables,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def loaded(environment: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        environment.setenv(f"LOUPE_{name}", value)
    return load_settings(Settings)


def refusal(environment: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(SettingsError) as refused:
        loaded(environment, **variables)
    sentence = str(refused.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# Defaults and values


def test_defaults_are_those_of_the_table() -> None:
    settings = load_settings(Settings)
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.data_dir == Path("data")
    assert settings.sqlalchemy_url == "sqlite:///data/loupe.db"
    assert settings.storage_dir == Path("data/files")
    assert settings.url_endpoint == "http://127.0.0.1:8000/demo"
    assert settings.max_upload_bytes == 25_000_000
    assert settings.max_pixels == 100_000_000
    assert settings.sync_budget_seconds == 3
    assert settings.provider_timeout_seconds == 10
    assert settings.provider_concurrency == 16
    assert settings.google_auto_tagging == "vision"
    assert settings.aws_auto_tagging == "rekognition"
    assert settings.result_ttl_days == 30
    assert settings.google_monthly_calls == settings.aws_monthly_calls == 0
    assert settings.google_calls_per_second == settings.aws_calls_per_second == 0
    assert settings.budget_exhausted is BudgetExhausted.PENDING
    assert settings.webhook_allow_cidrs == ()
    assert settings.webhook_schedule == (0, 5, 30, 120, 600, 1800, 3600)
    assert settings.webhook_on is WebhookOn.PENDING
    assert settings.webhook_secret is None
    assert settings.private_keys == settings.public_keys == ()


def test_empty_value_is_the_default(environment: pytest.MonkeyPatch) -> None:
    settings = loaded(environment, PORT="", WEBHOOK_SCHEDULE="", WEBHOOK_ON="", PRIVATE_KEYS="")
    assert settings == load_settings(Settings)


def test_lists_are_comma_separated(environment: pytest.MonkeyPatch) -> None:
    settings = loaded(
        environment,
        WEBHOOK_SCHEDULE="0, 1.5,10,",
        WEBHOOK_ALLOW_CIDRS="127.0.0.0/8, ::1/128",
        PRIVATE_KEYS="a,b",
        PUBLIC_KEYS="c,d",
    )
    assert settings.webhook_schedule == (0, 1.5, 10)
    assert settings.webhook_allow_cidrs == (
        ipaddress.ip_network("127.0.0.0/8"),
        ipaddress.ip_network("::1/128"),
    )
    assert settings.public_keys == ("c", "d")
    assert [key.get_secret_value() for key in settings.private_keys] == ["a", "b"]


@pytest.mark.parametrize(
    ("variables", "base_url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"HOST": "0.0.0.0", "PORT": "9"}, "http://127.0.0.1:9"),
        ({"HOST": "::"}, "http://127.0.0.1:8000"),
        ({"HOST": "::1"}, "http://[::1]:8000"),
        ({"HOST": "media.example"}, "http://media.example:8000"),
        ({"PUBLIC_URL": "https://media.example/"}, "https://media.example"),
        ({"PUBLIC_URL": "https://media.example/prefix/"}, "https://media.example/prefix"),
    ],
)
def test_base_url_is_the_public_one_or_follows_from_host_and_port(
    environment: pytest.MonkeyPatch, variables: dict[str, str], base_url: str
) -> None:
    assert loaded(environment, **variables).base_url == base_url


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_told_from_what_others_can_reach(
    environment: pytest.MonkeyPatch, host: str, is_loopback: bool
) -> None:
    assert loaded(environment, HOST=host).is_loopback is is_loopback


def test_storage_may_lie_elsewhere(environment: pytest.MonkeyPatch) -> None:
    assert loaded(environment, STORAGE_URL="file:///srv/files").storage_dir == Path("/srv/files")


# Refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "http"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("DATABASE_URL", "postgresql://localhost/x"),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("STORAGE_URL", "ftp://bucket/prefix"),
        ("STORAGE_URL", "file://relative"),
        ("PUBLIC_URL", "media.example"),
        ("PUBLIC_URL", "ftp://media.example"),
        ("PUBLIC_URL", "https://media.example/?a=b"),
        ("IMAGEKIT_ID", "a/b"),
        ("IMAGEKIT_ID", "v1"),
        ("IMAGEKIT_ID", "docs"),
        ("MAX_UPLOAD_BYTES", "0"),
        ("MAX_UPLOAD_BYTES", "25MB"),
        ("MAX_PIXELS", "0"),
        ("SYNC_BUDGET_SECONDS", "-1"),
        ("SYNC_BUDGET_SECONDS", "inf"),
        ("SYNC_BUDGET_SECONDS", "nan"),
        ("PROVIDER_TIMEOUT_SECONDS", "0"),
        ("PROVIDER_CONCURRENCY", "0"),
        ("PROVIDER_CONCURRENCY", "1001"),
        ("WEBHOOK_ALLOW_CIDRS", "localhost"),
        ("WEBHOOK_ALLOW_CIDRS", "127.0.0.1/8"),
        ("WEBHOOK_SCHEDULE", "0,soon"),
        ("WEBHOOK_SCHEDULE", "-1"),
        ("WEBHOOK_SCHEDULE", ","),
        ("WEBHOOK_SCHEDULE", "inf"),
        ("WEBHOOK_ON", "always"),
        ("UPLOAD_DEADLINE_SECONDS", "604801"),
        ("WEBHOOK_SECRET", "short"),
    ],
)
def test_wrong_value_stops_the_start_with_one_sentence_that_names_it(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert refusal(environment, **{name: value}).startswith(f"LOUPE_{name}: ")


@pytest.mark.parametrize(
    "variables",
    [
        {"PRIVATE_KEYS": "a"},
        {"PUBLIC_KEYS": "a"},
        {"PRIVATE_KEYS": "a,b", "PUBLIC_KEYS": "c"},
        {"PRIVATE_KEYS": "a,a", "PUBLIC_KEYS": "c,d"},
        {"PRIVATE_KEYS": "a,b", "PUBLIC_KEYS": "c,c"},
    ],
)
def test_keys_that_do_not_pair_are_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert refusal(environment, **variables).startswith(
        "LOUPE_PRIVATE_KEYS and LOUPE_PUBLIC_KEYS should hold "
    )


def test_development_pair_is_refused_off_loopback(environment: pytest.MonkeyPatch) -> None:
    keys = {"PRIVATE_KEYS": "private_loupe_development", "PUBLIC_KEYS": "public_x"}
    assert loaded(environment, **keys)
    assert "development" in refusal(environment, HOST="0.0.0.0", **keys)


@pytest.mark.parametrize(
    "variables",
    [
        {"WEBHOOK_SECRET": "canary"},
        {"PRIVATE_KEYS": "canary"},
        {"DATABASE_URL": "mysql://user:canary@host/x"},
    ],
)
def test_refusal_does_not_repeat_a_secret(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert "canary" not in refusal(environment, **variables)


# Showing them


def test_each_setting_is_shown_with_its_value_and_where_it_came_from(
    environment: pytest.MonkeyPatch,
) -> None:
    shown = {
        name: (value, source)
        for name, value, source in describe(
            loaded(
                environment, PORT="9000", WEBHOOK_SCHEDULE="0,5", WEBHOOK_ALLOW_CIDRS="10.0.0.0/8"
            )
        )
    }
    assert shown["LOUPE_PORT"] == ("9000", "environment")
    assert shown["LOUPE_HOST"] == ("127.0.0.1", "default")
    assert shown["LOUPE_WEBHOOK_ALLOW_CIDRS"] == ("10.0.0.0/8", "environment")
    assert shown["LOUPE_WEBHOOK_SCHEDULE"][0] in ("0,5", "0.0,5.0")
    assert shown["LOUPE_DATABASE_URL"] == ("sqlite:///data/loupe.db", "default")
    assert len(shown) == len(Settings.model_fields)


def test_secrets_are_masked(environment: pytest.MonkeyPatch) -> None:
    secrets = {
        "WEBHOOK_SECRET": "whsec_canary_canary_canary",
        "PRIVATE_KEYS": "private_canary_canary,canary",
        "DATABASE_URL": "postgresql+psycopg://loupe:canary@db.example/loupe",
    }
    settings = loaded(environment, PUBLIC_KEYS="public_a,public_b", **secrets)
    shown = {name: value for name, value, _ in describe(settings)}
    assert "canary" not in str(shown)
    assert "canary" not in repr(settings)
    assert shown["LOUPE_DATABASE_URL"] == "postgresql+psycopg://loupe:…@db.example/loupe"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://loupe:c%40nary@db.example/loupe",
        "postgresql+psycopg://loupe@db.example/loupe?password=c%40nary",
        "postgresql+psycopg://db.example/loupe?user=loupe&password=c%40nary&sslmode=require",
    ],
)
def test_password_of_the_database_is_masked_wherever_it_stands(
    environment: pytest.MonkeyPatch, url: str
) -> None:
    [shown] = [
        value
        for name, value, _ in describe(loaded(environment, DATABASE_URL=url))
        if name == "LOUPE_DATABASE_URL"
    ]
    assert "nary" not in shown
    assert "db.example/loupe" in shown


def test_variable_that_nobody_reads_is_named() -> None:
    environ = {
        "LOUPE_PORT": "1",
        "LOUPE_PROT": "1",
        "LOUPE_TEST_POSTGRES_URL": "x",
        "OTHER_PROT": "1",
    }
    assert unknown_variables(environ, Settings) == ["LOUPE_PROT"]
