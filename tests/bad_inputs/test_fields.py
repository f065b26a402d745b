"""Bad inputs: each gets its status and a message that says why, and leaves nothing behind.

What only one field can get wrong is tested beside that field's code; here are `extensions` and
`tags`, a sample of everything on both databases, and all types of everything.
"""

import base64
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests import pictures
from tests.emulators.receiver import Receiver
from tests.files.helpers import (
    PICTURE,
    UPLOAD,
    accepted,
    anonymous,
    form_body,
    form_part,
    nothing_left,
    patch,
    patch_raw,
    post_body,
    post_form,
    refused,
    upload,
    upload_as,
)
from tests.server import LoupeServer

GOOGLE = '{"name":"google-auto-tagging","minConfidence":50,"maxTags":5}'
AWS = GOOGLE.replace("google", "aws")


# --- extensions -------------------------------------------------------------------------------


def one(**changes: str) -> str:
    """An array of one extension, with these members written as they are; `-` leaves one out."""
    members = {"name": '"google-auto-tagging"', "minConfidence": "50", "maxTags": "5"} | changes
    shown = (f'"{key}":{value}' for key, value in members.items() if value != "-")
    return "[{" + ",".join(shown) + "}]"


EXTENSIONS: list[tuple[str, str]] = [
    ("nonsense", "JSON"),
    ("{", "JSON"),
    ("[", "JSON"),
    (f"[{GOOGLE}", "JSON"),
    (f"[{GOOGLE} {AWS}]", "JSON"),
    (f"[{GOOGLE},,]", "JSON"),
    (f"[{GOOGLE}]x", "JSON"),
    ("{}", "array"),
    (GOOGLE, "array"),
    ("1", "array"),
    ("true", "array"),
    ('"google-auto-tagging"', "array"),
    ("[1]", "extensions[0]"),
    ("[null]", "extensions[0]"),
    ("[[]]", "extensions[0]"),
    (f'[{GOOGLE},"aws-auto-tagging"]', "extensions[1]"),
    ("[{}]", "extensions[0].name"),
    (one(name="null"), "extensions[0].name"),
    (one(name="[]"), "extensions[0].name"),
    (one(name='{"a":1}'), "extensions[0].name"),
    (one(name='"remove-bg"'), "google-auto-tagging, aws-auto-tagging"),
    (one(name='"Google-Auto-Tagging"'), "google-auto-tagging, aws-auto-tagging"),
    (f"[{GOOGLE},{AWS},{GOOGLE}]", "extensions[2].name"),
    (one(maxTags="-"), "extensions[0].maxTags"),
    (one(maxTags="-1"), "extensions[0].maxTags"),
    (one(maxTags="31"), "extensions[0].maxTags"),
    (one(maxTags="5.5"), "extensions[0].maxTags"),
    (one(maxTags="1e309"), "extensions[0].maxTags"),
    (one(maxTags="-1e309"), "extensions[0].maxTags"),
    (one(maxTags="1" + "0" * 400), "extensions[0].maxTags"),
    (one(maxTags="1" + "0" * 5000), "JSON"),
    (one(maxTags='"5"'), "extensions[0].maxTags"),
    (one(maxTags="true"), "extensions[0].maxTags"),
    (one(maxTags="null"), "extensions[0].maxTags"),
    (one(maxTags="[5]"), "extensions[0].maxTags"),
    (one(minConfidence="-"), "extensions[0].minConfidence"),
    (one(minConfidence="101"), "extensions[0].minConfidence"),
    (one(minConfidence="100.01"), "extensions[0].minConfidence"),
    (one(minConfidence="-0.1"), "extensions[0].minConfidence"),
    (one(minConfidence="NaN"), "NaN"),
    (one(minConfidence="Infinity"), "Infinity"),
    (one(minConfidence="1e400"), "extensions[0].minConfidence"),
    (one(minConfidence="1" + "0" * 400), "extensions[0].minConfidence"),
    (one(minConfidence='"50"'), "extensions[0].minConfidence"),
    (one(minConfidence="false"), "extensions[0].minConfidence"),
    (one(minConfidence="null"), "extensions[0].minConfidence"),
    (one(MaxTags="5"), "extensions[0].MaxTags"),
    (one(options="{}"), "extensions[0].options"),
    ('[{"name":"google-auto-tagging","name":"aws-auto-tagging"}]', "twice"),
    (one(**{"a\\ud800b": "1"}), "surrogate"),
    ("[" + ",".join(["0"] * 11) + "]", "10"),
    ("[" + ",".join(["0"] * 30_000) + "]", "10"),
    ("[" + ",".join(["0"] * 100_000) + "]", "extensions"),
    ("[" * 10_000, "deep"),
    ("[" * 10_000 + "]" * 10_000, "deep"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "deep"),
    ("[[[[[[[[[1]]]]]]]]]", "deep"),
    ('["' + '\\"' * 30_000, "JSON"),
    ("[" + "," * 60_000, "JSON"),
    ("\0", "JSON"),
    ("\ufeff[]", "JSON"),
]


@pytest.mark.parametrize(("value", "named"), EXTENSIONS, ids=lambda value: repr(value)[:50])
def test_bad_extensions_are_400_and_name_the_element_and_the_field(
    shared_server: LoupeServer, value: str, named: str
) -> None:
    with nothing_left(shared_server):
        message = refused(shared_server.upload(PICTURE, extensions=value), 400)
    assert "extensions" in message
    assert named in message


@pytest.mark.parametrize(("value", "named"), EXTENSIONS, ids=lambda value: repr(value)[:50])
def test_bad_extensions_of_an_update_are_400_too(
    shared_server: LoupeServer, value: str, named: str
) -> None:
    file_id = upload(shared_server)["fileId"]
    body = b'{"tags": ["new"], "extensions": ' + value.encode() + b"}"
    with nothing_left(shared_server):
        refused(patch_raw(shared_server, file_id, body), 400)
    assert shared_server.details(file_id)["tags"] is None


# --- tags -------------------------------------------------------------------------------------

TOO_LONG = (
    "Your request contains invalid value for tags parameter. "
    "Combined length of all tags should be less than or equal to 500."
)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("x" * 501, TOO_LONG),
        (",".join(["x" * 100] * 6), TOO_LONG),
        (",".join(f"{n}" for n in range(1000)), TOO_LONG),
        (",".join(["a"] * 1000), TOO_LONG),
        (json.dumps([f"{n}" for n in range(1000)]), TOO_LONG),
        ("50%", None),
        ("a,b%20c", None),
        ("a\0b", None),
        ("a\r\nb", None),
        ("a\x1b[31m", None),
        ("a\x85b", None),
        ('["a%"]', None),
        ('["\\u0000"]', None),
        ('["\\ud800"]', None),
        ('["a", 1]', None),
        ('["a", null]', None),
        ('["a", ["b"]]', None),
        ('["a"', None),
        ("[" * 10_000, None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_tags_are_400(shared_server: LoupeServer, tags: str, message: str | None) -> None:
    with nothing_left(shared_server):
        said = refused(shared_server.upload(PICTURE, tags=tags), 400, message)
    assert "tags" in said


# --- both databases ---------------------------------------------------------------------------

Attempt = Callable[[LoupeServer, httpx.Client], httpx.Response]
FILE = {"file": base64.b64encode(PICTURE).decode(), "fileName": "a.jpg"}
FORBIDDEN = "Basic " + base64.b64encode(b"private_unknown:").decode()


def _form(**changes: str) -> Attempt:
    return lambda server, client: post_form(server, FILE | changes)


def _headers(authorization: str) -> Attempt:
    return lambda server, client: client.post(
        UPLOAD,
        files={name: (None, value) for name, value in FILE.items()},
        headers={"Authorization": authorization},
    )


SAMPLES: dict[str, tuple[int, Attempt]] = {
    "no key": (401, lambda server, client: post_form(server, FILE, client=client)),
    "unreadable key": (401, _headers("Basic !!!")),
    "unknown key": (403, _headers(FORBIDDEN)),
    "bad signature": (
        400,
        lambda server, client: post_form(
            server,
            FILE | {"publicKey": "p", "token": "t", "expire": "1", "signature": "s"},
            client=client,
        ),
    ),
    "empty file": (400, _form(file="")),
    "no file name": (400, _form(fileName="..")),
    "bad base64": (400, _form(file="QQ")),
    "local file": (400, _form(file="file:///etc/passwd")),
    "metadata service": (400, _form(file="http://169.254.169.254/latest")),
    "bad folder": (400, _form(folder="/a/../../b")),
    "deep folder": (400, _form(folder="/d" * 51)),
    "long name": (400, _form(fileName="x" * 256)),
    "NUL in tags": (400, _form(tags="a\0")),
    "NUL in description": (400, _form(description="a\0")),
    "bad extensions": (400, _form(extensions="[{}]")),
    "bad webhook": (400, _form(webhookUrl="ftp://example.com")),
    "custom metadata": (400, _form(customMetadata='{"\\u0000":1}')),
    "transformation": (400, _form(transformation="{}")),
    "checks": (400, _form(checks='"a" = "b"')),
    "broken form": (400, lambda server, client: post_body(server, form_body()[:-3])),
    "pixels": (
        400,
        lambda server, client: server.upload(pictures.png_of_size(50_000, 50_000)),
    ),
    "bad file id": (400, lambda server, client: server.client.delete("/v1/files/%00")),
    "unknown file": (404, lambda server, client: patch(server, "f" * 24, {"tags": ["a"]})),
}


def test_a_sample_of_everything_leaves_nothing_on_either_database(server: LoupeServer) -> None:
    with Receiver() as remote, anonymous(server) as client:
        for what, (status, attempt) in SAMPLES.items():
            with nothing_left(server, remote):
                answer = attempt(server, client)
                assert answer.status_code == status, f"{what}: {answer.text}"
                refused(answer, status)


ODD_JSON: list[Any] = [
    None,
    True,
    0,
    -1.5,
    10**400,
    "",
    "x",
    "a\0b",
    "💥\u202e",
    [],
    [None],
    ["a\0"],
    [[]],
    {},
    {"": None},
    {"a\0": "b"},
    {"isPublished": None},
]


def test_no_value_of_any_type_is_a_500(server: LoupeServer) -> None:
    file_id = upload_as(server, "a.jpg")["fileId"]
    keys = (
        "tags",
        "removeAITags",
        "extensions",
        "webhookUrl",
        "customCoordinates",
        "customMetadata",
        "description",
        "publish",
        "unknown",
    )
    for key, value in itertools.product(keys, ODD_JSON):
        answer = patch(server, file_id, {key: value})
        assert answer.status_code in (200, 400), f"{key}={value!r}: {answer.text}"
        server.details(file_id)


ODD_TEXT = ["", " ", "\0", "\r\n", "null", "[]", "{}", "[null]", "1e999", "💥", "x" * 60_000]


def test_no_text_in_any_field_is_a_500(server: LoupeServer) -> None:
    fields = (
        "fileName",
        "folder",
        "tags",
        "useUniqueFileName",
        "isPrivateFile",
        "isPublished",
        "customCoordinates",
        "responseFields",
        "extensions",
        "webhookUrl",
        "overwriteFile",
        "overwriteAITags",
        "overwriteTags",
        "overwriteCustomMetadata",
        "customMetadata",
        "description",
        "transformation",
        "checks",
        "unknown",
        "token",
        "signature",
    )
    for field, text in itertools.product(fields, ODD_TEXT):
        parts = {"fileName": "a.txt"} | {field: text}
        body = form_body(
            form_part("file", b"content", "a.txt"),
            *(form_part(name, value.encode()) for name, value in parts.items()),
        )
        answer = post_body(server, body)
        assert answer.status_code in (200, 400), f"{field}={text[:20]!r}: {answer.text}"
    listed = accepted_list(server)
    assert all(server.details(file["fileId"]) == file for file in listed[:5])


def accepted_list(server: LoupeServer) -> list[dict[str, Any]]:
    answer = server.client.get("/v1/files")
    assert answer.status_code == 200
    listed: list[dict[str, Any]] = answer.json()
    return listed


def test_log_lines_and_headers_are_never_split(shared_server: LoupeServer) -> None:
    """CR and LF in a name, and the name in the path of a request."""
    name = "a\r\nX-Evil: 1\r\n\r\n.jpg"
    answer = accepted(shared_server.upload(PICTURE, "a.jpg", fileName=name))
    assert "\r" not in answer["name"]
    assert "\n" not in answer["url"]
    delivered = shared_server.client.get(answer["url"], params={"ik-attachment": "true"})
    assert "x-evil" not in delivered.headers
    refused(shared_server.client.get("/v1/files/a%0d%0aX-Evil:%201/details"), 400)
