"""What goes over the wire: queries, and the shape of runs, deliveries and usage for OpenAPI."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from app.errors import BadRequest
from app.extensions.schemas import EXTENSIONS, InvalidJson, read_json
from app.files.schemas import LIMIT, Camel, choice, skipped, validated

RUN_STATUSES = ("pending", "success", "failed")
DELIVERY_STATUSES = ("pending", "delivered", "dead")


def _day(description: str) -> Any:
    return Field(description=description, json_schema_extra={"format": "date"})


ExtensionName = Literal["google-auto-tagging", "aws-auto-tagging"]


class Page(Camel):
    """The part of a query that every list has."""

    skip: Annotated[int, skipped("How many to leave out at the start.")] = 0
    limit: Annotated[int, LIMIT] = 100


class RunQuery(Page):
    status: Annotated[str | None, choice(*RUN_STATUSES)] = None
    extension: Annotated[str | None, choice(*EXTENSIONS)] = None
    file_id: Annotated[str | None, Field(description="Runs on any version of this file.")] = None


class DeliveryQuery(Page):
    """host: host and port, as `WebhookDelivery.host` has them."""

    status: Annotated[str | None, choice(*DELIVERY_STATUSES)] = None
    host: Annotated[
        Annotated[str, StringConstraints(to_lower=True)] | None,
        Field(description="Host, and port if the URL has one: `example.com:8443`."),
    ] = None
    run_id: str | None = None


class UsageQuery(Camel):
    start_date: Annotated[str | None, _day("YYYY-MM-DD, UTC; needed.")] = None
    end_date: Annotated[str | None, _day("YYYY-MM-DD, exclusive, within 90 days; needed.")] = None


class RunObject(Camel):
    """One extension of one request, on one version of a file."""

    id: str
    file_id: str
    version_id: str
    extension: ExtensionName
    number: Annotated[
        int, Field(ge=1, description="Rises by one for each run of this version and extension.")
    ]
    status: Literal["pending", "success", "failed"]
    reason: Annotated[
        str | None,
        Field(
            description="Why it failed or is still pending; stable.", examples=["provider_timeout"]
        ),
    ]
    attempts: Annotated[int, Field(ge=0)]
    last_error: str | None
    next_attempt_at: Annotated[datetime | None, Field(description="null once the run is final.")]
    provider: Annotated[str | None, Field(description="Which provider answered, or failed, last.")]
    elapsed_ms: Annotated[int | None, Field(ge=0, description="0 for a stored answer.")]
    min_confidence: Annotated[float, Field(ge=0, le=100)]
    max_tags: Annotated[int, Field(ge=0, le=30)]
    webhook_url: str | None
    announced: Annotated[
        bool, Field(description="A response has called it pending, so its end gets a webhook.")
    ]
    request_id: str
    created_at: datetime
    finished_at: datetime | None
    deadline: Annotated[datetime, Field(description="No attempt starts later.")]


class DeliveryObject(Camel):
    """One webhook, and how its sending goes."""

    id: Annotated[str, Field(description="The event's id: `webhook-id` of every attempt.")]
    run_id: str
    url: str
    status: Literal["pending", "delivered", "dead"]
    attempts: Annotated[int, Field(ge=0)]
    last_error: str | None
    next_attempt_at: Annotated[datetime | None, Field(description="null unless it is pending.")]
    created_at: datetime
    first_attempt_at: Annotated[
        datetime | None, Field(description="Of this sending: a replay begins another.")
    ]
    finished_at: datetime | None


class AttemptObject(Camel):
    """One attempt at a delivery. `statusCode` is null, and `error` says why, without an answer."""

    number: Annotated[int, Field(ge=1)]
    started_at: datetime
    elapsed_ms: Annotated[int, Field(ge=0)]
    status_code: int | None
    error: str | None
    reply_beginning: Annotated[str, Field(description="The first KiB of the reply, as text.")]


class DeliveryDetails(DeliveryObject):
    body: Annotated[dict[str, Any], Field(description="The JSON that is sent.")]
    attempt_log: list[AttemptObject]


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("should be a date and time in ISO 8601")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_text)]


class ReplayRequest(Camel):
    """Which dead deliveries to send again: those created from `from` until before `to`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"from": "2026-11-20T00:00:00Z", "to": "2026-11-21T00:00:00Z"}]
        },
    )

    begin: Annotated[Moment, Field(alias="from", description="With its offset from UTC.")]
    end: Annotated[Moment, Field(alias="to")]

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.begin >= self.end:
            raise ValueError("from should be before to")
        return self

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises BadRequest with one sentence that names the key."""
        try:
            value = read_json(body)
        except InvalidJson as error:
            raise BadRequest(f"Your request contains invalid JSON: it {error}.") from None
        if not isinstance(value, dict):
            raise BadRequest("Your request contains invalid JSON: it should be an object.")
        return validated(cls, value)


class Replayed(BaseModel):
    replayed: Annotated[int, Field(ge=0, description="How many deliveries are pending again.")]


class ExtensionUsageObject(Camel):
    calls: Annotated[int, Field(ge=0, description="Calls to the provider, whatever they brought.")]
    reused_answers: Annotated[int, Field(ge=0, description="Runs that a stored answer served.")]
    refused_calls: Annotated[int, Field(ge=0, description="Calls that the cap held back.")]


class UsageObject(Camel):
    """Whole days in UTC. What Loupe does not measure is 0."""

    bandwidth_bytes: Annotated[int, Field(description="Not measured: 0.")]
    media_library_storage_bytes: Annotated[
        int, Field(ge=0, description="Of all versions of all files, as stored now.")
    ]
    video_processing_units_count: Annotated[int, Field(description="Not measured: 0.")]
    extension_units_count: Annotated[
        int,
        Field(ge=0, description="1 for each call of aws-auto-tagging, 2 of google-auto-tagging."),
    ]
    original_cache_storage_bytes: Annotated[int, Field(description="Not measured: 0.")]
    extensions: Annotated[
        dict[ExtensionName, ExtensionUsageObject], Field(description="Loupe's own addition.")
    ]
