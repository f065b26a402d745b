"""`GET /v1/files`: filters, orders, pages, and what is refused."""

import itertools
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from app.db import Tx
from app.files.models import files, versions
from app.files.schemas import ListQuery
from app.files.service import MAX_SHORT_READ, is_short_read
from tests import pictures
from tests.conftest import Serve
from tests.files.helpers import on_sqlite_only, refused, upload_as
from tests.server import LoupeServer


def names(server: LoupeServer, **query: Any) -> list[str]:
    answer = server.client.get("/v1/files", params=query)
    assert answer.status_code == 200, answer.text
    return [file["name"] for file in answer.json()]


def paths(server: LoupeServer, **query: Any) -> list[str]:
    return [file["filePath"] for file in server.client.get("/v1/files", params=query).json()]


@pytest.fixture
def library(server: LoupeServer) -> LoupeServer:
    """Five files in three folders, in this order."""
    upload_as(server, "b.jpg", pictures.jpeg(100, 50), tags="red,toy")
    upload_as(server, "a.png", pictures.as_png(pictures.quadrants(20, 80)), folder="/shop")
    upload_as(server, "notes.txt", b"text", folder="/shop", tags="toy")
    upload_as(server, "Z.jpg", pictures.jpeg(60, 60), folder="/shop/summer", tags="blue, red")
    upload_as(server, "ä.bin", bytes(5000))
    return server


ALL = ["b.jpg", "a.png", "notes.txt", "Z.jpg", "ä.bin"]


def test_a_list_is_an_array_of_details(library: LoupeServer) -> None:
    answer = library.client.get("/v1/files")
    assert answer.headers["content-type"] == "application/json"
    listed = answer.json()
    assert listed == [library.details(file["fileId"]) for file in listed]
    assert [file["name"] for file in listed] == ALL


QUERIES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ALL),
    ({"type": "file"}, ALL),
    ({"path": "/"}, ["b.jpg", "ä.bin"]),
    ({"path": ""}, ["b.jpg", "ä.bin"]),
    ({"path": "/shop"}, ["a.png", "notes.txt"]),
    ({"path": "shop/"}, ["a.png", "notes.txt"]),
    ({"path": "/shop/summer"}, ["Z.jpg"]),
    ({"path": "/sho"}, []),
    ({"path": "/SHOP"}, []),
    ({"path": "/%"}, []),
    ({"name": "b.jpg"}, ["b.jpg"]),
    ({"name": "B.jpg"}, []),
    ({"name": "b"}, []),
    ({"name": "%.jpg"}, []),
    ({"name": "ä.bin"}, ["ä.bin"]),
    ({"name": "a\u0308.bin"}, ["ä.bin"]),
    ({"name": "notes.txt", "path": "/shop"}, ["notes.txt"]),
    ({"name": "notes.txt", "path": "/"}, []),
    ({"tags": "toy"}, ["b.jpg", "notes.txt"]),
    ({"tags": "red,toy"}, ["b.jpg", "notes.txt", "Z.jpg"]),
    ({"tags": "blue, toy"}, ["b.jpg", "notes.txt", "Z.jpg"]),
    ({"tags": "to"}, []),
    ({"tags": "TOY"}, []),
    ({"tags": ""}, ALL),
    ({"tags": '"toy"'}, []),
    ({"fileType": "all"}, ALL),
    ({"fileType": "image"}, ["b.jpg", "a.png", "Z.jpg"]),
    ({"fileType": "non-image"}, ["notes.txt", "ä.bin"]),
    ({"fileType": "image", "tags": "red", "path": "/shop/summer"}, ["Z.jpg"]),
    ({"skip": 2}, ALL[2:]),
    ({"limit": 2}, ALL[:2]),
    ({"skip": 1, "limit": 3}, ALL[1:4]),
    ({"skip": 5}, []),
    ({"skip": 2**31 - 1}, []),
    ({"limit": 1000}, ALL),
    ({"fileType": "image", "skip": 1, "limit": 1}, ["a.png"]),
    ({"searchQuery": ""}, ALL),
    ({"unknown": "parameter"}, ALL),
]


def test_filters_and_pages(library: LoupeServer) -> None:
    for query, expected in QUERIES:
        assert names(library, **query) == expected, query


SORTED = {
    "NAME": ["Z.jpg", "a.png", "b.jpg", "notes.txt", "ä.bin"],
    "CREATED": ALL,
    "UPDATED": ["notes.txt", "Z.jpg", "ä.bin", "a.png", "b.jpg"],
    "SIZE": None,
    "HEIGHT": ["b.jpg", "Z.jpg", "a.png"],
    "WIDTH": ["a.png", "Z.jpg", "b.jpg"],
    # Nothing to sort by yet.
    "RELEVANCE": ALL,
    "DURATION": ALL,
    "ORIGINAL_CREATION_DATE": ALL,
}


def test_every_order_in_both_directions(library: LoupeServer) -> None:
    _update_again(library, ["a.png", "b.jpg"])
    sizes = {file["name"]: file["size"] for file in library.client.get("/v1/files").json()}
    by_size = sorted(sizes, key=lambda name: sizes[name])
    for field, expected in SORTED.items():
        order = by_size if expected is None else expected
        # Files without pixels come last, whichever way.
        last = [name for name in ALL if name not in order]
        assert names(library, sort=f"ASC_{field}") == order + last, field
        assert names(library, sort=f"DESC_{field}") == order[::-1] + last[::-1], field


def _update_again(server: LoupeServer, in_order: list[str]) -> None:
    ids = {file["name"]: file["fileId"] for file in server.client.get("/v1/files").json()}
    for name in in_order:
        answer = server.client.patch(f"/v1/files/{ids[name]}/details", json={"description": "x"})
        assert answer.status_code == 200


def test_only_current_versions_are_listed(library: LoupeServer) -> None:
    upload_as(library, "b.jpg", b"no picture any more")
    assert names(library) == ALL
    assert names(library, fileType="image") == ["a.png", "Z.jpg"]
    assert names(library, tags="red") == ["Z.jpg"]


def test_drafts_and_private_files_are_listed(server: LoupeServer) -> None:
    upload_as(server, "draft.jpg", isPublished="false")
    upload_as(server, "private.jpg", isPrivateFile="true")
    listed = server.client.get("/v1/files").json()
    assert [(file["isPublished"], file["isPrivateFile"]) for file in listed] == [
        (False, False),
        (True, True),
    ]


def test_pages_are_stable_among_equals(server: LoupeServer) -> None:
    """Whatever is sorted by is the same for all: each file is on one page and on one only."""
    for number in range(10):
        upload_as(server, "same.jpg", folder=f"/{number}")
    moment = server.resources.db.clock.now()

    def make_equal(tx: Tx) -> None:
        tx.execute(update(files).values(created_at=moment))
        tx.execute(update(versions).values(updated_at=moment))

    server.write(make_equal)
    fields = ("NAME", "CREATED", "UPDATED", "WIDTH")
    for direction, field in itertools.product(("ASC", "DESC"), fields):
        sort = f"{direction}_{field}"
        pages = [paths(server, sort=sort, skip=skip, limit=4) for skip in (0, 4, 8)]
        paged = list(itertools.chain.from_iterable(pages))
        assert len(paged) == len(set(paged)) == 10, sort
        assert paged == paths(server, sort=sort), sort


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "skip=-1",
            "The value of skip parameter should be greater than or equal to 0. Value sent is -1.",
        ),
        ("limit=0", "Minimum value of limit parameter is 1. Value sent is 0."),
        ("limit=-5", "Minimum value of limit parameter is 1. Value sent is -5."),
        ("limit=1001", "Maximum value of limit parameter is 1000. Value sent is 1001."),
        ("limit=2000", "Maximum value of limit parameter is 1000. Value sent is 2000."),
        ("sort=NAME", "Your request contains invalid value for sort parameters."),
        ("sort=ASC_", "Your request contains invalid value for sort parameters."),
        ("sort=asc_name", "Your request contains invalid value for sort parameters."),
        ("sort=DESC_SIZE;drop", "Your request contains invalid value for sort parameters."),
        ("sort=", "Your request contains invalid value for sort parameters."),
        (
            "type=files",
            "Your request contains invalid value for type parameter. Please provide one of the "
            "following: file, file-version, folder, all.",
        ),
    ],
)
def test_bad_queries_get_the_messages_of_the_contract(
    shared_server: LoupeServer, query: str, message: str
) -> None:
    refused(shared_server.client.get(f"/v1/files?{query}"), 400, message)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("fileType=images", "fileType"),
        ("fileType=", "fileType"),
        ("searchQuery=name%3D%22a%22", "searchQuery"),
        ("searchQuery=%00", "searchQuery"),
        ("type=folder", "type=folder"),
        ("type=file-version", "type=file-version"),
        ("type=all", "type=all"),
        ("skip=2147483648", "skip"),
        ("skip=99999999999999999999999999", "skip"),
        ("skip=abc", "skip"),
        ("limit=1.5", "limit"),
        ("limit=", "limit"),
        ("path=/a/../b", "folder-name"),
        ("path=" + "/d" * 51, "folder"),
    ],
)
def test_other_bad_queries_name_the_parameter(
    shared_server: LoupeServer, query: str, named: str
) -> None:
    assert named in refused(shared_server.client.get(f"/v1/files?{query}"), 400)


def test_odd_characters_find_nothing_or_are_400(library: LoupeServer) -> None:
    for query in (
        "name=%00",
        "name=a%00b",
        "tags=%00",
        "tags=a%00,b",
        "path=%00",
        "name=%ff%fe",
        "tags=%ED%A0%80",
        "name=%0d%0a",
        "name=%25%27%22%5c;--",
        "tags=%27%22%7b%7d",
        "name=" + "x" * 5000,
        "tags=" + "x," * 5000,
    ):
        answer = library.client.get(f"/v1/files?{query}")
        if answer.status_code != 400:
            assert (answer.status_code, answer.json()) == (200, []), query


@pytest.mark.parametrize(
    ("query", "is_short"),
    [
        (ListQuery(limit=100), True),
        (ListQuery(limit=100, descending=True), True),
        (ListQuery(limit=1, sort_field="RELEVANCE"), True),
        (ListQuery(limit=MAX_SHORT_READ - 1, skip=1), True),
        (ListQuery(limit=MAX_SHORT_READ, skip=1), False),
        (ListQuery(limit=1, skip=10_000), False),
        (ListQuery(), False),
        *((ListQuery(limit=1, sort_field=field), False) for field in ("NAME", "UPDATED", "SIZE")),
        (ListQuery(limit=1, folder="/"), False),
        (ListQuery(limit=1, name="a.jpg"), False),
        (ListQuery(limit=1, tags=["a"]), False),
        (ListQuery(limit=1, is_image=False), False),
    ],
    ids=repr,
)
def test_what_may_read_many_rows_does_not_hold_up_the_event_loop(
    query: ListQuery, is_short: bool
) -> None:
    assert is_short_read(query) is is_short


@on_sqlite_only
def test_at_most_1000_files_are_listed_unless_asked_for_less(serve: Serve) -> None:
    server = serve()
    file_id = upload_as(server, "a.txt", b"text")["fileId"]

    def multiply(tx: Tx) -> None:
        [file] = tx.execute(select(files)).mappings()
        [version] = tx.execute(select(versions)).mappings()
        for number in range(1000):
            copy = f"{number:024x}"
            own = {"id": copy, "name": f"{number}.txt", "current_version_id": copy}
            tx.execute(insert(files).values({**file, **own}))
            own = {"id": copy, "file_id": copy, "blob_key": copy}
            tx.execute(insert(versions).values({**version, **own}))

    server.write(multiply)
    assert len(names(server)) == 1000
    assert len(names(server, limit=1000)) == 1000
    assert len(names(server, skip=1000)) == 1
    assert names(server, sort="DESC_CREATED", limit=1) == ["a.txt"]
    assert file_id
