"""How the endpoints look in OpenAPI, where FastAPI cannot tell: raw answers and bodies."""

from typing import Any

from app.files.openapi import ERRORS, error
from app.operations.schemas import (
    DeliveryDetails,
    DeliveryObject,
    Replayed,
    ReplayRequest,
    RunObject,
    UsageObject,
)

_NOT_FOUND = error(404, "It does not exist.")

RUN: dict[str, Any] = {
    "id": "6673f88237b244ef54d60181",
    "fileId": "6673f88237b244ef54d60180",
    "versionId": "6673f88237b244ef54d60180",
    "extension": "google-auto-tagging",
    "number": 1,
    "status": "failed",
    "reason": "provider_credentials",
    "attempts": 1,
    "lastError": "Google Vision did not accept our credentials.",
    "nextAttemptAt": None,
    "provider": "vision",
    "elapsedMs": 41,
    "minConfidence": 80.0,
    "maxTags": 10,
    "webhookUrl": "https://example.com/hooks/loupe",
    "announced": False,
    "requestId": "5c6cfbb8-46f5-4b68-a8f4-8b4b1b5c5e5e",
    "createdAt": "2026-11-20T06:14:41.313Z",
    "finishedAt": "2026-11-20T06:14:41.360Z",
    "deadline": "2026-11-21T06:14:41.313Z",
}
RETRIED: dict[str, Any] = {
    **RUN,
    "id": "6673f88237b244ef54d60182",
    "number": 2,
    "status": "pending",
    "reason": None,
    "attempts": 0,
    "lastError": None,
    "nextAttemptAt": "2026-11-20T08:00:00.120Z",
    "provider": None,
    "elapsedMs": None,
    "announced": True,
    "createdAt": "2026-11-20T08:00:00.120Z",
    "finishedAt": None,
    "deadline": "2026-11-21T08:00:00.120Z",
}
DELIVERY: dict[str, Any] = {
    "id": "evt_6673f88237b244ef54d60190",
    "runId": "6673f88237b244ef54d60181",
    "url": "https://example.com/hooks/loupe",
    "status": "dead",
    "attempts": 1,
    "lastError": "status 410",
    "nextAttemptAt": None,
    "createdAt": "2026-11-20T06:14:41.360Z",
    "firstAttemptAt": "2026-11-20T06:14:41.362Z",
    "finishedAt": "2026-11-20T06:14:41.380Z",
}
_DETAILS: dict[str, Any] = {
    "body": {
        "service": "google-auto-tagging",
        "status": "FAILURE",
        "fileId": "6673f88237b244ef54d60180",
        "error": {"message": RUN["lastError"], "reason": RUN["reason"]},
    },
    "attemptLog": [
        {
            "number": 1,
            "startedAt": "2026-11-20T06:14:41.362Z",
            "elapsedMs": 18,
            "statusCode": 410,
            "error": None,
            "replyBeginning": "gone",
        }
    ],
}
READ: dict[str, Any] = {**DELIVERY, **_DETAILS}
REPLAYED: dict[str, Any] = {
    **READ,
    "status": "pending",
    "nextAttemptAt": "2026-11-20T08:00:00.120Z",
    "firstAttemptAt": None,
    "finishedAt": None,
}
USED: dict[str, Any] = {
    "bandwidthBytes": 0,
    "mediaLibraryStorageBytes": 117079,
    "videoProcessingUnitsCount": 0,
    "extensionUnitsCount": 31,
    "originalCacheStorageBytes": 0,
    "extensions": {
        "google-auto-tagging": {"calls": 10, "reusedAnswers": 4, "refusedCalls": 0},
        "aws-auto-tagging": {"calls": 11, "reusedAnswers": 0, "refusedCalls": 2},
    },
}


def _endpoint(
    model: Any,
    example: Any,
    errors: dict[int | str, Any],
    *,
    status: int = 200,
    description: str = "Done.",
    **extra: Any,
) -> dict[str, Any]:
    answer = {
        "model": model,
        "description": description,
        "content": {"application/json": {"example": example}},
    }
    return {
        "status_code": status,
        "responses": {status: answer, **ERRORS, **errors},
        "openapi_extra": {"security": [{"privateKey": []}], **extra},
    }


def _replay_body() -> dict[str, Any]:
    schema = ReplayRequest.model_json_schema()
    return {"required": True, "content": {"application/json": {"schema": schema}}}


LIST_RUNS = _endpoint(list[RunObject], [RUN], {}, description="Newest first.")
READ_RUN = _endpoint(RunObject, RUN, _NOT_FOUND, description="The run.")
RETRY_RUN = _endpoint(
    RunObject,
    RETRIED,
    {**_NOT_FOUND, **error(409, "It is pending, or its version is not the current one.")},
    status=201,
    description="The new run.",
)
LIST_DELIVERIES = _endpoint(list[DeliveryObject], [DELIVERY], {}, description="Newest first.")
READ_DELIVERY = _endpoint(DeliveryDetails, READ, _NOT_FOUND, description="The delivery.")
REPLAY_DELIVERY = _endpoint(
    DeliveryDetails,
    REPLAYED,
    {**_NOT_FOUND, **error(409, "It is pending already.")},
    description="The delivery, pending again.",
)
REPLAY_DEAD = _endpoint(
    Replayed,
    {"replayed": 12},
    {},
    description="How many are pending again.",
    requestBody=_replay_body(),
)
USAGE = _endpoint(UsageObject, USED, {}, description="What has been used.")
