"""Answers of providers that are no honest labels: cleaned, clamped, and final."""

import json
import unicodedata
from collections.abc import Callable, Iterator

import pytest
from google.cloud.vision_v1 import (
    AnnotateImageResponse,
    BatchAnnotateImagesResponse,
    EntityAnnotation,
)

from app.extensions.schemas import AWS, GOOGLE
from app.extensions.tags import MAX_NAME_CHARACTERS
from tests.emulators.receiver import Receiver
from tests.files.support import (
    Stand,
    runs_of,
    standing,
    upload,
    wait_for_status,
    wait_until_final,
)

UNWANTED = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
BIDI = "\u202eevil\u2066\u200b\ufeff"
HOSTILE: dict[str, list[tuple[str, str]]] = {
    "no numbers": [("Cat", "NaN"), ("Dog", "1e400"), ("Cow", "-1e400"), ("Ox", "-0.0")],
    "out of range": [("Cat", "1e30"), ("Dog", "-5"), ("Cow", "100.0000001")],
    "a label of a megabyte": [("x" * 1_000_000, "99"), ("Cat", "98")],
    "both directions at once": [(BIDI, "99"), (f"Cat{BIDI}", "98")],
    "line breaks and escapes": [
        ("a\r\nb\x1b[31m", "99"),
        ("a\u2028b\u2029", "96"),
        ("\0", "98"),
        (" \t", "97"),
    ],
    "the same a thousand times": [("Cat", "99")] * 1000,
    "no names": [("", "99"), (" ", "98")],
    "private and unassigned": [("\ue000\uffff\U000e0001", "99")],
}


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
)
def shared_stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with standing(request) as stand:
        yield stand


@pytest.fixture
def stand(shared_stand: Stand) -> Stand:
    shared_stand.reset()
    return shared_stand


def rekognition_reply(labels: list[tuple[str, str]]) -> bytes:
    shown = (f'{{"Name": {json.dumps(name)}, "Confidence": {number}}}' for name, number in labels)
    return f'{{"Labels": [{", ".join(shown)}]}}'.encode()


def vision_reply(labels: list[tuple[str, str]]) -> bytes:
    annotations = [
        EntityAnnotation(description=name, score=float(number) / 100) for name, number in labels
    ]
    answer = AnnotateImageResponse(label_annotations=annotations)
    reply: bytes = BatchAnnotateImagesResponse.serialize(
        BatchAnnotateImagesResponse(responses=[answer])
    )
    return reply


REPLIES: dict[str, Callable[[list[tuple[str, str]]], bytes]] = {
    GOOGLE: vision_reply,
    AWS: rekognition_reply,
}


@pytest.mark.parametrize("labels", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("extension", [GOOGLE, AWS])
def test_hostile_labels_end_as_clean_tags(
    stand: Stand, extension: str, labels: list[tuple[str, str]]
) -> None:
    server = stand.patient
    stand.vendor(extension).emulator.reply = REPLIES[extension](labels)
    answer = upload(server, extension)
    assert answer["extensionStatus"] == {extension: "success"}
    [run] = runs_of(server, answer["fileId"])
    assert (run.status, run.attempts) == ("success", 1)
    found = server.details(answer["fileId"])["AITags"]
    assert found == answer["AITags"]
    for tag in found or []:
        assert 0 <= tag["confidence"] <= 100
        assert 0 < len(tag["name"]) <= MAX_NAME_CHARACTERS
        assert not any(unicodedata.category(c) in UNWANTED for c in tag["name"])
    assert len(found or []) <= min(30, len({name for name, _ in labels}))
    listed = server.client.get("/v1/files", params={"limit": 1, "sort": "DESC_CREATED"})
    assert listed.status_code == 200


def test_a_list_without_end_ends_in_as_many_tags_as_were_asked_for(stand: Stand) -> None:
    names = [(f"Label {number}", "99") for number in range(20_000)]
    stand.rekognition.reply = rekognition_reply(names)
    answer = upload(stand.patient, AWS)
    assert answer["extensionStatus"] == {AWS: "success"}
    assert len(answer["AITags"]) == 30


def test_hostile_labels_reach_the_webhook_as_clean_as_the_file(stand: Stand) -> None:
    """By a straggler, whose tags are recorded on another path."""
    server = stand.hasty
    with Receiver() as receiver:
        stand.rekognition.reply = rekognition_reply(
            [("Cat", "1e400"), (f"Dog{BIDI}", "98"), ("x" * 1_000_000, "97"), ("Ox", "NaN")]
        )
        stand.rekognition.hold()
        answer = upload(server, AWS, webhook_url=receiver.url)
        assert answer["extensionStatus"] == {AWS: "pending"}
        stand.rekognition.release()
        [told] = receiver.wait_for(1)
        details = wait_for_status(server, answer["fileId"], AWS, "success")
        assert told.json()["fileObject"] == details
        wait_until_final(server)
        assert len(receiver.requests) == 1
    names = [tag["name"] for tag in details["AITags"]]
    assert "Ox" not in names
    assert all(name.isprintable() and len(name) <= MAX_NAME_CHARACTERS for name in names)
