"""Client-side uploads that try to pass for what nobody signed, or to pass twice."""

import asyncio
import base64
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from app import auth
from app.auth import Authenticator
from app.keys import KeyPair, Keys
from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.files.helpers import (
    UPLOAD,
    accepted,
    anonymous,
    nothing_left,
    on_sqlite_only,
    post_form,
    refused,
)
from tests.server import LoupeServer
from tests.test_auth import (
    FILE,
    UPLOAD_V2,
    basic,
    json_web_token,
    post_v2,
    signed,
    with_token,
)

INVALID_TOKEN = "Your request has invalid token."
EXPIRED_TOKEN = "Your request contains expired token."
MISSING_TOKEN = "Your request is missing token parameter."
OTHER_PAYLOAD = (
    "Your request contains invalid payload. It does not match with the payload used to generate "
    "token."
)
TOKEN_AND_KEY = (
    "Your request contains both token and basic auth parameter. Use only one method, you might be "
    "exposing your private API key."
)

Now = int
Claims = dict[str, Any]


# --- private keys -----------------------------------------------------------------------------


def test_every_key_that_is_tried_costs_the_same_comparisons(
    monkeypatch: pytest.MonkeyPatch, shared_server: LoupeServer
) -> None:
    """Of digests of one length, with every key that there is: none is told by the time it takes."""
    pairs = tuple(KeyPair(f"public_{n}", f"private_{n}") for n in range(5))
    keys = Keys(pairs, "test", "whsec_of_the_test", "test")
    authenticator = Authenticator(keys, shared_server.resources.db)
    compared: list[tuple[int, int]] = []
    compare_digest = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare_digest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    costs = []
    for user in ("private_0", "private_4", "private_", "private_unknown", "x" * 500):
        try:
            authenticator.require_private_key(basic(f"{user}:"))
        except auth.UnknownKey:
            assert user not in ("private_0", "private_4")
        costs.append(compared.copy())
        compared.clear()
    assert costs == [[(32, 32)] * 10] * 5


# --- signatures (v1) --------------------------------------------------------------------------


def replay(server: LoupeServer, path: str, fields: dict[str, str], times: int) -> Counter[int]:
    """How so many uploads of the same form at the same time were answered."""
    form = {name: (None, value) for name, value in fields.items()}

    async def send_all() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            answers = await asyncio.gather(*(client.post(path, files=form) for _ in range(times)))
        return [answer.status_code for answer in answers]

    return Counter(asyncio.run(send_all()))


@pytest.mark.parametrize("path", [UPLOAD, UPLOAD_V2], ids=["signature", "token"])
def test_what_is_replayed_200_times_at_once_works_once_and_never_after_a_restart(
    serve: Serve, path: str
) -> None:
    server = serve()
    fields = FILE | signed() if path == UPLOAD else with_token(FILE)
    assert replay(server, path, fields, 200) == {200: 1, 400: 199}
    assert len(server.client.get("/v1/files").json()) == 1
    server.stop()
    restarted = serve()
    with nothing_left(restarted):
        assert replay(restarted, path, fields, 20) == {400: 20}


@pytest.mark.parametrize("zeros", ["0", "00"])
def test_a_used_signature_cannot_be_split_in_another_place(
    shared_server: LoupeServer, zeros: str
) -> None:
    """Token and expiry are signed without anything between them."""
    fields = signed(token=f"{time.monotonic_ns()}{zeros}")
    with anonymous(shared_server) as client:
        accepted(post_form(shared_server, FILE | fields, client=client))
        moved = fields | {
            "token": fields["token"].removesuffix(zeros),
            "expire": zeros + fields["expire"],
        }
        with nothing_left(shared_server):
            message = refused(post_form(shared_server, FILE | moved, client=client), 400)
    assert "expire" in message


@pytest.mark.parametrize("token", ["", "x" * 1001, "\0", "?"])
def test_an_odd_token_is_400_or_used_up_like_any_other(
    shared_server: LoupeServer, token: str
) -> None:
    fields = FILE | signed(token=token)
    with anonymous(shared_server) as client:
        first = post_form(shared_server, fields, client=client)
        assert first.status_code in (200, 400)
        with nothing_left(shared_server):
            refused(post_form(shared_server, fields, client=client), 400)


# --- tokens (v2) ------------------------------------------------------------------------------


def refused_token(server: LoupeServer, fields: dict[str, str], message: str) -> None:
    with nothing_left(server):
        refused(post_v2(server, fields), 400, message)


def claims(**changes: Any) -> Claims:
    now = int(time.time())
    return {"fileName": FILE["fileName"], "iat": now, "exp": now + 600} | changes


def unsigned(algorithm: str) -> str:
    token = json_web_token(claims(), {"alg": algorithm})
    return token.rpartition(".")[0] + "."


def rs256() -> str:
    """Signed by a key pair of the client's own."""
    key = rsa.generate_private_key(65537, 2048)
    text = json_web_token(claims(), {"alg": "RS256"}).rpartition(".")[0]
    signature = key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def with_another_mac(digest: str) -> str:
    text = json_web_token(claims(), {"alg": f"HS{digest[3:]}"}).rpartition(".")[0]
    mac = hmac.digest(DEVELOPMENT_PRIVATE_KEY.encode(), text.encode(), digest)
    return f"{text}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def signed_with_the_public_key() -> str:
    return json_web_token(claims(), private_key=DEVELOPMENT_PUBLIC_KEY)


def with_the_payload_of_another() -> str:
    header, _, mac = json_web_token(claims(fileName="other.jpg")).split(".")
    return ".".join((header, json_web_token(claims()).split(".")[1], mac))


FORGERIES: dict[str, Callable[[], str]] = {
    "alg none": lambda: unsigned("none"),
    "alg None": lambda: unsigned("None"),
    "alg NONE with a signature": lambda: json_web_token(claims(), {"alg": "NONE"}),
    "no signature": lambda: unsigned("HS256"),
    "lower case alg": lambda: json_web_token(claims(), {"alg": "hs256"}),
    "no alg": lambda: json_web_token(claims(), {"alg": None}),
    "alg of another type": lambda: json_web_token(claims(), {"alg": ["HS256"]}),
    "RS256": rs256,
    "HS384": lambda: with_another_mac("sha384"),
    "HS512": lambda: with_another_mac("sha512"),
    "unknown kid": lambda: json_web_token(claims(), {"kid": "public_unknown"}),
    "kid of another type": lambda: json_web_token(claims(), {"kid": 1}),
    "kid a list": lambda: json_web_token(claims(), {"kid": [DEVELOPMENT_PUBLIC_KEY]}),
    "no kid": lambda: json_web_token(claims(), {"kid": None}),
    "kid the private key": lambda: json_web_token(claims(), {"kid": DEVELOPMENT_PRIVATE_KEY}),
    "kid a path": lambda: json_web_token(claims(), {"kid": "../../etc/passwd"}),
    "signed with the public key": signed_with_the_public_key,
    "signed with an empty key": lambda: json_web_token(claims(), private_key=""),
    "unencoded payload": lambda: json_web_token(claims(), {"b64": False, "crit": ["b64"]}),
    "critical extension": lambda: json_web_token(claims(), {"crit": ["exp"]}),
    "one digit wrong": lambda: json_web_token(claims())[:-3] + "AAA",
    "payload exchanged": with_the_payload_of_another,
    "claims a list": lambda: json_web_token([claims()]),
    "claims a string": lambda: json_web_token("claims"),
    "claims null": lambda: json_web_token(None),
    "claims no JSON": lambda: json_web_token(b"{not json"),
    "claims not UTF-8": lambda: json_web_token(b'{"fileName": "\xff"}'),
    "claims nested deep": lambda: json_web_token(b"[" * 40_000),
    "claims empty": lambda: json_web_token(b""),
    "two parts": lambda: json_web_token(claims()).rpartition(".")[0],
    "four parts": lambda: json_web_token(claims()) + ".AAAA",
    "five parts": lambda: "a.b.c.d.e",
    "dots": lambda: "...",
    "one dot": lambda: ".",
    "no token at all": lambda: "nonsense",
    "odd characters": lambda: "ü.é.😀",
    "NUL": lambda: json_web_token(claims()) + "\0",
    "too long": lambda: json_web_token(claims()) + "A" * 60_000,
    "header no JSON": lambda: "AAAA." + json_web_token(claims()).partition(".")[2],
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_or_broken_token_is_400(
    shared_server: LoupeServer, forge: Callable[[], str]
) -> None:
    refused_token(shared_server, FILE | {"token": forge()}, INVALID_TOKEN)


TIMES: dict[str, tuple[Callable[[Now], Claims], str]] = {
    "an hour and a second": (lambda now: {"iat": now, "exp": now + 3601}, INVALID_TOKEN),
    "no length": (lambda now: {"iat": now + 60, "exp": now + 60}, INVALID_TOKEN),
    "ends before it begins": (lambda now: {"iat": now + 90, "exp": now + 60}, INVALID_TOKEN),
    "expired": (lambda now: {"iat": now - 60, "exp": now - 1}, EXPIRED_TOKEN),
    "expired long ago": (lambda now: {"iat": 0, "exp": 1}, EXPIRED_TOKEN),
    "negative": (lambda now: {"iat": -(10**12), "exp": 1 - 10**12}, EXPIRED_TOKEN),
    "issued tomorrow": (
        lambda now: {"iat": now + 86_400, "exp": now + 88_000},
        INVALID_TOKEN,
    ),
    "issued in ten thousand years": (
        lambda now: {"iat": 10**12, "exp": 10**12 + 60},
        INVALID_TOKEN,
    ),
    "issued at 10^400": (lambda now: {"iat": 10**400, "exp": 10**400 + 60}, INVALID_TOKEN),
    "exp a string": (lambda now: {"iat": now, "exp": str(now + 60)}, INVALID_TOKEN),
    "exp a float": (lambda now: {"iat": now, "exp": now + 60.0}, INVALID_TOKEN),
    "exp true": (lambda now: {"iat": 0, "exp": True}, INVALID_TOKEN),
    "exp null": (lambda now: {"iat": now, "exp": None}, INVALID_TOKEN),
    "exp infinite": (lambda now: {"iat": now, "exp": float("inf")}, INVALID_TOKEN),
    "exp NaN": (lambda now: {"iat": now, "exp": float("nan")}, INVALID_TOKEN),
    "iat a list": (lambda now: {"iat": [now], "exp": now + 60}, INVALID_TOKEN),
}


@pytest.mark.parametrize(("times", "message"), TIMES.values(), ids=TIMES)
def test_a_token_holds_for_an_hour_at_most_from_now(
    shared_server: LoupeServer, times: Callable[[Now], Claims], message: str
) -> None:
    fields = with_token(FILE, **times(int(time.time())))
    refused_token(shared_server, fields, message)


@pytest.mark.parametrize("missing", ["iat", "exp"])
def test_a_token_without_its_times_is_400(shared_server: LoupeServer, missing: str) -> None:
    without = {name: value for name, value in claims().items() if name != missing}
    refused_token(shared_server, FILE | {"token": json_web_token(without)}, INVALID_TOKEN)


PAYLOADS: dict[str, tuple[dict[str, str], Claims]] = {
    "field of another value": ({"fileName": "other.jpg"}, {}),
    "extra field unsigned": ({"isPrivateFile": "true"}, {}),
    "unknown field unsigned": ({"unknown": "1"}, {}),
    "webhook unsigned": ({"webhookUrl": "https://example.com/"}, {}),
    "field of the first version": ({"publicKey": DEVELOPMENT_PUBLIC_KEY}, {}),
    "claim without a field": ({}, {"tags": "a"}),
    "claim not before": ({}, {"nbf": 0}),
    "claim a number": ({"customCoordinates": "1"}, {"customCoordinates": 1}),
    "claim a flag": ({"isPrivateFile": "true"}, {"isPrivateFile": True}),
    "claim null": ({"tags": ""}, {"tags": None}),
    "claim a list": ({"tags": "a"}, {"tags": ["a"]}),
    "other case": ({"tags": "A"}, {"tags": "a"}),
    "other normal form": ({"tags": "e\u0301"}, {"tags": "\u00e9"}),
    "blanks": ({"tags": "a "}, {"tags": "a"}),
    "exp as a field": ({"exp": "1"}, {}),
}


@pytest.mark.parametrize(("sent", "signed_claims"), PAYLOADS.values(), ids=PAYLOADS)
def test_every_field_has_to_be_signed_as_it_is_sent(
    shared_server: LoupeServer, sent: dict[str, str], signed_claims: Claims
) -> None:
    token = json_web_token(claims(**signed_claims))
    refused_token(shared_server, FILE | sent | {"token": token}, OTHER_PAYLOAD)


def test_a_claim_that_stands_twice_is_what_the_last_one_says(shared_server: LoupeServer) -> None:
    now = int(time.time())
    text = f'{{"fileName": "a.jpg", "fileName": "b.jpg", "iat": {now}, "exp": {now + 60}}}'
    token = json_web_token(text.encode())
    refused_token(shared_server, FILE | {"fileName": "a.jpg", "token": token}, OTHER_PAYLOAD)


def test_a_used_token_cannot_be_spelled_in_another_way(shared_server: LoupeServer) -> None:
    """The unused bits of its last character, padding and stray characters decode alike."""
    fields = with_token(FILE)
    accepted(post_v2(shared_server, fields))
    token = fields["token"]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    spellings = [token[:-1] + alphabet[last // 4 * 4 + bits] for bits in range(4)]
    spellings += [token + "=", token + "====", token + "!", token[:-5] + "~" + token[-5:]]
    for spelling in spellings:
        refused_token(shared_server, FILE | {"token": spelling}, INVALID_TOKEN)


def test_a_token_is_used_up_by_an_upload_that_fails(shared_server: LoupeServer) -> None:
    fields = with_token({"fileName": FILE["fileName"]})
    refused(post_v2(shared_server, fields), 400)
    refused_token(shared_server, FILE | fields, INVALID_TOKEN)


def test_a_refused_token_can_still_be_used_rightly(shared_server: LoupeServer) -> None:
    fields = with_token(FILE)
    refused_token(shared_server, fields | {"tags": "a"}, OTHER_PAYLOAD)
    accepted(post_v2(shared_server, fields))


def test_an_upload_without_token_and_key_is_400_and_with_both_too(
    shared_server: LoupeServer,
) -> None:
    refused_token(shared_server, FILE, MISSING_TOKEN)
    refused_token(shared_server, FILE | {"token": ""}, MISSING_TOKEN)
    refused_token(shared_server, FILE | signed() | {"token": ""}, MISSING_TOKEN)
    with nothing_left(shared_server):
        answer = post_v2(shared_server, with_token(FILE), shared_server.client)
        refused(answer, 400, TOKEN_AND_KEY)


def test_a_token_and_a_signature_belong_to_their_own_version(shared_server: LoupeServer) -> None:
    refused_token(shared_server, FILE | signed(), INVALID_TOKEN)
    with anonymous(shared_server) as client, nothing_left(shared_server):
        answer = post_form(shared_server, with_token(FILE), client=client)
        refused(answer, 400, "Your request is missing publicKey parameter.")


@pytest.mark.parametrize("value", [None, True, -1.5, "", [], [[]], {"a": {"b": []}}, "\0", "💥"])
def test_no_json_value_as_header_or_claims_is_a_500(shared_server: LoupeServer, value: Any) -> None:
    tokens = [json_web_token(claims(), {name: value}) for name in ("kid", "alg", "typ", "crit")]
    tokens += [json_web_token(odd) for odd in (claims(fileName=value), claims(exp=value), value)]
    for token in tokens:
        answer = post_v2(shared_server, FILE | {"token": token})
        assert answer.status_code in (200, 400), answer.text


# --- what a browser may ask for ---------------------------------------------------------------

PARAMETERS = {
    "extensions": json.dumps([{"name": "google-auto-tagging", "minConfidence": 0, "maxTags": 1}]),
    "webhookUrl": "http://127.0.0.1:5000/",
}


@pytest.mark.parametrize("version", ["signature", "token"])
@on_sqlite_only
def test_a_browser_may_ask_for_extensions_unless_that_is_restricted(
    serve: Serve, version: str
) -> None:
    def upload_by_browser(server: LoupeServer, **fields: str) -> httpx.Response:
        if version == "token":
            return post_v2(server, with_token(FILE | fields))
        with anonymous(server) as client:
            return post_form(server, FILE | fields | signed(), client=client)

    with Receiver() as receiver:
        parameters = PARAMETERS | {"webhookUrl": receiver.url}
        restricted = serve(google_auto_tagging="local", restrict_client_params=True)
        for name, value in parameters.items():
            assert name in refused(upload_by_browser(restricted, **{name: value}), 400)
        assert restricted.client.get("/v1/files").json() == []
        assert receiver.connections == 0
        accepted(upload_by_browser(restricted, extensions="", webhookUrl="", tags="a"))
        by_key = accepted(post_form(restricted, FILE | parameters))
        assert set(by_key["extensionStatus"]) == {"google-auto-tagging"}
        restricted.stop()
        free = serve(google_auto_tagging="local", sync_budget_seconds=0)
        answer = accepted(upload_by_browser(free, **parameters))
        assert answer["extensionStatus"] == {"google-auto-tagging": "pending"}
        receiver.wait_for(1)
