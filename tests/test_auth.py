"""Private keys over Basic auth, and the signatures and tokens of client-side uploads."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
import structlog.testing

from app.auth import upload_signature
from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests import canaries
from tests.conftest import Serve
from tests.files.helpers import (
    PICTURE,
    UPLOAD,
    accepted,
    anonymous,
    nothing_left,
    on_sqlite_only,
    post_form,
    refused,
)
from tests.files.support import wait_until
from tests.server import LoupeServer

NO_KEY = "Your request does not contain private API key."
UNKNOWN_KEY = "Your account cannot be authenticated."
INVALID_EXPIRE = (
    "Your request contains invalid expire parameter. Expire parameter should be a Unix time in "
    "less than 1 hour into the future."
)
BOTH_WAYS = (
    "Your request contains both signature and basic auth parameter. Use only one method, you "
    "might be exposing your private API key."
)
UPLOAD_V2 = "/api/v2/files/upload"
FILE = {"file": base64.b64encode(PICTURE).decode(), "fileName": "picture.jpg"}


def basic(credentials: bytes | str) -> str:
    raw = credentials if isinstance(credentials, bytes) else credentials.encode()
    return f"Basic {base64.b64encode(raw).decode()}"


def signed(
    token: str | None = None,
    expire: int | str | None = None,
    private_key: str = DEVELOPMENT_PRIVATE_KEY,
    public_key: str = DEVELOPMENT_PUBLIC_KEY,
) -> dict[str, str]:
    """The fields that a browser adds, as a customer's backend makes them."""
    token = str(uuid4()) if token is None else token
    expire = str(int(time.time()) + 1800 if expire is None else expire)
    signature = canaries.planted(upload_signature(private_key, token, expire))
    return {"publicKey": public_key, "token": token, "expire": expire, "signature": signature}


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def json_web_token(
    claims: Any,
    header: dict[str, Any] | None = None,
    private_key: str = DEVELOPMENT_PRIVATE_KEY,
) -> str:
    """HS256 over any claims and header, sound or not. claims: bytes are sent as they are."""
    head = {"alg": "HS256", "typ": "JWT", "kid": DEVELOPMENT_PUBLIC_KEY} | (header or {})
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    signed_text = f"{_base64url(json.dumps(head).encode())}.{_base64url(payload)}"
    mac = hmac.digest(private_key.encode(), signed_text.encode(), hashlib.sha256)
    return f"{signed_text}.{_base64url(mac)}"


def with_token(
    fields: dict[str, str], lasts_seconds: int = 1800, **changed_claims: Any
) -> dict[str, str]:
    """The fields and the token over them, as a customer's backend makes it."""
    now = int(time.time())
    claims = {name: value for name, value in fields.items() if name != "file"}
    times = {"iat": now, "exp": now + lasts_seconds}
    # Tests on one server may sign the same fields within one second.
    unique = {"jti": str(uuid4())}
    return fields | {"token": json_web_token(claims | times | changed_claims, unique)}


# --- Basic auth -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", UPLOAD),
        ("GET", "/v1/files"),
        ("GET", f"/v1/files/{'a' * 24}/details"),
        ("PATCH", f"/v1/files/{'a' * 24}/details"),
        ("DELETE", f"/v1/files/{'a' * 24}"),
        ("GET", "/v1/files/not-an-id/details"),
    ],
)
def test_every_endpoint_wants_a_key(shared_server: LoupeServer, method: str, path: str) -> None:
    form = {name: (None, value) for name, value in FILE.items()} if method == "POST" else None
    wrong = {"Authorization": basic("private_wrong:")}
    with anonymous(shared_server) as client, nothing_left(shared_server):
        refused(client.request(method, path, files=form), 401, NO_KEY)
        refused(client.request(method, path, files=form, headers=wrong), 403, UNKNOWN_KEY)


@pytest.mark.parametrize(
    "authorization",
    [
        basic(f"{DEVELOPMENT_PRIVATE_KEY}:"),
        basic(f"{DEVELOPMENT_PRIVATE_KEY}:do_not_set"),
        basic(f"{DEVELOPMENT_PRIVATE_KEY}:a:b"),
        f"Basic {DEVELOPMENT_PRIVATE_KEY}",
        basic(f"{DEVELOPMENT_PRIVATE_KEY}:").replace("Basic", "basic"),
    ],
)
def test_the_private_key_alone_decides(shared_server: LoupeServer, authorization: str) -> None:
    with anonymous(shared_server) as client:
        answer = client.get("/v1/files", headers={"Authorization": authorization})
    assert answer.status_code == 200
    assert isinstance(answer.json(), list)


@pytest.mark.parametrize(
    "authorization",
    [
        b"Basic !!!",
        b"Basic",
        basic("no-colon-here").encode(),
        basic(":password").encode(),
        basic(b"\xff\xfe:").encode(),
        b"Basic \xff\xfe\xfd",
        basic("private_" + "x" * 8192 + ":").encode(),
        b"Basic private_some_other_raw_key",
        f"Bearer {DEVELOPMENT_PRIVATE_KEY}".encode(),
        DEVELOPMENT_PRIVATE_KEY.encode(),
    ],
)
@pytest.mark.parametrize("path", [UPLOAD, "/v1/files"])
def test_unreadable_credentials_are_401_and_never_logged(
    shared_server: LoupeServer, path: str, authorization: bytes
) -> None:
    method = "POST" if path == UPLOAD else "GET"
    form = {name: (None, value) for name, value in FILE.items()} if method == "POST" else None
    with (
        anonymous(shared_server) as client,
        structlog.testing.capture_logs() as logs,
        nothing_left(shared_server),
    ):
        headers = {b"Authorization": authorization}
        refused(client.request(method, path, files=form, headers=headers), 401, NO_KEY)
        # A request's line is written once its answer has been sent.
        wait_until(lambda: logs, "a line")
    _, _, credentials = authorization.decode("latin-1").partition(" ")
    assert len(credentials) < 3 or credentials not in str(logs)


@pytest.mark.parametrize(
    "user",
    [
        "private_wrong",
        DEVELOPMENT_PUBLIC_KEY,
        DEVELOPMENT_PRIVATE_KEY[:-1],
        DEVELOPMENT_PRIVATE_KEY + "x",
        DEVELOPMENT_PRIVATE_KEY.upper(),
        "prïvate_ключ",
    ],
)
def test_a_wrong_key_is_403_and_stores_nothing(shared_server: LoupeServer, user: str) -> None:
    headers = {"Authorization": basic(f"{user}:")}
    with anonymous(shared_server) as client, nothing_left(shared_server):
        refused(client.get("/v1/files", headers=headers), 403, UNKNOWN_KEY)
        refused(post_form(shared_server, FILE, client=client, headers=headers), 403, UNKNOWN_KEY)


@on_sqlite_only
def test_keys_can_be_rotated(serve: Serve) -> None:
    server = serve(private_keys="private_new,private_old", public_keys="public_new,public_old")
    with anonymous(server) as client:
        for key in ("private_new", "private_old"):
            assert client.get("/v1/files", auth=(key, "")).status_code == 200
        for pair in (("private_new", "public_new"), ("private_old", "public_old")):
            fields = signed(private_key=pair[0], public_key=pair[1])
            accepted(post_form(server, FILE | fields, client=client))
        gone = client.get("/v1/files", auth=(DEVELOPMENT_PRIVATE_KEY, ""))
        refused(gone, 403, UNKNOWN_KEY)
        crossed = signed(private_key="private_new", public_key="public_old")
        refused(post_form(server, FILE | crossed, client=client), 400)


# --- signed uploads ---------------------------------------------------------------------------


def test_signature_is_as_the_contract_computes_it() -> None:
    expected = "a273e60f1b0a41b6724e2aef2b9b1db0cac430fc"
    assert upload_signature("x", "t", "1700000000") == expected


def test_signed_upload_needs_no_private_key(server: LoupeServer) -> None:
    with anonymous(server) as client:
        answer = accepted(post_form(server, FILE | signed(), client=client))
    assert server.details(answer["fileId"])["size"] == len(PICTURE)


def test_signature_fields_may_follow_the_file(shared_server: LoupeServer) -> None:
    with anonymous(shared_server) as client:
        before_file = {**signed(), **FILE}
        accepted(post_form(shared_server, before_file, client=client))
        after_file = {**FILE, **signed()}
        accepted(post_form(shared_server, after_file, client=client))


@pytest.mark.parametrize(
    "expire",
    [
        lambda now: now - 1,
        lambda now: now + 3601,
        lambda now: now + 86400,
        lambda now: 0,
        lambda now: -now,
        lambda now: 2**63,
        lambda now: "1e9",
        lambda now: f"{now + 1800}.5",
        lambda now: f" {now + 1800}",
        lambda now: f"0x{now + 1800:x}",
        lambda now: "١٧٩٥٥٠٠٠٠٠",
    ],
)
def test_expire_lies_within_the_next_hour(
    shared_server: LoupeServer, expire: Callable[[int], int | str]
) -> None:
    fields = signed(expire=expire(int(time.time())))
    with anonymous(shared_server) as client, nothing_left(shared_server):
        refused(post_form(shared_server, FILE | fields, client=client), 400, INVALID_EXPIRE)


def _sha256_signature(fields: dict[str, str]) -> str:
    message = (fields["token"] + fields["expire"]).encode()
    return hmac.new(DEVELOPMENT_PRIVATE_KEY.encode(), message, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    "forge",
    [
        lambda fields: ("0" if fields["signature"][0] != "0" else "1") + fields["signature"][1:],
        lambda fields: fields["signature"].upper() + "A",
        lambda fields: "A" * 40,
        lambda fields: fields["signature"][:-1],
        lambda fields: fields["signature"] + " ",
        lambda fields: "é" * 40,
        _sha256_signature,
        lambda fields: upload_signature("private_other", fields["token"], fields["expire"]),
        lambda fields: upload_signature(
            DEVELOPMENT_PRIVATE_KEY, fields["token"] + "x", fields["expire"]
        ),
    ],
)
def test_a_wrong_signature_is_refused_and_spares_the_token(
    shared_server: LoupeServer, forge: Callable[[dict[str, str]], str]
) -> None:
    fields = signed()
    with anonymous(shared_server) as client:
        with nothing_left(shared_server):
            forged = FILE | fields | {"signature": forge(fields)}
            message = refused(post_form(shared_server, forged, client=client), 400)
            assert "signature" in message
        accepted(post_form(shared_server, FILE | fields, client=client))


def test_an_upper_case_signature_is_refused(shared_server: LoupeServer) -> None:
    fields = signed()
    while fields["signature"].isdecimal():  # has no letter to change: once in 10^8
        fields = signed()
    fields["signature"] = fields["signature"].upper()
    with anonymous(shared_server) as client, nothing_left(shared_server):
        refused(post_form(shared_server, FILE | fields, client=client), 400)


@pytest.mark.parametrize("missing", ["publicKey", "token", "expire", "signature"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_every_signature_field_is_needed(
    shared_server: LoupeServer, missing: str, is_empty: bool
) -> None:
    fields = FILE | signed()
    if is_empty:
        fields[missing] = ""
    else:
        del fields[missing]
    with anonymous(shared_server) as client, nothing_left(shared_server):
        message = refused(post_form(shared_server, fields, client=client), 400)
    assert message == f"Your request is missing {missing} parameter."


def test_an_unknown_public_key_is_refused(shared_server: LoupeServer) -> None:
    with anonymous(shared_server) as client, nothing_left(shared_server):
        fields = signed(public_key="public_unknown")
        message = refused(post_form(shared_server, FILE | fields, client=client), 400)
    assert "publicKey" in message


def test_signature_and_private_key_together_are_refused(shared_server: LoupeServer) -> None:
    with nothing_left(shared_server):
        refused(post_form(shared_server, FILE | signed()), 400, BOTH_WAYS)


def test_a_signature_lets_nobody_read_or_delete(shared_server: LoupeServer) -> None:
    with anonymous(shared_server) as client:
        refused(client.get("/v1/files", params=signed()), 401, NO_KEY)
        refused(client.delete(f"/v1/files/{'a' * 24}", params=signed()), 401, NO_KEY)


def test_a_token_works_once_even_if_its_upload_failed(server: LoupeServer) -> None:
    fields = signed()
    with anonymous(server) as client:
        failing = {"file": FILE["file"], **fields}
        refused(post_form(server, failing, client=client), 400)
        with nothing_left(server):
            message = refused(post_form(server, FILE | fields, client=client), 400)
        assert "token" in message
        # Another expire makes another signature, but not another token.
        again = signed(token=fields["token"], expire=int(fields["expire"]) + 60)
        with nothing_left(server):
            refused(post_form(server, FILE | again, client=client), 400)


def test_a_token_works_once_also_after_a_restart(serve: Serve) -> None:
    fields = signed()
    first = serve()
    with anonymous(first) as client:
        accepted(post_form(first, FILE | fields, client=client))
    first.stop()
    second = serve()
    with anonymous(second) as client, nothing_left(second):
        refused(post_form(second, FILE | fields, client=client), 400)


def test_a_token_replayed_200_times_at_once_works_once(server: LoupeServer) -> None:
    form = {name: (None, value) for name, value in (FILE | signed()).items()}

    async def replay() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            answers = await asyncio.gather(*(client.post(UPLOAD, files=form) for _ in range(200)))
        return [answer.status_code for answer in answers]

    assert Counter(asyncio.run(replay())) == {200: 1, 400: 199}
    assert len(server.client.get("/v1/files").json()) == 1


# --- tokens -----------------------------------------------------------------------------------


def post_v2(
    server: LoupeServer, fields: dict[str, str], client: httpx.Client | None = None
) -> httpx.Response:
    """An upload without a private key, unless a client brings one."""
    form = {name: (None, value) for name, value in fields.items()}
    if client is not None:
        return client.post(UPLOAD_V2, files=form)
    with anonymous(server) as keyless:
        return keyless.post(UPLOAD_V2, files=form)


def test_an_upload_with_a_token_needs_no_private_key(server: LoupeServer) -> None:
    fields = FILE | {
        "useUniqueFileName": "false",
        "tags": "a,ü",
        "folder": "/by/token",
        "description": "line one\nline two",
    }
    answer = accepted(post_v2(server, with_token(fields)))
    details = server.details(answer["fileId"])
    assert (details["filePath"], details["tags"]) == ("/by/token/picture.jpg", ["a", "ü"])
    assert (details["size"], details["description"]) == (len(PICTURE), "line one\nline two")


@pytest.mark.parametrize("lasts_seconds", [1, 30, 3600])
def test_a_token_may_last_an_hour(shared_server: LoupeServer, lasts_seconds: int) -> None:
    issued_at = int(time.time()) + 60 - lasts_seconds  # the clocks may differ
    fields = with_token(FILE, iat=issued_at, exp=issued_at + lasts_seconds)
    accepted(post_v2(shared_server, fields))


def test_a_token_may_stand_before_the_file_and_the_file_be_binary(
    shared_server: LoupeServer,
) -> None:
    fields = with_token({"fileName": "a.jpg"})
    with anonymous(shared_server) as client:
        parts = {name: (None, value) for name, value in fields.items()}
        answer = accepted(client.post(UPLOAD_V2, files={**parts, "file": ("b.jpg", PICTURE)}))
    assert answer["size"] == len(PICTURE)


def test_a_private_key_uploads_by_the_second_version_too(shared_server: LoupeServer) -> None:
    answer = accepted(post_v2(shared_server, FILE, shared_server.client))
    assert answer["size"] == len(PICTURE)


@on_sqlite_only
def test_every_key_pair_signs_its_own_tokens(serve: Serve) -> None:
    server = serve(private_keys="private_new,private_old", public_keys="public_new,public_old")
    now = int(time.time())
    claims = {"fileName": FILE["fileName"], "iat": now, "exp": now + 60}
    for private_key, public_key, status in (
        ("private_new", "public_new", 200),
        ("private_old", "public_old", 200),
        ("private_new", "public_old", 400),
        (DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY, 400),
    ):
        token = json_web_token(claims, {"kid": public_key}, private_key)
        assert post_v2(server, FILE | {"token": token}).status_code == status
