"""What `GET /v1/files/{fileId}/details` says of a file."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from app.clock import Clock
from app.db import Tx
from app.files.models import versions
from app.wire import iso_milliseconds
from tests import pictures
from tests.conftest import Serve
from tests.files.helpers import PICTURE, accepted, on_sqlite_only, patch, upload, upload_as
from tests.server import LoupeServer


def test_details_are_as_the_contract_shows_them(server: LoupeServer) -> None:
    uploaded = upload_as(server, "a.jpg", folder="/b", tags="x,y")
    details = server.details(uploaded["fileId"])
    created_at, updated_at = details.pop("createdAt"), details.pop("updatedAt")
    assert details == {
        "type": "file",
        "fileId": uploaded["fileId"],
        "name": "a.jpg",
        "filePath": "/b/a.jpg",
        "tags": ["x", "y"],
        "AITags": None,
        "versionInfo": {"id": uploaded["fileId"], "name": "Version 1"},
        "embeddedMetadata": None,
        "customCoordinates": None,
        "customMetadata": {},
        "isPrivateFile": False,
        "isPublished": True,
        "url": f"{server.url}/demo/b/a.jpg",
        "thumbnail": f"{server.url}/demo/tr:n-media_library_thumbnail/b/a.jpg",
        "fileType": "image",
        "mime": "image/jpeg",
        "height": 160,
        "width": 240,
        "size": len(PICTURE),
        "hasAlpha": False,
    }
    for stamp in (created_at, updated_at):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert created_at == updated_at
    age = datetime.now(UTC) - datetime.fromisoformat(created_at)
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_times_are_of_the_file_and_of_its_last_change(server: LoupeServer) -> None:
    first = upload_as(server, "a.jpg")
    before = server.details(first["fileId"])
    upload_as(server, "a.jpg", pictures.png())
    replaced = server.details(first["fileId"])
    assert replaced["createdAt"] == before["createdAt"] < replaced["updatedAt"]
    changed = accepted(patch(server, first["fileId"], {"tags": ["a"]}))
    assert changed["createdAt"] == before["createdAt"]
    assert changed["updatedAt"] > replaced["updatedAt"]
    assert accepted(patch(server, first["fileId"], {}))["updatedAt"] == changed["updatedAt"]


def test_ai_tags_of_all_sources_are_told_in_order(server: LoupeServer) -> None:
    file_id = upload(server)["fileId"]
    tags = [
        {"name": "Toy", "confidence": 97.46, "source": "aws-auto-tagging"},
        {"name": "Toy", "confidence": 99.0, "source": "google-auto-tagging"},
    ]

    def change(tx: Tx) -> None:
        tx.execute(update(versions).where(versions.c.id == file_id).values(ai_tags=tags))

    server.write(change)
    assert server.details(file_id)["AITags"] == tags
    assert server.client.get("/v1/files").json()[0]["AITags"] == tags


def test_the_latest_status_of_each_extension_on_the_current_version_is_told(
    server: LoupeServer,
) -> None:
    """Both extensions are off here, so that each run fails at once."""
    google = '[{"name":"google-auto-tagging","minConfidence":1,"maxTags":1}]'
    file_id = upload_as(server, "a.jpg", extensions=google)["fileId"]
    assert server.details(file_id)["extensionStatus"] == {"google-auto-tagging": "failed"}
    aws = [{"name": "aws-auto-tagging", "minConfidence": 1, "maxTags": 1}]
    patched = accepted(patch(server, file_id, {"extensions": aws}))
    assert patched["extensionStatus"] == {"aws-auto-tagging": "failed"}
    assert server.details(file_id)["extensionStatus"] == {
        "google-auto-tagging": "failed",
        "aws-auto-tagging": "failed",
    }
    upload_as(server, "a.jpg", pictures.png())
    assert "extensionStatus" not in server.details(file_id)


@on_sqlite_only
def test_a_description_is_told_if_there_is_one(server: LoupeServer) -> None:
    file_id = upload(server)["fileId"]
    assert "description" not in server.details(file_id)
    accepted(patch(server, file_id, {"description": "A dot."}))
    assert server.details(file_id)["description"] == "A dot."


class LateClock(Clock):
    def now(self) -> datetime:
        return datetime(2031, 1, 2, 3, 4, 5, 6_999, UTC)


@pytest.mark.parametrize("name", ["a.jpg"])
def test_times_are_those_of_the_clock_in_milliseconds(serve: Serve, name: str) -> None:
    server = serve(clock=LateClock())
    file_id = upload_as(server, name)["fileId"]
    assert server.details(file_id)["createdAt"] == "2031-01-02T03:04:05.006Z"


def test_times_are_cut_and_not_rounded() -> None:
    moment = datetime(2019, 8, 24, 6, 14, 41, 999_999, UTC)
    assert iso_milliseconds(moment) == "2019-08-24T06:14:41.999Z"
