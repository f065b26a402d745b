"""Private files open by signature only. Source: the contract's sections 6.5 and 6.6."""

import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any

import pytest

from app.delivery.signed_urls import has_valid_signature
from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY
from tests import pictures
from tests.conftest import Serve
from tests.delivery.support import image_of, is_not_found, is_refused, put, visit
from tests.server import LoupeServer

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LATER = 4_000_000_000  # fixed, since it becomes part of tests' names


def signature(target: str, expiry: int | str = 9999999999, key: str = "") -> str:
    """target: what follows the endpoint and its slash."""
    message = f"{target}{expiry}".encode()
    return hmac.new((key or DEVELOPMENT_PRIVATE_KEY).encode(), message, hashlib.sha1).hexdigest()


def signed(url: str, expiry: int | None = None, key: str = "") -> str:
    """As the SDKs do it: the URL as it is emitted, the signature at its end."""
    target = url.partition("/demo/")[2]
    separator = "&" if "?" in url else "?"
    if expiry is None:
        return f"{url}{separator}ik-s={signature(target, key=key)}"
    return f"{url}{separator}ik-t={expiry}&ik-s={signature(target, expiry, key)}"


def is_denied(answer: Any) -> bool:
    assert is_refused(answer, 401)
    assert answer.headers["ik-error"].startswith("EACCES - ")
    assert answer.headers["cache-control"] == "no-store"
    return True


@pytest.fixture(scope="module")
def url(shared_server: LoupeServer) -> str:
    return str(put(shared_server, folder="/signed", isPrivateFile="true")["url"])


@pytest.mark.parametrize(
    "target",
    [
        "tr:w-300,h-200,c-at_max:rt-90/a%20b/%C3%B1.jpg"
        "?ik-s=6553e734e999f6136c5a9425f6775efbb10c6dd5",
        "tr:w-300,h-200:rt-90/a b.jpg?ik-s=b87e5b06024070e02f162cb58f559896c738e457",
        "tr:w-300,h-200:rt-90/a%20b.jpg?ik-s=b87e5b06024070e02f162cb58f559896c738e457",
    ],
    ids=["python 5", "python 4", "python 4, as HTTP clients send it"],
)
def test_signatures_that_the_official_sdks_gave_are_valid(target: str) -> None:
    assert has_valid_signature(target, ["other", "x"], NOW)
    assert not has_valid_signature(target, ["other"], NOW)
    assert not has_valid_signature(target.replace("rt-90", "rt-91"), ["x"], NOW)


@pytest.mark.parametrize("expiry", [None, LATER])
def test_a_signed_url_opens_a_private_file(url: str, expiry: int | None) -> None:
    answer = visit(signed(url, expiry))
    assert (answer.status_code, answer.content) == (200, pictures.jpeg())
    assert answer.headers["cache-control"].startswith("private")
    assert visit(signed(url, expiry), range="bytes=0-2").status_code == 206
    assert visit(signed(url, expiry), "HEAD").status_code == 200


@pytest.mark.parametrize("name", ["ünï cødé.jpg", "猫.jpg", "a b c.jpg", "100%.jpg", "e\u0301.jpg"])
def test_any_name_can_be_signed_encoded_or_literal(shared_server: LoupeServer, name: str) -> None:
    uploaded = put(shared_server, name=name, isPrivateFile="true", folder="/Ö ö")
    url, path = uploaded["url"], uploaded["filePath"]
    assert visit(signed(url)).content == pictures.jpeg()
    literal = f"{url}?ik-s={signature(path.removeprefix('/'))}"
    assert visit(literal).content == pictures.jpeg()
    expiring = f"{url}?ik-t={LATER}&ik-s={signature(path.removeprefix('/'), LATER)}"
    assert visit(expiring).content == pictures.jpeg()


@pytest.mark.parametrize(
    "query",
    ["updatedAt=5", "ik-attachment=true", "tr=", "a=%2C&b=,&c", "a=b=c", "tr=n-ik_ml_thumbnail"],
)
def test_the_query_is_signed_as_it_was_emitted(url: str, query: str) -> None:
    assert visit(signed(f"{url}?{query}")).status_code == 200
    assert visit(signed(f"{url}?{query}", LATER)).status_code == 200


def test_the_signature_may_stand_anywhere_in_the_query(url: str) -> None:
    sign = signature(f"{url.partition('/demo/')[2]}?a=1&b=2")
    for query in (f"ik-s={sign}&a=1&b=2", f"a=1&ik-s={sign}&b=2", f"a=1&b=2&ik-s={sign}"):
        assert visit(f"{url}?{query}").status_code == 200


TARGET = "signed/picture.jpg"
GOOD = signature(TARGET)
GOOD_HOUR = signature(TARGET, LATER)
PAST = 1_700_000_000


@pytest.mark.parametrize(
    "query",
    [
        "",
        "ik-s=",
        "ik-s",
        f"ik-s={GOOD[:-1]}",
        f"ik-s={GOOD}0",
        f"ik-s={'0' * 40}",
        f"ik-s={GOOD.upper()}",
        "ik-s=%C3%BC",
        f"IK-S={GOOD}",
        f"ik-s={signature(TARGET, key='other')}",
        f"ik-s={signature('signed/other.jpg')}",
        f"ik-s={hashlib.sha1(TARGET.encode()).hexdigest()}",
        f"ik-s={GOOD}&ik-s={GOOD}",
        f"ik-s={'0' * 40}&ik-s={GOOD}",
        f"ik-s={GOOD}&extra=1",
        f"ik-s={GOOD}&ik-attachment=true",
        f"ik-s={GOOD}&ik-t={LATER}",
        f"ik-t={LATER + 1}&ik-s={GOOD_HOUR}",
        f"ik-s={GOOD_HOUR}",
        f"ik-t={LATER}&ik-t={LATER}&ik-s={GOOD_HOUR}",
        f"ik-t={PAST}&ik-s={signature(TARGET, PAST)}",
        f"ik-t=0&ik-s={signature(TARGET, 0)}",
        f"ik-t=-1&ik-s={signature(TARGET, -1)}",
        f"ik-t=NaN&ik-s={signature(TARGET, 'NaN')}",
        f"ik-t=1e99&ik-s={signature(TARGET, '1e99')}",
        f"ik-t=&ik-s={signature(TARGET, '')}",
        f"ik-t=%32&ik-s={signature(TARGET, '%32')}",
        f"ik-t={'9' * 5000}&ik-s={signature(TARGET, '9' * 5000)}",
    ],
    ids=lambda query: query[:30],
)
def test_a_signature_that_is_missing_wrong_or_expired_is_401(url: str, query: str) -> None:
    assert is_denied(visit(f"{url}?{query}"))
    assert visit(f"{url}?{query}", "HEAD").status_code == 401


def test_nothing_else_in_the_request_opens_a_private_file(
    shared_server: LoupeServer, url: str
) -> None:
    etag = visit(signed(url)).headers["etag"]
    for headers in ({"if_none_match": "*"}, {"if_none_match": etag}, {"range": "bytes=0-1"}):
        assert is_denied(visit(url, **headers))
    assert is_denied(shared_server.client.get(url))


def test_a_signed_path_that_was_encoded_otherwise_is_401(shared_server: LoupeServer) -> None:
    uploaded = put(shared_server, name="ñ.jpg", isPrivateFile="true", folder="/encoded")
    sign = signature(uploaded["url"].partition("/demo/")[2])
    assert visit(f"{uploaded['url']}?ik-s={sign}").status_code == 200
    assert is_denied(visit(f"{uploaded['url'].replace('.jpg', '%2Ejpg')}?ik-s={sign}"))
    assert is_denied(visit(f"{uploaded['url'].lower()}?ik-s={sign}"))


def test_a_signature_belongs_to_one_version(server: LoupeServer) -> None:
    first = put(server, b"one", "a.txt", folder="/a", isPrivateFile="true")
    put(server, b"two", "a.txt", folder="/a", isPrivateFile="true")
    old = f"{first['url']}?ik-obj-version={first['versionInfo']['id']}"
    assert visit(signed(old)).content == b"one"
    assert visit(signed(first["url"])).content == b"two"
    query = signed(first["url"]).partition("?")[2]
    assert is_denied(visit(f"{old}&{query}"))


def test_a_private_version_stays_private_when_a_public_one_follows(server: LoupeServer) -> None:
    first = put(server, b"secret", "a.txt", folder="/a", isPrivateFile="true")
    put(server, b"open", "a.txt", folder="/a")
    assert visit(first["url"]).content == b"open"
    assert is_denied(visit(f"{first['url']}?ik-obj-version={first['versionInfo']['id']}"))


def test_every_private_key_that_is_set_signs(serve: Serve) -> None:
    server = serve(
        private_keys=f"{DEVELOPMENT_PRIVATE_KEY},private_two",
        public_keys=f"{DEVELOPMENT_PUBLIC_KEY},public_two",
    )
    url = put(server, isPrivateFile="true")["url"]
    assert visit(signed(url)).status_code == 200
    assert visit(signed(url, key="private_two")).status_code == 200
    assert is_denied(visit(signed(url, key="public_two")))


def test_a_named_thumbnail_of_a_private_file_is_open(shared_server: LoupeServer) -> None:
    uploaded = put(shared_server, isPrivateFile="true")
    assert image_of(visit(uploaded["thumbnailUrl"])).width == 240
    assert image_of(visit(f"{uploaded['url']}?tr=n-ik_ml_thumbnail")).width == 240
    assert image_of(visit(f"{uploaded['url']}?tr=n-ik_ml_thumbnail&ik-s=junk")).width == 240


def test_a_signature_opens_no_draft(shared_server: LoupeServer) -> None:
    url = put(shared_server, isPrivateFile="true", isPublished="false")["url"]
    assert is_not_found(visit(signed(url)))


def test_a_public_file_needs_no_signature_and_minds_none(shared_server: LoupeServer) -> None:
    url = put(shared_server)["url"]
    assert visit(f"{url}?ik-t=1&ik-s=junk").status_code == 200
