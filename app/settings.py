"""Core settings, read once at start from the environment (prefix `LOUPE_`).

A provider's own settings live in its file under `app/extensions/providers/`.
"""

import ipaddress
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

ENV_PREFIX = "LOUPE_"
# The first parts of the API's own paths.
RESERVED_IDS = frozenset({"api", "docs", "healthz", "metrics", "readyz", "redoc", "v1"})
DEVELOPMENT_PRIVATE_KEY = "private_loupe_development"
DEVELOPMENT_PUBLIC_KEY = "public_loupe_development"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_S3_PREFIX = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
T = TypeVar("T", bound=BaseSettings)


class SettingsError(Exception):
    """One sentence for the operator: which setting is wrong, and why."""


class WebhookOn(StrEnum):
    """Which runs get a webhook: those that a response called pending, or every one."""

    PENDING = "pending"
    ALL = "all"


class BudgetExhausted(StrEnum):
    """What becomes of runs beyond the monthly cap: wait for the next month, or fail at once."""

    PENDING = "pending"
    FAILED = "failed"


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return value


CommaSeparated = (NoDecode, BeforeValidator(_split))


class Settings(BaseSettings):
    """Every core setting with its default. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, env_ignore_empty=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data_dir: Path = Path("data")
    database_url: SecretStr = SecretStr("")
    storage_url: str = ""
    public_url: str = ""
    imagekit_id: str = Field("demo", pattern=r"^[A-Za-z0-9_-]{1,100}$")
    private_keys: Annotated[tuple[SecretStr, ...], *CommaSeparated] = ()
    public_keys: Annotated[tuple[str, ...], *CommaSeparated] = ()
    max_upload_bytes: int = Field(25_000_000, gt=0)
    max_pixels: int = Field(100_000_000, gt=0)
    max_concurrent_uploads: int = Field(128, ge=1)
    disk_reserve_bytes: int = Field(256_000_000, ge=0)
    upload_idle_seconds: float = Field(30.0, gt=0, allow_inf_nan=False)
    upload_deadline_seconds: float = Field(3600.0, gt=0, le=604_800, allow_inf_nan=False)
    restrict_client_params: bool = False
    sync_budget_seconds: float = Field(3.0, ge=0, allow_inf_nan=False)
    provider_timeout_seconds: float = Field(10.0, gt=0, allow_inf_nan=False)
    provider_concurrency: int = Field(16, ge=1, le=1000)
    google_auto_tagging: str = "vision"
    aws_auto_tagging: str = "rekognition"
    result_ttl_days: float = Field(30, ge=0, le=3650, allow_inf_nan=False)
    google_monthly_calls: int = Field(0, ge=0)
    aws_monthly_calls: int = Field(0, ge=0)
    budget_exhausted: BudgetExhausted = BudgetExhausted.PENDING
    google_calls_per_second: float = Field(0, ge=0, allow_inf_nan=False)
    aws_calls_per_second: float = Field(0, ge=0, allow_inf_nan=False)
    webhook_secret: SecretStr | None = None
    webhook_allow_cidrs: Annotated[tuple[Network, ...], *CommaSeparated] = ()
    webhook_schedule: Annotated[
        tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], *CommaSeparated
    ] = Field((0, 5, 30, 120, 600, 1800, 3600), min_length=1)
    webhook_timeout_seconds: float = Field(30.0, gt=0, allow_inf_nan=False)
    webhook_on: WebhookOn = WebhookOn.PENDING
    shutdown_seconds: float = Field(20.0, ge=0, le=600, allow_inf_nan=False)
    ready_max_due_age_seconds: float = Field(600.0, gt=0, allow_inf_nan=False)

    @field_validator("imagekit_id")
    @classmethod
    def _imagekit_id_is_free(cls, value: str) -> str:
        if value in RESERVED_IDS:
            raise ValueError(f"should not be one of: {', '.join(sorted(RESERVED_IDS))}")
        return value

    @field_validator("public_url")
    @classmethod
    def _public_url_is_http(cls, value: str) -> str:
        if value and (
            urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc
        ):
            raise ValueError("should be an absolute http(s) URL")
        if urlsplit(value).query or urlsplit(value).fragment:
            raise ValueError("should have no query and no fragment")
        return value.rstrip("/")

    @field_validator("database_url")
    @classmethod
    def _database_is_known(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if url and not url.startswith(("postgresql+psycopg://", "sqlite:///")):
            raise ValueError("should start with postgresql+psycopg:// or sqlite:///")
        if url.startswith("sqlite:") and url.removeprefix("sqlite:///") in ("", ":memory:"):
            raise ValueError("should name a file: sqlite:/// and its path")
        try:
            make_url(url or "sqlite://")
        except (ArgumentError, ValueError):
            raise ValueError("is not a database URL") from None
        return value

    @field_validator("storage_url")
    @classmethod
    def _storage_is_known(cls, value: str) -> str:
        if value.startswith("s3://"):
            return "s3://" + "/".join(part for part in split_s3_url(value) if part)
        if value and not value.startswith("file:///"):
            raise ValueError("should be file:// and an absolute path, or s3://bucket/prefix")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _webhook_secret_is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("should have at least 16 characters")
        return value

    @model_validator(mode="after")
    def _keys_are_paired_and_safe(self) -> Self:
        if len(self.private_keys) != len(self.public_keys):
            raise ValueError(
                "LOUPE_PRIVATE_KEYS and LOUPE_PUBLIC_KEYS should hold equally many keys"
            )
        private = [key.get_secret_value() for key in self.private_keys]
        if len(set(private)) != len(private) or len(set(self.public_keys)) != len(private):
            raise ValueError("LOUPE_PRIVATE_KEYS and LOUPE_PUBLIC_KEYS should hold no key twice")
        if DEVELOPMENT_PRIVATE_KEY in private and not self.is_loopback:
            raise ValueError("the development key pair is only for LOUPE_HOST on loopback")
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def sqlalchemy_url(self) -> str:
        return self.database_url.get_secret_value() or f"sqlite:///{self.data_dir / 'loupe.db'}"

    @property
    def is_storage_local(self) -> bool:
        return not self.storage_url.startswith("s3://")

    @property
    def storage_dir(self) -> Path:
        """Where blobs are kept, if the storage is local."""
        return (
            Path(urlsplit(self.storage_url).path) if self.storage_url else self.data_dir / "files"
        )

    @property
    def base_url(self) -> str:
        """Where users reach this server: scheme, host and port, without a slash at the end."""
        if self.public_url:
            return self.public_url
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def url_endpoint(self) -> str:
        """What every file URL starts with, without a slash at the end."""
        return f"{self.base_url}/{self.imagekit_id}"

    def effective(self) -> dict[str, object]:
        """What the settings that are left empty come to."""
        keys = "the development pair" if self.is_loopback else "generated, see `python -m app keys`"
        return {
            "database_url": SecretStr(self.sqlalchemy_url),
            "storage_url": f"file://{self.storage_dir.resolve()}"
            if self.is_storage_local
            else self.storage_url,
            "public_url": self.base_url,
            **({} if self.private_keys else {"private_keys": keys, "public_keys": keys}),
            **({} if self.webhook_secret else {"webhook_secret": "generated once"}),
        }


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix, which may be empty and has no slash at its ends. Raises ValueError."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("should name a bucket as S3 allows it, such as s3://my-bucket/prefix")
    prefix = prefix.removesuffix("/")
    if prefix and not _S3_PREFIX.fullmatch(prefix):
        raise ValueError(
            "should have a prefix of letters, digits and . _ - with single slashes between"
        )
    return bucket, prefix


def make_directory(path: Path, setting: str) -> None:
    """Raises SettingsError, naming the setting that the path comes from."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{setting}: the directory {path} cannot be made: {error.strerror}."
        ) from None


def load_settings(settings_class: type[T], **overrides: Any) -> T:
    """Reads one settings class from the environment. Raises SettingsError with one sentence."""
    try:
        return settings_class(**overrides)
    except ValidationError as error:
        raise SettingsError(_first_sentence(settings_class, error)) from None


def _first_sentence(settings_class: type[BaseSettings], error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if not first["loc"]:
        return f"{message}."
    name = env_name(settings_class, str(first["loc"][0]))
    if message.startswith(name):
        return f"{message}."
    return f"{name}: {message[:1].lower()}{message[1:]}."


def env_name(settings_class: type[BaseSettings], field: str) -> str:
    return f"{settings_class.model_config.get('env_prefix', '')}{field}".upper()


def describe(settings: BaseSettings) -> list[tuple[str, str, str]]:
    """Each setting as (variable, value with secrets masked, `environment` or `default`)."""
    effective = settings.effective() if isinstance(settings, Settings) else {}
    return [
        (
            env_name(type(settings), field),
            _shown(field, effective.get(field, getattr(settings, field))),
            "environment" if field in settings.model_fields_set else "default",
        )
        for field in type(settings).model_fields
    ]


def _shown(field: str, value: object) -> str:
    if isinstance(value, SecretStr):
        url = value.get_secret_value()
        return _without_password(url) if field.endswith("_url") else _mask(url)
    if isinstance(value, tuple):
        return ",".join(_shown(field, item) for item in value)
    return "" if value is None else str(value)


def _mask(secret: str) -> str:
    return f"{secret[:8]}…" if len(secret) > 12 else "…" if secret else ""


def _without_password(url: str) -> str:
    url = re.sub(r"([?&](?:ssl)?password=)[^&]*", r"\1…", url)
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":…@") if parts.password else url


def unknown_variables(environ: Mapping[str, str], *known: type[BaseSettings]) -> list[str]:
    """LOUPE_ variables that no settings class reads: usually a misspelt name."""
    names = {env_name(each, field) for each in known for field in each.model_fields}
    return sorted(
        name
        for name in environ
        if name.startswith(ENV_PREFIX) and name not in names and "_TEST_" not in name
    )
