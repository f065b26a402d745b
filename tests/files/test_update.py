"""`PATCH /v1/files/{fileId}/details`: what is absent stays, `null` unsets."""

import json
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Tx
from app.extensions.models import runs
from app.files.models import versions
from tests import pictures
from tests.conftest import Serve
from tests.emulators.vision import VisionEmulator
from tests.files.helpers import (
    PICTURE,
    accepted,
    at_once,
    nothing_left,
    patch,
    patch_raw,
    refused,
    upload,
    upload_as,
)
from tests.files.test_upload import TAGS, set_ai_tags
from tests.server import LoupeServer

GOOGLE = {"name": "google-auto-tagging", "minConfidence": 0, "maxTags": 30}
SETTABLE: dict[str, Any] = {
    "tags": ["old"],
    "description": "old",
    "customCoordinates": "1,2,3,4",
}


def uploaded(server: LoupeServer) -> str:
    """The id of a file that has a value for everything that can be unset."""
    return str(upload(server, tags="old", description="old", customCoordinates="1,2,3,4")["fileId"])


@pytest.fixture
def file_id(shared_server: LoupeServer) -> str:
    return uploaded(shared_server)


def test_the_answer_is_the_file_as_it_is_now(server: LoupeServer) -> None:
    file_id = uploaded(server)
    change = {"tags": ["a", "b"], "description": "new", "customCoordinates": "5,6,7,8"}
    answer = accepted(patch(server, file_id, change))
    assert answer == server.details(file_id)
    assert {key: answer[key] for key in change} == change
    assert "extensionStatus" not in answer


@pytest.mark.parametrize("key", SETTABLE)
def test_absent_is_not_null(server: LoupeServer, key: str) -> None:
    file_id = uploaded(server)
    for other in SETTABLE:
        if other != key:
            accepted(patch(server, file_id, {other: SETTABLE[other]}))
    kept = server.details(file_id)
    assert {name: kept[name] for name in SETTABLE} == SETTABLE
    accepted(patch(server, file_id, {key: None}))
    details = server.details(file_id)
    assert details.get(key) is None
    assert {name: details[name] for name in SETTABLE if name != key} == {
        name: value for name, value in SETTABLE.items() if name != key
    }


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"unknown": 1},
        {"extensions": []},
        {"extensions": None},
        {"removeAITags": None},
        {"removeAITags": []},
        {"customMetadata": {}},
        {"customMetadata": None},
        {"webhookUrl": None},
        {"webhookUrl": "https://example.com/hook"},
        {"publish": None},
    ],
    ids=json.dumps,
)
def test_bodies_that_change_nothing(
    shared_server: LoupeServer, file_id: str, body: dict[str, Any]
) -> None:
    before = shared_server.details(file_id)
    with nothing_left(shared_server):
        assert accepted(patch(shared_server, file_id, body)) == before


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["a", "b, c"], ["a", "b, c"]),
        ([" a ", "a", ""], ["a"]),
        ([], None),
        ([" "], None),
        (["x" * 500], ["x" * 500]),
    ],
    ids=str,
)
def test_tags_are_replaced(
    shared_server: LoupeServer, file_id: str, sent: list[str], kept: list[str] | None
) -> None:
    assert accepted(patch(shared_server, file_id, {"tags": sent}))["tags"] == kept


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"tags": "a,b"}, "tags"),
    ({"tags": [1]}, "tags"),
    ({"tags": {"a": 1}}, "tags"),
    ({"tags": ["50%"]}, "tags"),
    ({"tags": ["a\0"]}, "tags"),
    ({"tags": ["x" * 250, "y" * 251]}, "tags"),
    ({"tags": ["a"] * 501}, "tags"),
    ({"description": 5}, "description"),
    ({"description": ["a"]}, "description"),
    ({"description": "a\0b"}, "description"),
    ({"description": "x" * 20_001}, "description"),
    ({"customCoordinates": "1,2,3"}, "customCoordinates"),
    ({"customCoordinates": [1, 2, 3, 4]}, "customCoordinates"),
    ({"removeAITags": "Toy"}, "removeAITags"),
    ({"removeAITags": "ALL"}, "removeAITags"),
    ({"removeAITags": {"all": True}}, "removeAITags"),
    ({"removeAITags": ["a", 1]}, "removeAITags"),
    ({"extensions": json.dumps([GOOGLE])}, "extensions"),
    ({"extensions": GOOGLE}, "extensions"),
    ({"extensions": [GOOGLE, GOOGLE]}, "extensions[1].name"),
    ({"extensions": [{"name": "google-auto-tagging"}]}, "extensions[0].minConfidence"),
    ({"extensions": [GOOGLE, {**GOOGLE, "name": "remove-bg"}]}, "extensions[1].name"),
    ({"webhookUrl": "ftp://example.com"}, "webhookUrl"),
    ({"webhookUrl": 5}, "webhookUrl"),
    ({"customMetadata": {"brand": "x"}}, "custom metadata"),
    ({"customMetadata": []}, "custom metadata"),
    ({"publish": True}, "publish"),
    ({"publish": {}}, "publish.isPublished"),
    ({"publish": {"isPublished": "true"}}, "publish.isPublished"),
    ({"publish": {"isPublished": 1}}, "publish.isPublished"),
    ({"publish": {"isPublished": True, "includeFileVersions": None}}, "includeFileVersions"),
    ({"publish": {"isPublished": True, "more": 1}}, "more"),
    ({"publish": {"isPublished": True}, "tags": ["a"]}, "publish"),
    ({"publish": {"isPublished": True}, "extensions": [GOOGLE]}, "publish"),
]


@pytest.mark.parametrize(("body", "named"), INVALID, ids=lambda value: str(value)[:60])
def test_an_invalid_body_is_400_and_changes_nothing(
    shared_server: LoupeServer, file_id: str, body: dict[str, Any], named: str
) -> None:
    """Nor does what is right beside it."""
    before = shared_server.details(file_id)
    beside = {} if "publish" in body else {"description": "new", "tags": ["new"]}
    with nothing_left(shared_server):
        message = refused(patch(shared_server, file_id, beside | body), 400)
    assert named in message
    assert shared_server.details(file_id) == before


def test_messages_are_those_of_the_contract(shared_server: LoupeServer, file_id: str) -> None:
    refused(
        patch(shared_server, file_id, {"tags": ["x" * 501]}),
        400,
        "Your request contains invalid value for tags parameter. "
        "Combined length of all tags should be less than or equal to 500.",
    )
    answer = patch(shared_server, file_id, {"customMetadata": {"a": 1, "b": 2}})
    refused(answer, 400, "Invalid custom metadata.")
    assert set(answer.json()["errors"]) == {"a", "b"}


def test_a_body_with_a_trailing_comma_works(shared_server: LoupeServer, file_id: str) -> None:
    """ImageKit's own documented example has one."""
    body = b'\xef\xbb\xbf{"tags": ["a", "b,}"], "description": "\\u00fc,]",}'
    answer = accepted(patch_raw(shared_server, file_id, body))
    assert (answer["tags"], answer["description"]) == (["a", "b,}"], "ü,]")


# --- publishing -------------------------------------------------------------------------------


def test_a_file_is_published_and_taken_back(server: LoupeServer) -> None:
    answer = upload(server, isPublished="false")
    url = answer["url"].removeprefix(server.url)
    assert server.client.get(url).status_code == 404
    published = accepted(patch(server, answer["fileId"], {"publish": {"isPublished": True}}))
    assert published["isPublished"] is True
    assert server.client.get(url).content == PICTURE
    draft = accepted(patch(server, answer["fileId"], {"publish": {"isPublished": False}}))
    assert draft["isPublished"] is False
    assert server.client.get(url).status_code == 404


@pytest.mark.parametrize("includes_versions", [None, False, True])
def test_publishing_reaches_older_versions_if_asked(
    server: LoupeServer, includes_versions: bool | None
) -> None:
    file_id = upload_as(server, "a.jpg", isPublished="false")["fileId"]
    other = upload_as(server, "b.jpg", isPublished="false")["fileId"]
    upload_as(server, "a.jpg", pictures.png(), isPublished="false")
    publish = {"isPublished": True}
    if includes_versions is not None:
        publish["includeFileVersions"] = includes_versions
    accepted(patch(server, file_id, {"publish": publish}))
    query = select(versions.c.is_published).where(versions.c.file_id == file_id)
    numbers = server.rows(query.order_by(versions.c.number))
    assert [row.is_published for row in numbers] == [bool(includes_versions), True]
    assert server.details(other)["isPublished"] is False


# --- AI tags ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "left"),
    [
        ("all", None),
        (["Toy"], ["Red"]),
        (["Red", "Toy"], None),
        (["toy"], ["Red", "Toy"]),
        (["To"], ["Red", "Toy"]),
        (["nothing"], ["Red", "Toy"]),
        ([], ["Red", "Toy"]),
        (None, ["Red", "Toy"]),
        (["all"], ["Red", "Toy"]),
    ],
    ids=str,
)
def test_ai_tags_are_removed_by_name_or_all(
    server: LoupeServer, removed: Any, left: list[str] | None
) -> None:
    file_id = upload(server)["fileId"]
    set_ai_tags(server, file_id)
    answer = accepted(patch(server, file_id, {"removeAITags": removed}))
    shown = answer["AITags"]
    assert (shown and [tag["name"] for tag in shown]) == left
    assert server.details(file_id)["AITags"] == shown


def test_a_name_is_removed_for_every_source(server: LoupeServer) -> None:
    file_id = upload(server)["fileId"]
    both = [{**TAGS[1], "source": source} for source in ("aws-auto-tagging", TAGS[1]["source"])]

    def change(tx: Tx) -> None:
        tx.execute(versions.update().where(versions.c.id == file_id).values(ai_tags=both))

    server.write(change)
    assert accepted(patch(server, file_id, {"removeAITags": ["Toy"]}))["AITags"] is None


@pytest.mark.parametrize("removed", ["all", ["Toy", "Red", "Cat"]])
def test_ai_tags_are_removed_before_the_extensions_run(
    serve: Serve, vision: VisionEmulator, removed: Any
) -> None:
    vision.labels = [("Cat", 90.0)]
    server = serve(google_auto_tagging="vision")
    file_id = upload(server)["fileId"]
    set_ai_tags(server, file_id)
    body = {"extensions": [GOOGLE], "removeAITags": removed}
    answer = accepted(patch(server, file_id, body))
    assert answer["extensionStatus"] == {"google-auto-tagging": "success"}
    assert answer["AITags"] == [
        {"name": "Cat", "confidence": 90.0, "source": "google-auto-tagging"}
    ]
    assert {**server.details(file_id), "extensionStatus": answer["extensionStatus"]} == answer


def test_extensions_that_are_off_fail_at_once_and_touch_nothing(server: LoupeServer) -> None:
    file_id = uploaded(server)
    set_ai_tags(server, file_id)
    answer = accepted(patch(server, file_id, {"extensions": [GOOGLE], "tags": ["new"]}))
    assert answer["extensionStatus"] == {"google-auto-tagging": "failed"}
    assert (answer["tags"], answer["AITags"]) == (["new"], TAGS)
    [run] = server.rows(select(runs))
    assert (run.status, run.reason) == ("failed", "extension_off")


# --- the current version, and races -----------------------------------------------------------


def test_only_the_current_version_is_changed(server: LoupeServer) -> None:
    file_id = upload_as(server, "a.jpg", tags="first")["fileId"]
    upload_as(server, "a.jpg", pictures.png(), tags="second")
    accepted(patch(server, file_id, {"tags": ["new"]}))
    query = select(versions.c.tags).order_by(versions.c.number)
    assert [row.tags for row in server.rows(query)] == [["first"], ["new"]]


def test_updates_of_different_keys_at_once_all_stand(server: LoupeServer) -> None:
    file_id = uploaded(server)
    set_ai_tags(server, file_id)
    bodies: list[dict[str, Any]] = [
        {"tags": ["new"]},
        {"description": "new"},
        {"customCoordinates": "9,9,9,9"},
        {"removeAITags": ["Toy"]},
        {"removeAITags": ["Red"]},
    ] * 3
    answers = at_once(
        [
            lambda body=body: patch(server, file_id, body)  # type: ignore[misc]
            for body in bodies
        ]
    )
    assert Counter(answer.status_code for answer in answers) == {200: 15}
    details = server.details(file_id)
    assert (details["tags"], details["description"]) == (["new"], "new")
    assert (details["customCoordinates"], details["AITags"]) == ("9,9,9,9", None)
