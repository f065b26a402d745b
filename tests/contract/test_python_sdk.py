"""ImageKit's official Python SDK, unchanged but for its base URL, validating strictly.

Its models are lenient otherwise: a wrong type would only be seen by whoever uses the value.
"""

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from imagekitio import (
    APIStatusError,
    AsyncImageKit,
    AuthenticationError,
    BadRequestError,
    ImageKit,
    NotFoundError,
    PermissionDeniedError,
)
from imagekitio._types import FileTypes
from imagekitio.types import File
from imagekitio.types.shared_params import Extensions
from standardwebhooks import WebhookVerificationError

from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests import pictures
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.server import LoupeServer

Connect = Callable[..., "Sdk"]

BOTH: Extensions = [
    {"name": "google-auto-tagging", "min_confidence": 50, "max_tags": 5},
    {"name": "aws-auto-tagging", "min_confidence": 98, "max_tags": 5},
]
BOTH_TAGGED = [
    ("aws-auto-tagging", "Cat", 98.5),
    ("google-auto-tagging", "Cat", 98.5),
    ("google-auto-tagging", "Animal", 97.25),
]
PROVIDERS = {"google_auto_tagging": "vision", "aws_auto_tagging": "rekognition"}


class Sdk(ImageKit):
    """The SDK as its users have it, and how many requests it made."""

    def __init__(self, server: LoupeServer, private_key: str = DEVELOPMENT_PRIVATE_KEY) -> None:
        self.request_count = 0
        super().__init__(
            private_key=private_key,
            base_url=server.url,
            webhook_secret=server.resources.keys.webhook_secret,
            http_client=httpx.Client(event_hooks={"request": [self._count]}),
            _strict_response_validation=True,
        )

    def _count(self, _: httpx.Request) -> None:
        self.request_count += 1


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as closing:
        yield lambda *args: closing.enter_context(Sdk(*args))


@pytest.fixture
def sdk(server: LoupeServer, connect: Connect) -> Sdk:
    """Speaks to a server of the test's own, once on each database."""
    return connect(server)


@pytest.fixture
def shared_sdk(shared_server: LoupeServer, connect: Connect) -> Sdk:
    """Speaks to the server that tests share."""
    return connect(shared_server)


def bytes_of(url: str | None) -> bytes:
    assert url is not None
    answer = httpx.get(url, verify=False)
    assert answer.status_code == 200, answer.text
    return answer.content


def some_id(value: str | None) -> str:
    assert value is not None
    return value


def tagged(tags: Any) -> list[tuple[str, str, float]]:
    return [(tag.source, tag.name, tag.confidence) for tag in tags or []]


def as_bytes(_: Path) -> FileTypes:
    return pictures.jpeg()


def as_named_bytes(_: Path) -> FileTypes:
    return ("other.png", pictures.jpeg())


def as_typed_bytes(_: Path) -> FileTypes:
    return ("other.html", pictures.jpeg(), "text/html")


def as_open_file(_: Path) -> FileTypes:
    return io.BytesIO(pictures.jpeg())


def as_path(folder: Path) -> FileTypes:
    path = folder / "on-disk.bin"
    path.write_bytes(pictures.jpeg())
    return path


@pytest.mark.parametrize("file", [as_bytes, as_named_bytes, as_typed_bytes, as_open_file, as_path])
def test_upload_takes_every_kind_of_file(
    shared_sdk: Sdk, tmp_path: Path, file: Callable[[Path], FileTypes]
) -> None:
    answer = shared_sdk.files.upload(file=file(tmp_path), file_name="cat.jpg")
    assert answer.file_type == "image"
    assert (answer.width, answer.height) == (240, 160)
    assert answer.name is not None
    assert answer.name.startswith("cat_")
    assert answer.name.endswith(".jpg")
    assert answer.ai_tags is None
    assert answer.extension_status is None
    assert bytes_of(answer.url) == pictures.jpeg()
    assert bytes_of(answer.thumbnail_url)


def test_upload_takes_every_field_and_answers_what_was_asked_for(sdk: Sdk) -> None:
    answer = sdk.files.upload(
        file=pictures.jpeg(),
        file_name="cat.jpg",
        use_unique_file_name=False,
        folder="/pets/cats",
        tags=["cat", "tabby"],
        custom_coordinates="1,2,30,40",
        custom_metadata={},
        description="A cat.",
        is_private_file=True,
        is_published=True,
        overwrite_file=True,
        overwrite_ai_tags=False,
        overwrite_tags=False,
        overwrite_custom_metadata=False,
        response_fields=[
            "tags",
            "customCoordinates",
            "isPrivateFile",
            "isPublished",
            "customMetadata",
            "metadata",
            "embeddedMetadata",
            "selectedFieldsSchema",
        ],
    )
    assert answer.file_path == "/pets/cats/cat.jpg"
    assert answer.tags == ["cat", "tabby"]
    assert answer.custom_coordinates == "1,2,30,40"
    assert answer.custom_metadata == {}
    assert answer.description == "A cat."
    assert (answer.is_private_file, answer.is_published) == (True, True)
    assert answer.version_info is not None
    assert (answer.version_info.id, answer.version_info.name) == (answer.file_id, "Version 1")


def test_upload_to_the_same_path_is_a_second_version(sdk: Sdk) -> None:
    first = sdk.files.upload(file=b"one", file_name="a.txt", use_unique_file_name=False)
    second = sdk.files.upload(file=b"two", file_name="a.txt", use_unique_file_name=False)
    assert second.file_id == first.file_id
    assert second.version_info is not None
    assert second.version_info.name == "Version 2"
    assert bytes_of(second.url) == b"two"


def test_upload_understands_extensions_as_the_sdk_types_and_sends_them(
    serve: Serve, connect: Connect, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    sdk = connect(serve(**PROVIDERS))
    answer = sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg", extensions=BOTH)
    assert answer.extension_status is not None
    assert answer.extension_status.google_auto_tagging == "success"
    assert answer.extension_status.aws_auto_tagging == "success"
    assert tagged(answer.ai_tags) == BOTH_TAGGED


def test_update_understands_extensions_and_removes_tags_before_them(
    serve: Serve, connect: Connect, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    sdk = connect(serve(**PROVIDERS))
    file_id = some_id(
        sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg", extensions=BOTH).file_id
    )
    rekognition.labels = [("Tiger", 99.0)]
    answer = sdk.files.update(file_id, remove_ai_tags="all", extensions=BOTH[1:])
    assert answer.extension_status is not None
    assert answer.extension_status.aws_auto_tagging == "success"
    assert answer.extension_status.google_auto_tagging is None
    assert tagged(answer.ai_tags) == [("aws-auto-tagging", "Tiger", 99.0)]
    assert tagged(sdk.files.get(file_id).ai_tags) == tagged(answer.ai_tags)


def test_update_changes_what_is_sent_and_unsets_by_null(sdk: Sdk) -> None:
    file_id = some_id(sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg").file_id)
    changed = sdk.files.update(
        file_id,
        tags=["one", "two"],
        custom_coordinates="1,2,3,4",
        custom_metadata={},
        description="Now described.",
        remove_ai_tags=["Nothing"],
    )
    assert changed.tags == ["one", "two"]
    assert changed.custom_coordinates == "1,2,3,4"
    assert changed.description == "Now described."
    unset = sdk.files.update(file_id, tags=None, custom_coordinates=None)
    assert (unset.tags, unset.custom_coordinates) == (None, None)
    assert unset.description == "Now described."


def test_update_unpublishes_and_publishes(sdk: Sdk) -> None:
    answer = sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg")
    file_id = some_id(answer.file_id)
    draft = sdk.files.update(file_id, publish={"is_published": False})
    assert draft.is_published is False
    assert httpx.get(some_id(answer.url)).status_code == 404
    again = sdk.files.update(file_id, publish={"is_published": True, "include_file_versions": True})
    assert again.is_published is True
    assert bytes_of(answer.url) == pictures.jpeg()


def test_get_answers_the_whole_file_object(shared_sdk: Sdk) -> None:
    uploaded = shared_sdk.files.upload(file=pictures.alpha_png(), file_name="cat.png", tags=["cat"])
    file = shared_sdk.files.get(some_id(uploaded.file_id))
    assert (file.file_id, file.name, file.file_path) == (
        uploaded.file_id,
        uploaded.name,
        uploaded.file_path,
    )
    assert (file.type, file.file_type, file.mime) == ("file", "image", "image/png")
    assert (file.width, file.height, file.has_alpha) == (240, 160, True)
    assert (file.tags, file.custom_metadata) == (["cat"], {})
    assert (file.is_private_file, file.is_published) == (False, True)
    assert file.size == len(pictures.alpha_png())
    assert file.created_at is not None
    assert abs(file.created_at.timestamp() - time.time()) < 300
    assert bytes_of(file.url) == pictures.alpha_png()
    assert bytes_of(file.thumbnail)


def test_list_filters_sorts_and_pages(sdk: Sdk) -> None:
    for name in ("b.jpg", "a.jpg", "c.jpg"):
        sdk.files.upload(
            file=pictures.jpeg(), file_name=name, folder="/pets", use_unique_file_name=False
        )
    sdk.files.upload(file=b"words", file_name="d.txt", folder="/pets")
    page = sdk.assets.list(
        path="/pets/", file_type="image", sort="DESC_NAME", skip=1, limit=2, type="file"
    )
    assert all(isinstance(file, File) for file in page)
    assert [file.name for file in page] == ["b.jpg", "a.jpg"]
    assert len(sdk.assets.list()) == 4


def test_delete_is_final(sdk: Sdk) -> None:
    answer = sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg")
    file_id = some_id(answer.file_id)
    sdk.files.delete(file_id)
    with pytest.raises(NotFoundError) as caught:
        sdk.files.get(file_id)
    assert message_of(caught.value) == "The requested file does not exist."
    assert httpx.get(some_id(answer.url)).status_code == 404


def message_of(error: APIStatusError) -> str:
    assert isinstance(error.body, dict)
    assert set(error.body) >= {"message", "help"}
    assert str(error.body["message"]) in error.message
    return str(error.body["message"])


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            BadRequestError,
            lambda sdk: sdk.files.get("not-an-id"),
            "Your request contains invalid fileId parameter.",
        ),
        (
            NotFoundError,
            lambda sdk: sdk.files.update("0" * 24, tags=["a"]),
            "The requested file does not exist.",
        ),
        (
            BadRequestError,
            lambda sdk: sdk.files.upload(file=b"", file_name="a.jpg"),
            "Your request is missing file parameter.",
        ),
        (
            BadRequestError,
            lambda sdk: sdk.files.upload(
                file=b"a",
                file_name="a.jpg",
                extensions=[{"name": "aws-auto-tagging", "min_confidence": 5, "max_tags": 31}],
            ),
            "extensions[0].max",
        ),
        (
            BadRequestError,
            lambda sdk: sdk.assets.list(limit=2000),
            "Maximum value of limit parameter is 1000. Value sent is 2000.",
        ),
        (
            NotFoundError,
            lambda sdk: sdk.custom_metadata_fields.list(),
            "The requested URL does not exist.",
        ),
    ],
)
def test_a_refusal_is_an_exception_with_its_message_and_is_not_tried_again(
    shared_sdk: Sdk, kind: type[APIStatusError], call: Callable[[ImageKit], Any], message: str
) -> None:
    with pytest.raises(kind) as caught:
        call(shared_sdk)
    assert message in message_of(caught.value)
    assert shared_sdk.request_count == 1


@pytest.mark.parametrize("size_bytes", [2_000, 3_000_000])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_file_that_is_too_large_is_an_exception_and_is_not_sent_again(
    serve: Serve, connect: Connect, size_bytes: int
) -> None:
    sdk = connect(serve(max_upload_bytes=1_999))
    with pytest.raises(APIStatusError) as caught:
        sdk.files.upload(file=bytes(size_bytes), file_name="a.jpg")
    assert caught.value.status_code == 413
    assert "The file size exceeds limits." in message_of(caught.value)
    assert sdk.request_count == 1


def test_a_wrong_key_is_an_exception(shared_server: LoupeServer, connect: Connect) -> None:
    sdk = connect(shared_server, "private_wrong")
    with pytest.raises(PermissionDeniedError, match="cannot be authenticated"):
        sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg")
    with pytest.raises(PermissionDeniedError, match="cannot be authenticated"):
        sdk.assets.list()
    assert sdk.request_count == 2
    with pytest.raises(AuthenticationError, match="does not contain private API key"):
        connect(shared_server).assets.list(extra_headers={"Authorization": "Basic !!!"})


def test_unwrap_verifies_and_reads_both_kinds_of_webhook(
    serve: Serve, connect: Connect, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    sdk = connect(serve(**PROVIDERS, sync_budget_seconds=0.05))
    for emulator in (vision, rekognition):
        emulator.hold()
    rekognition.fault = "image_rejected"
    with Receiver() as receiver:
        answer = sdk.files.upload(
            file=pictures.jpeg(), file_name="cat.jpg", extensions=BOTH, webhook_url=receiver.url
        )
        assert answer.extension_status is not None
        assert answer.extension_status.google_auto_tagging == "pending"
        assert answer.extension_status.aws_auto_tagging == "pending"
        for emulator in (vision, rekognition):
            emulator.release()
        received = receiver.wait_for(2)
    events = {}
    for request in received:
        body = request.body.decode()
        event = sdk.webhooks.unwrap(body, headers=request.headers)
        assert event.to_dict() == json.loads(body)
        events[getattr(event, "service")] = event.to_dict()  # noqa: B009
        with pytest.raises(WebhookVerificationError):
            sdk.webhooks.unwrap(body.replace("auto", "otto"), headers=request.headers)
        with pytest.raises(WebhookVerificationError):
            sdk.webhooks.unwrap(body, headers=request.headers, key="whsec_other")
    assert_events(events, some_id(answer.file_id))


def assert_events(events: dict[str, dict[str, Any]], file_id: str) -> None:
    success, failure = events["google-auto-tagging"], events["aws-auto-tagging"]
    assert set(success) == {"service", "status", "fileObject"}
    assert success["status"] == "SUCCESS"
    file = File.model_validate(success["fileObject"])
    assert file.file_id == file_id
    assert tagged(file.ai_tags) == BOTH_TAGGED[1:]
    assert set(failure) == {"service", "status", "fileId", "error"}
    assert (failure["status"], failure["fileId"]) == ("FAILURE", file_id)
    assert set(failure["error"]) == {"message", "reason"}


def test_authentication_parameters_let_a_browser_upload_once(server: LoupeServer, sdk: Sdk) -> None:
    fields = {
        "fileName": "cat.jpg",
        "publicKey": DEVELOPMENT_PUBLIC_KEY,
        **{k: str(v) for k, v in sdk.helper.get_authentication_parameters().items()},
    }
    with httpx.Client() as browser:
        url, files = f"{server.url}/api/v1/files/upload", {"file": pictures.jpeg()}
        first = browser.post(url, data=fields, files=files)
        second = browser.post(url, data=fields, files=files)
    assert first.status_code == 200, first.text
    assert first.json()["fileType"] == "image"
    assert second.status_code == 400
    assert set(second.json()) == {"message", "help"}


def test_authentication_parameters_of_another_key_are_refused(
    shared_server: LoupeServer, connect: Connect
) -> None:
    parameters = connect(shared_server, "private_wrong").helper.get_authentication_parameters()
    answer = httpx.post(
        f"{shared_server.url}/api/v1/files/upload",
        data={"fileName": "a.jpg", "publicKey": DEVELOPMENT_PUBLIC_KEY, **parameters},
        files={"file": b"a"},
    )
    assert answer.status_code == 400
    assert "signature" in answer.json()["message"]


@pytest.mark.parametrize("expires_in", [None, 60])
@pytest.mark.parametrize("name", ["cat.jpg", "Ünï cødé 猫.jpg", "a b%20c.jpg"])
def test_a_url_that_the_sdk_signs_opens_a_private_file(
    shared_server: LoupeServer, shared_sdk: Sdk, name: str, expires_in: float | None
) -> None:
    answer = shared_sdk.files.upload(
        file=pictures.jpeg(), file_name=name, folder="/é è", is_private_file=True
    )
    endpoint = f"{shared_server.url}/demo"
    signed = {"signed": True} if expires_in is None else {"expires_in": expires_in}
    for src in (some_id(answer.file_path), some_id(answer.url)):
        options: Any = {"src": src, "url_endpoint": endpoint, **signed}
        assert bytes_of(shared_sdk.helper.build_url(**options)) == pictures.jpeg()
    assert httpx.get(some_id(answer.url)).status_code == 401


@pytest.mark.parametrize("position", ["path", "query"])
def test_a_thumbnail_url_that_the_sdk_builds_opens(
    shared_server: LoupeServer, shared_sdk: Sdk, position: Any
) -> None:
    answer = shared_sdk.files.upload(
        file=pictures.jpeg(640, 480), file_name="cat.jpg", folder="/a/b"
    )
    url = shared_sdk.helper.build_url(
        src=some_id(answer.file_path),
        url_endpoint=f"{shared_server.url}/demo",
        transformation=[{"named": "ik_ml_thumbnail"}],
        transformation_position=position,
    )
    assert 0 < len(bytes_of(url)) < len(pictures.jpeg(640, 480))


def test_the_asynchronous_client_works_too(server: LoupeServer) -> None:
    async def use() -> None:
        async with AsyncImageKit(
            private_key=DEVELOPMENT_PRIVATE_KEY,
            base_url=server.url,
            _strict_response_validation=True,
        ) as sdk:
            uploaded = await sdk.files.upload(file=pictures.jpeg(), file_name="cat.jpg")
            file_id = some_id(uploaded.file_id)
            assert (await sdk.files.update(file_id, tags=["a"])).tags == ["a"]
            assert (await sdk.files.get(file_id)).tags == ["a"]
            assert len(await sdk.assets.list()) == 1
            await sdk.files.delete(file_id)
            assert await sdk.assets.list() == []

    server.run(use())


def test_a_path_in_the_base_url_is_kept_by_the_sdk_and_gets_an_error_it_understands(
    shared_server: LoupeServer,
) -> None:
    base_url = f"{shared_server.url}/elsewhere"
    with (
        ImageKit(private_key=DEVELOPMENT_PRIVATE_KEY, base_url=base_url) as shared_sdk,
        pytest.raises(APIStatusError) as caught,
    ):
        shared_sdk.files.upload(file=b"a", file_name="a.txt")
    assert caught.value.status_code in (404, 405)
    assert message_of(caught.value)


class LosesTheFirstAnswer(httpx.HTTPTransport):
    """A line that is cut when the server has answered; keys: of the requests that went out."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str | None] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        self.keys.append(request.headers.get("idempotency-key"))
        if len(self.keys) == 1:
            answer.read()
            answer.close()
            raise httpx.ReadError("the line was cut", request=request)
        return answer


@pytest.mark.parametrize("key", ["one upload", None])
def test_a_retry_of_the_sdk_stores_one_file_if_it_was_given_a_key(
    server: LoupeServer, key: str | None
) -> None:
    """The SDK retries by itself, but sends no key of its own."""
    line = LosesTheFirstAnswer()
    headers = {} if key is None else {"Idempotency-Key": key}
    with ImageKit(
        private_key=DEVELOPMENT_PRIVATE_KEY,
        base_url=server.url,
        http_client=httpx.Client(transport=line),
        _strict_response_validation=True,
    ) as sdk:
        answer = sdk.files.upload(
            file=pictures.jpeg(), file_name="cat.jpg", tags=["a"], extra_headers=headers
        )
        assert line.keys == [key, key]
        listed = server.client.get("/v1/files").json()
    assert answer.file_id in [file["fileId"] for file in listed]
    assert len(listed) == (2 if key is None else 1)


def test_the_second_version_of_upload_takes_a_private_key_too(shared_sdk: Sdk) -> None:
    answer = shared_sdk.beta.v2.files.upload(
        file=pictures.jpeg(), file_name="cat.jpg", tags=["cat"], response_fields=["tags"]
    )
    assert (answer.file_type, answer.tags) == ("image", ["cat"])
    assert bytes_of(answer.url) == pictures.jpeg()
