"""Uploads: every field of the form, the answer, names that clash, versions."""

import hashlib
import re
from collections import Counter
from typing import Any

import httpx
import pytest
from sqlalchemy import func, insert, select, update

from app.db import Tx
from app.files.models import files, folders, versions
from app.files.service import MAX_VERSIONS
from app.ids import is_id, new_id
from tests import pictures
from tests.conftest import Serve
from tests.files.helpers import (
    PICTURE,
    accepted,
    at_once,
    nothing_left,
    on_sqlite_only,
    refused,
    traces,
    upload,
    upload_as,
)
from tests.server import LoupeServer

NAME_TAKEN = (
    "A file with the same name already exists at the exact location. We could not overwrite it "
    "because both overwriteFile and useUniqueFileName are set to false."
)
TAGS = [
    {"name": "Red", "confidence": 71.25, "source": "aws-auto-tagging"},
    {"name": "Toy", "confidence": 97.5, "source": "google-auto-tagging"},
]


def set_ai_tags(server: LoupeServer, file_id: str) -> None:
    def change(tx: Tx) -> None:
        tx.execute(update(versions).where(versions.c.file_id == file_id).values(ai_tags=TAGS))

    server.write(change)


def stored_bytes(server: LoupeServer, version_id: str) -> bytes:
    """What the storage keeps for a version."""
    [row] = server.rows(select(versions).where(versions.c.id == version_id))
    [path] = server.resources.settings.storage_dir.rglob(row.blob_key)
    content = path.read_bytes()
    assert (row.size_bytes, row.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return content


# --- the answer -------------------------------------------------------------------------------


def test_the_answer_to_an_image_is_as_the_contract_shows_it(server: LoupeServer) -> None:
    answer = upload_as(server, "test-image.jpg")
    endpoint = f"{server.url}/demo"
    assert is_id(answer["fileId"])
    assert answer == {
        "fileId": answer["fileId"],
        "name": "test-image.jpg",
        "size": len(PICTURE),
        "versionInfo": {"id": answer["fileId"], "name": "Version 1"},
        "filePath": "/test-image.jpg",
        "url": f"{endpoint}/test-image.jpg",
        "fileType": "image",
        "height": 160,
        "width": 240,
        "orientation": 1,
        "thumbnailUrl": f"{endpoint}/tr:n-media_library_thumbnail/test-image.jpg",
        "AITags": None,
    }
    assert stored_bytes(server, answer["fileId"]) == PICTURE


def test_the_answer_to_a_non_image_has_no_pixels(server: LoupeServer) -> None:
    answer = upload_as(server, "notes.txt", b"some text")
    assert answer == {
        "fileId": answer["fileId"],
        "name": "notes.txt",
        "size": 9,
        "versionInfo": {"id": answer["fileId"], "name": "Version 1"},
        "filePath": "/notes.txt",
        "url": f"{server.url}/demo/notes.txt",
        "fileType": "non-image",
        "AITags": None,
    }


@on_sqlite_only
def test_urls_are_made_from_the_public_url_and_the_id(serve: Serve) -> None:
    server = serve(public_url="https://media.example/assets/", imagekit_id="shop")
    server.client.base_url = httpx.URL(f"http://127.0.0.1:{server.resources.settings.port}")
    answer = upload_as(server, "a b.jpg", folder="ünï")
    assert answer["url"] == "https://media.example/assets/shop/%C3%BCn%C3%AF/a_b.jpg"
    assert answer["thumbnailUrl"] == (
        "https://media.example/assets/shop/tr:n-media_library_thumbnail/%C3%BCn%C3%AF/a_b.jpg"
    )


@on_sqlite_only
def test_orientation_is_told_and_sizes_are_as_stored(server: LoupeServer) -> None:
    answer = upload(server, pictures.oriented_jpeg(6))
    assert (answer["orientation"], answer["width"], answer["height"]) == (6, 160, 240)


ON_REQUEST = {
    "tags": ["a", "b"],
    "customCoordinates": "1,2,3,4",
    "isPrivateFile": True,
    "isPublished": False,
    "customMetadata": {},
}
LEFT_OUT = ["metadata", "embeddedMetadata", "selectedFieldsSchema"]
FIELDS = {
    "tags": "a,b",
    "customCoordinates": "1,2,3,4",
    "isPrivateFile": "true",
    "isPublished": "false",
    "customMetadata": "{}",
}


@pytest.mark.parametrize("asked", [[], *([name] for name in ON_REQUEST), list(ON_REQUEST)])
def test_response_fields_are_those_that_were_asked_for(
    shared_server: LoupeServer, asked: list[str]
) -> None:
    plain = upload(shared_server)
    answer = upload(shared_server, responseFields=", ".join([*asked, *LEFT_OUT]), **FIELDS)
    assert set(answer) - set(plain) == set(asked)
    assert {name: answer[name] for name in asked} == {name: ON_REQUEST[name] for name in asked}


def test_response_fields_have_their_defaults(shared_server: LoupeServer) -> None:
    answer = upload(shared_server, responseFields=",".join(ON_REQUEST))
    assert {name: answer[name] for name in ON_REQUEST} == {
        "tags": None,
        "customCoordinates": None,
        "isPrivateFile": False,
        "isPublished": True,
        "customMetadata": {},
    }


# --- fields -----------------------------------------------------------------------------------


def test_every_field_is_kept(server: LoupeServer) -> None:
    answer = upload(
        server,
        fileName="all.jpg",
        folder="/a/b/",
        description="Line one\nline two 世界",
        unknownField="is ignored",
        overwriteCustomMetadata="false",
        **FIELDS,
    )
    details = server.details(answer["fileId"])
    assert details["tags"] == ["a", "b"]
    assert details["customCoordinates"] == "1,2,3,4"
    assert details["isPrivateFile"] is True
    assert details["isPublished"] is False
    assert details["description"] == "Line one\nline two 世界" == answer["description"]
    assert details["filePath"] == answer["filePath"]
    assert answer["filePath"].startswith("/a/b/all_")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a,b,c", ["a", "b", "c"]),
        (" a , b,,a, ", ["a", "b"]),
        ("", None),
        (" , ", None),
        ('["a","b, c"]', ["a", "b, c"]),
        (' [ "a" , ]', ["a"]),
        ("[]", None),
        ("ünï,世界,👍", ["ünï", "世界", "👍"]),
        ("a" * 500, ["a" * 500]),
        ("é" * 250 + "," + "世" * 250, ["é" * 250, "世" * 250]),
    ],
)
def test_tags_are_a_comma_list_or_a_json_array(
    shared_server: LoupeServer, sent: str, kept: list[str] | None
) -> None:
    answer = upload(shared_server, tags=sent, responseFields="tags")
    assert answer["tags"] == kept == shared_server.details(answer["fileId"])["tags"]


@pytest.mark.parametrize("value", ["true", "false", "True", "FALSE", " true "])
@pytest.mark.parametrize("field", ["isPrivateFile", "isPublished"])
def test_flags_are_true_or_false(shared_server: LoupeServer, field: str, value: str) -> None:
    answer = upload(shared_server, **{field: value, "responseFields": field})
    assert answer[field] is (value.strip().lower() == "true")


@pytest.mark.parametrize(
    "field",
    [
        "useUniqueFileName",
        "isPrivateFile",
        "isPublished",
        "overwriteFile",
        "overwriteAITags",
        "overwriteTags",
        "overwriteCustomMetadata",
    ],
)
@pytest.mark.parametrize("value", ["", "1", "yes", "null", "truefalse"])
def test_a_flag_that_is_neither_is_400(shared_server: LoupeServer, field: str, value: str) -> None:
    with nothing_left(shared_server):
        assert field in refused(shared_server.upload(PICTURE, **{field: value}), 400)


def test_custom_coordinates_are_of_images_only(shared_server: LoupeServer) -> None:
    answer = upload(
        shared_server, b"text", customCoordinates="1,2,3,4", responseFields="customCoordinates"
    )
    assert answer["customCoordinates"] is None


@pytest.mark.parametrize(
    "value",
    [
        "1,2,3",
        "1,2,3,4,5",
        "a,b,c,d",
        "-1,2,3,4",
        "1.5,2,3,4",
        "1,2,3,4\n5",
        "9999999,1,1,1",
        "١,٢,٣,٤",
    ],
)
def test_custom_coordinates_are_four_whole_numbers(shared_server: LoupeServer, value: str) -> None:
    with nothing_left(shared_server):
        answer = shared_server.upload(PICTURE, customCoordinates=value)
        assert "customCoordinates" in refused(answer, 400)


@pytest.mark.parametrize("field", ["transformation", "checks"])
def test_what_is_not_supported_yet_is_refused_and_not_dropped(
    shared_server: LoupeServer, field: str
) -> None:
    value = '{"pre":"w-300"}' if field == "transformation" else '"file.size" < "1mb"'
    with nothing_left(shared_server):
        message = refused(shared_server.upload(PICTURE, **{field: value}), 400)
    assert field in message
    assert "not support" in message


def test_custom_metadata_has_no_keys_yet(shared_server: LoupeServer) -> None:
    for value in ("{}", "", "null"):
        upload(shared_server, customMetadata=value)
    with nothing_left(shared_server):
        answer = shared_server.upload(PICTURE, customMetadata='{"brand": "x", "price": 1}')
        refused(answer, 400, "Invalid custom metadata.")
        assert set(answer.json()["errors"]) == {"brand", "price"}
        for value in ("[]", '"text"', "{", "1", '{"a":1,"a":2}', '{"\\ud800":1}'):
            refused(shared_server.upload(PICTURE, customMetadata=value), 400)


def test_an_empty_description_is_none(shared_server: LoupeServer) -> None:
    assert "description" not in upload(shared_server, description="")


@pytest.mark.parametrize("description", ["x" * 20_001, "a\0b"])
def test_a_description_that_cannot_be_kept_is_400(
    shared_server: LoupeServer, description: str
) -> None:
    with nothing_left(shared_server):
        answer = shared_server.upload(PICTURE, description=description)
        assert "description" in refused(answer, 400)


@pytest.mark.parametrize(
    "value", ["", "null", "[]", " [ ] "], ids=["empty", "null", "list", "spaced"]
)
def test_no_extensions_are_none(shared_server: LoupeServer, value: str) -> None:
    assert "extensionStatus" not in upload(shared_server, extensions=value)


@pytest.mark.parametrize(
    "value",
    [
        # The trailing comma stands in ImageKit's own documented example.
        '[{"name":"google-auto-tagging","minConfidence":50,"maxTags":5},]',
        '[{"name":"google-auto-tagging","minConfidence":50,"maxTags":5,},\n]',
        '[{"name":"google-auto-tagging","min_confidence":50.5,"max_tags":5.0}]',
        '[{"name":"google-auto-tagging","minConfidence":0,"maxTags":0}]',
        '[{"name":"google-auto-tagging","minConfidence":100,"maxTags":30}]',
    ],
)
def test_extensions_are_taken_as_the_sdks_send_them(shared_server: LoupeServer, value: str) -> None:
    answer = upload(shared_server, extensions=value)
    assert answer["extensionStatus"] == {"google-auto-tagging": "failed"}  # it is off


# --- names and folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("image.jpg", r"image_[A-Za-z0-9_-]{9}\.jpg"),
        ("archive.tar.gz", r"archive\.tar_[A-Za-z0-9_-]{9}\.gz"),
        ("README", r"README_[A-Za-z0-9_-]{9}"),
        (".htaccess", r"\.htaccess_[A-Za-z0-9_-]{9}"),
        ("a.", r"a_[A-Za-z0-9_-]{9}\."),
    ],
)
def test_a_unique_suffix_stands_before_the_extension(
    shared_server: LoupeServer, name: str, shape: str
) -> None:
    first, second = (upload(shared_server, fileName=name) for _ in range(2))
    for answer in (first, second):
        assert re.fullmatch(shape, answer["name"])
        assert answer["filePath"] == f"/{answer['name']}"
        assert answer["versionInfo"]["name"] == "Version 1"
    assert first["name"] != second["name"]
    assert first["fileId"] != second["fileId"]


def test_missing_folders_are_made_with_their_parents(server: LoupeServer) -> None:
    upload_as(server, "x.jpg", folder="shop//summer 26/ünï/")
    upload_as(server, "y.jpg", folder="/shop/summer_26")
    paths = [row.path for row in server.rows(select(folders.c.path).order_by(folders.c.path))]
    assert paths == ["/", "/shop", "/shop/summer_26", "/shop/summer_26/ünï"]
    found = server.client.get("/v1/files", params={"path": "/shop/summer_26/"}).json()
    assert [file["filePath"] for file in found] == ["/shop/summer_26/y.jpg"]


def test_a_folder_made_by_20_clients_at_once_is_one(server: LoupeServer) -> None:
    answers = at_once([lambda: server.upload(b"text", "a.txt", folder="/a/b/c")] * 20)
    assert Counter(answer.status_code for answer in answers) == {200: 20}
    assert len(server.rows(select(folders))) == 4
    assert len(server.rows(select(files))) == 20


# --- overwriting and versions -----------------------------------------------------------------


def test_the_same_name_is_a_new_version_of_the_same_file(server: LoupeServer) -> None:
    first = upload_as(server, "a.jpg", tags="old", description="old", isPrivateFile="true")
    second = upload_as(server, "a.jpg", pictures.png())
    third = upload_as(server, "a.jpg", b"text")
    assert first["fileId"] == second["fileId"] == third["fileId"]
    shown = [answer["versionInfo"] for answer in (first, second, third)]
    assert [info["name"] for info in shown] == ["Version 1", "Version 2", "Version 3"]
    assert len({info["id"] for info in shown}) == 3
    assert shown[0]["id"] == first["fileId"]
    details = server.details(first["fileId"])
    assert details["versionInfo"] == shown[2]
    assert details["type"] == "file"
    assert (details["fileType"], details["mime"]) == ("non-image", "application/octet-stream")
    assert (details["tags"], details["isPrivateFile"]) == (None, False)
    assert "description" not in details
    assert stored_bytes(server, shown[0]["id"]) == PICTURE
    assert stored_bytes(server, shown[1]["id"]) == pictures.png()
    assert stored_bytes(server, shown[2]["id"]) == b"text"
    assert len(server.client.get("/v1/files").json()) == 1


def test_the_same_name_elsewhere_is_another_file(server: LoupeServer) -> None:
    answers = [upload_as(server, "a.jpg", folder=folder) for folder in ("/", "/b", "/b/c")]
    assert len({answer["fileId"] for answer in answers}) == 3


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({}, {"tags": None, "AITags": None}),
        ({"overwriteTags": "true", "overwriteAITags": "true"}, {"tags": None, "AITags": None}),
        ({"overwriteTags": "false"}, {"tags": ["old"], "AITags": None}),
        ({"overwriteAITags": "false"}, {"tags": None, "AITags": TAGS}),
        ({"overwriteTags": "false", "tags": "new"}, {"tags": ["new"], "AITags": None}),
        ({"overwriteTags": "true", "tags": "new"}, {"tags": ["new"], "AITags": None}),
        (
            {"overwriteTags": "false", "overwriteAITags": "false"},
            {"tags": ["old"], "AITags": TAGS},
        ),
        # Never kept: they belong to the picture.
        (
            {"overwriteTags": "false", "overwriteCustomMetadata": "false"},
            {"customCoordinates": None},
        ),
        ({"customCoordinates": "5,6,7,8"}, {"customCoordinates": "5,6,7,8"}),
    ],
)
def test_overwriting_keeps_what_it_is_told_to_keep(
    shared_server: LoupeServer, sent: dict[str, str], kept: dict[str, Any]
) -> None:
    name = f"{new_id()}.jpg"
    old = upload_as(shared_server, name, tags="old", customCoordinates="1,2,3,4")
    set_ai_tags(shared_server, old["fileId"])
    fields = {"responseFields": "tags,customCoordinates", **sent}
    answer = upload_as(shared_server, name, pictures.png(), **fields)
    details = shared_server.details(old["fileId"])
    assert answer["versionInfo"]["name"] == "Version 2"
    assert {key: answer[key] for key in kept} == kept
    assert {key: details[key] for key in kept} == kept
    [first] = shared_server.rows(select(versions).where(versions.c.id == old["fileId"]))
    assert (first.tags, first.ai_tags) == (["old"], TAGS)


def test_a_taken_name_is_refused_when_neither_way_out_is_allowed(server: LoupeServer) -> None:
    old = upload_as(server, "a.jpg", tags="old")
    with nothing_left(server):
        fields = {"useUniqueFileName": "false", "overwriteFile": "false"}
        refused(server.upload(pictures.png(), "a.jpg", **fields), 400, NAME_TAKEN)
    assert stored_bytes(server, old["fileId"]) == PICTURE
    # A free name is no trouble, nor is a suffix.
    accepted(server.upload(PICTURE, "b.jpg", **fields))
    accepted(server.upload(PICTURE, "a.jpg", overwriteFile="false"))


def test_one_of_50_clients_gets_a_name(server: LoupeServer) -> None:
    """Each sends other bytes, and the file has those of the one who was told 200."""
    contents = [f"client {number} ".encode() * 1000 for number in range(50)]
    fields = {"useUniqueFileName": "false", "overwriteFile": "false"}
    before = traces(server)
    answers = at_once(
        [
            lambda content=content: server.upload(content, "a.txt", **fields)  # type: ignore[misc]
            for content in contents
        ]
    )
    statuses = [answer.status_code for answer in answers]
    assert Counter(statuses) == {200: 1, 400: 49}
    for answer in answers:
        if answer.status_code == 400:
            refused(answer, 400, NAME_TAKEN)
    winner = statuses.index(200)
    assert stored_bytes(server, answers[winner].json()["fileId"]) == contents[winner]
    left = traces(server) - before
    assert sum(count for name, count in left.items() if name.startswith("file ")) == 1
    assert (left["table files"], left["table file_versions"]) == (1, 1)


def test_versions_of_20_clients_are_numbered_without_a_gap(server: LoupeServer) -> None:
    contents = [f"client {number}".encode() for number in range(20)]
    answers = at_once(
        [
            lambda content=content: upload_as(server, "a.txt", content)  # type: ignore[misc]
            for content in contents
        ]
    )
    assert len({answer["fileId"] for answer in answers}) == 1
    names = {answer["versionInfo"]["name"] for answer in answers}
    assert names == {f"Version {number}" for number in range(1, 21)}
    for answer, content in zip(answers, contents, strict=True):
        assert stored_bytes(server, answer["versionInfo"]["id"]) == content
    newest = server.details(answers[0]["fileId"])["versionInfo"]
    assert newest["name"] == "Version 20"


def test_a_file_has_at_most_100_versions(server: LoupeServer) -> None:
    file_id = upload_as(server, "a.jpg")["fileId"]

    def add_versions(tx: Tx) -> None:
        [first] = tx.execute(select(versions).where(versions.c.id == file_id)).mappings()
        for number in range(2, MAX_VERSIONS):
            own = {"id": new_id(), "number": number, "blob_key": new_id()}
            tx.execute(insert(versions).values({**first, **own}))

    server.write(add_versions)
    assert upload_as(server, "a.jpg")["versionInfo"]["name"] == "Version 100"
    fields = {"useUniqueFileName": "false"}
    with nothing_left(server):
        message = refused(server.upload(PICTURE, "a.jpg", **fields), 400)
    assert "100" in message
    assert server.rows(select(func.count()).select_from(versions))[0][0] == 100
