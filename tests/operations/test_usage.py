"""The account's usage through HTTP."""

from datetime import UTC, date, datetime, timedelta

import httpx
from pydantic import TypeAdapter
from sqlalchemy import insert

from app.extensions.models import usage
from app.operations.schemas import UsageObject
from tests.conftest import Serve
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.operations.support import AWS, GOOGLE, PICTURE, get, refusal, upload
from tests.server import LoupeServer

USAGE = "/v1/accounts/usage"
NOTHING = {"calls": 0, "reusedAnswers": 0, "refusedCalls": 0}


def test_empty_account_has_used_nothing(server: LoupeServer) -> None:
    assert get(server, USAGE, startDate="2026-11-01", endDate="2026-12-01") == {
        "bandwidthBytes": 0,
        "mediaLibraryStorageBytes": 0,
        "videoProcessingUnitsCount": 0,
        "extensionUnitsCount": 0,
        "originalCacheStorageBytes": 0,
        "extensions": {GOOGLE: NOTHING, AWS: NOTHING},
    }


def test_calls_and_reused_answers_are_counted_today(
    serve: Serve, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    server = serve(
        google_auto_tagging="vision",
        aws_auto_tagging="rekognition",
        sync_budget_seconds=20,
        result_ttl_days=30,
    )
    upload(server, GOOGLE, AWS)
    upload(server, GOOGLE)
    today = datetime.now(UTC).date()
    used = get(
        server,
        USAGE,
        startDate=str(today - timedelta(days=1)),
        endDate=str(today + timedelta(days=2)),
    )
    TypeAdapter(UsageObject).validate_python(used)
    assert used["extensionUnitsCount"] == 3
    assert used["extensions"] == {
        GOOGLE: {"calls": 1, "reusedAnswers": 1, "refusedCalls": 0},
        AWS: {"calls": 1, "reusedAnswers": 0, "refusedCalls": 0},
    }
    assert used["mediaLibraryStorageBytes"] == 2 * len(PICTURE)


def test_storage_counts_every_version_that_is_stored(server: LoupeServer) -> None:
    for size in (100, 2000):
        answer = server.upload(b"x" * size, "notes.txt", useUniqueFileName="false")
        assert answer.status_code == 200
    span = {"startDate": "2026-11-01", "endDate": "2026-11-02"}
    assert get(server, USAGE, **span)["mediaLibraryStorageBytes"] == 2100
    server.client.delete(f"/v1/files/{answer.json()['fileId']}")
    assert get(server, USAGE, **span)["mediaLibraryStorageBytes"] == 0


def test_days_count_from_the_first_until_before_the_last(server: LoupeServer) -> None:
    rows = [
        {"extension": name, "day": date(2026, 11, day), "calls": day, "reused": 1, "refused": 2}
        for name in (GOOGLE, AWS)
        for day in (1, 10, 20, 30)
    ]
    server.write(lambda tx: tx.execute(insert(usage), rows).rowcount)
    used = get(server, USAGE, startDate="2026-11-10", endDate="2026-11-30")
    assert used["extensions"][GOOGLE] == {"calls": 30, "reusedAnswers": 2, "refusedCalls": 4}
    assert used["extensionUnitsCount"] == 2 * 30 + 30


WRONG_DATES: list[tuple[dict[str, str], str]] = [
    ({}, "startDate and endDate are required in query parameters."),
    ({"startDate": "2026-11-01"}, "startDate and endDate are required in query parameters."),
    (
        {"startDate": "2026-11-01", "endDate": ""},
        "startDate and endDate are required in query parameters.",
    ),
    *(
        (
            {"startDate": wrong, "endDate": "2026-11-02"},
            "startDate and endDate should be in format YYYY-MM-DD.",
        )
        for wrong in ("1.11.2026", "20261101", "2026-02-30", "2026-W01-1", "٢٠٢٦-11-01")
    ),
    (
        {"startDate": "2026-11-02", "endDate": "2026-11-01"},
        "startDate should be before endDate.",
    ),
    (
        {"startDate": "2026-11-01", "endDate": "2026-11-01"},
        "startDate should be before endDate.",
    ),
    (
        {"startDate": "2026-01-01", "endDate": "2026-04-01"},
        "startDate and endDate should be within 90 days.",
    ),
]


def test_wrong_dates_are_refused_in_the_contracts_words(server: LoupeServer) -> None:
    for query, message in WRONG_DATES:
        assert refusal(server, USAGE, **query) == (400, message)


def test_89_days_are_within_90(server: LoupeServer) -> None:
    assert get(server, USAGE, startDate="2026-01-01", endDate="2026-03-31")


def test_nobody_sees_usage_without_the_private_key(server: LoupeServer) -> None:
    assert httpx.get(server.url + USAGE).status_code == 401
