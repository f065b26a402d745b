"""File names and folder paths: sanitised, inside their folder, never a path on disk."""

import string
import unicodedata
from urllib.parse import quote

import pytest

from app.errors import BadRequest
from app.files import names
from tests.files.helpers import (
    PICTURE,
    nothing_left,
    on_sqlite_only,
    refused,
    traces,
    upload,
    upload_as,
)
from tests.server import LoupeServer


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("plain-name_1.jpg", "plain-name_1.jpg"),
        ("two words.jpg", "two_words.jpg"),
        ("  around  .jpg ", "around__.jpg"),
        ('a/b\\c:d*e?f"g<h>i|j.jpg', "a_b_c_d_e_f_g_h_i_j.jpg"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("..\\..\\x", ".._.._x"),
        ("%2e%2e%2fx", "_2e_2e_2fx"),
        ("/etc/passwd", "_etc_passwd"),
        ("C:\\x.jpg", "C__x.jpg"),
        ("．．／x", "__x"[:0] + "___x"),
        ("ünï-世界-١٢-Ⅷ.jpg", "ünï-世界-١٢-Ⅷ.jpg"),
        ("नमस्ते.jpg", "नमस्ते.jpg"),
        ("e\u0301.jpg", "\u00e9.jpg"),
        ("evil\u202egpj.exe", "evil_gpj.exe"),
        ("zero\u200bwidth.jpg", "zero_width.jpg"),
        ("👍.jpg", "_.jpg"),
        ("a\0b\r\nc\x1b[31m\x7f\x85.jpg", "a_b__c__31m__.jpg"),
        ("a@b#c%d&e+f=g,h;i'j(k)l.jpg", "a_b_c_d_e_f_g_h_i_j_k_l.jpg"),
        ("CON.jpg", "CON.jpg"),
        (".htaccess", ".htaccess"),
        ("x.php", "x.php"),
        ("a.jpg.exe", "a.jpg.exe"),
        ("trailing.", "trailing."),
        ("...", "..."),
        ("x" * 255, "x" * 255),
        ("😀" * 75, "_" * 75),
    ],
)
def test_file_names_are_sanitised(shared_server: LoupeServer, sent: str, kept: str) -> None:
    """And the answer says the name that counts."""
    answer = upload_as(shared_server, sent, folder="/names")
    assert answer["name"] == kept
    assert answer["filePath"] == f"/names/{kept}"
    details = shared_server.details(answer["fileId"])
    assert (details["name"], details["filePath"]) == (kept, f"/names/{kept}")
    assert unicodedata.is_normalized("NFC", details["name"])


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "世" * 86 + ".jpg"])
def test_a_name_that_is_too_long_is_400(shared_server: LoupeServer, name: str) -> None:
    with nothing_left(shared_server):
        message = refused(shared_server.upload(PICTURE, "a.jpg", fileName=name), 400)
    assert "fileName" in message


def test_the_longest_name_still_gets_a_suffix(shared_server: LoupeServer) -> None:
    answer = upload(shared_server, fileName="x" * 251 + ".jpg")
    assert answer["name"].startswith("x" * 251 + "_")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("", "/"),
        ("/", "/"),
        ("//", "/"),
        (" ", "/"),
        ("a", "/a"),
        ("/a/", "/a"),
        ("a//b///c", "/a/b/c"),
        ("/summer 26/b.c", "/summer_26/b_c"),
        ("/ünï/世界-_1", "/ünï/世界-_1"),
        ("e\u0301", "/\u00e9"),
        ("a\\b", "/a_b"),
        ("%2e%2e/x", "/_2e_2e/x"),
        ("．．/x", "/__/x"),
        ("...", "/___"),
        ("a\r\nb\0", "/a__b_"),
        ("/".join("d" * 50), "/" + "/".join("d" * 50)),
        ("x" * 255, "/" + "x" * 255),
    ],
)
def test_folder_paths_are_sanitised(shared_server: LoupeServer, sent: str, kept: str) -> None:
    answer = upload(shared_server, folder=sent)
    assert answer["filePath"] == f"{kept.rstrip('/')}/{answer['name']}"
    listed = shared_server.client.get("/v1/files", params={"path": kept}).json()
    assert answer["fileId"] in [file["fileId"] for file in listed]


@pytest.mark.parametrize("folder", ["/a/../../b", "..", "/./", ".", "a/ .. /b", "/a/."])
def test_dots_are_no_folder_names(shared_server: LoupeServer, folder: str) -> None:
    with nothing_left(shared_server):
        answer = shared_server.upload(PICTURE, folder=folder)
        refused(answer, 400, "'.' & '..' can not be used as folder-name")
        assert answer.json()["reason"] == "INVALID_FOLDER_PATH"


@pytest.mark.parametrize(
    "folder",
    ["/".join("d" * 51), "x" * 256, "é" * 128, "a/" + "x" * 10_000, "/".join(["y" * 250] * 10)],
)
def test_a_folder_too_deep_or_too_long_is_400(shared_server: LoupeServer, folder: str) -> None:
    with nothing_left(shared_server):
        assert "folder" in refused(shared_server.upload(PICTURE, folder=folder), 400)


@on_sqlite_only
def test_two_spellings_of_a_letter_are_one_file(server: LoupeServer) -> None:
    first = upload_as(server, "e\u0301.jpg", folder="e\u0301")
    second = upload_as(server, "\u00e9.jpg", folder="\u00e9")
    assert first["fileId"] == second["fileId"]
    assert second["versionInfo"]["name"] == "Version 2"


@on_sqlite_only
def test_names_that_differ_in_case_are_two_files(server: LoupeServer) -> None:
    assert upload_as(server, "a.jpg")["fileId"] != upload_as(server, "A.jpg")["fileId"]


@on_sqlite_only
def test_bytes_are_kept_under_an_id_and_not_under_a_name(server: LoupeServer) -> None:
    before = traces(server)
    upload_as(server, "../../escape.php", folder="/somewhere")
    left = [name for name in traces(server) - before if name.startswith("file ")]
    assert len(left) == 1
    assert left[0].startswith("file blobs/")
    assert "escape" not in left[0]
    assert "." not in left[0]
    outside = server.resources.settings.data_dir
    assert not [path for path in outside.rglob("*") if "escape" in path.name]


def test_suffixes_are_of_62_letters_and_two_signs() -> None:
    seen = {names.with_unique_suffix("a.jpg") for _ in range(1000)}
    assert len(seen) == 1000
    assert set("".join(name[2:-4] for name in seen)) <= {
        *string.ascii_letters,
        *string.digits,
        "_",
        "-",
    }


def test_paths_are_joined_split_and_climbed() -> None:
    assert names.join_path("/", "a.jpg") == "/a.jpg"
    assert names.join_path("/a/b", "c.jpg") == "/a/b/c.jpg"
    assert names.split_path("/a.jpg") == ("/", "a.jpg")
    assert names.split_path("/a/b/c.jpg") == ("/a/b", "c.jpg")
    assert names.ancestors("/") == ["/"]
    assert names.ancestors("/a/b") == ["/", "/a", "/a/b"]


def test_lone_surrogates_never_stay_in_a_name() -> None:
    assert names.sanitise_file_name("a\ud800b") == "a_b"
    assert names.has_control_characters("a\ud800")
    assert not names.is_storable_text("a\udfff")
    with pytest.raises(BadRequest):
        names.sanitise_file_name(" .. ")


def test_no_ascii_character_that_is_kept_needs_an_escape_in_a_url() -> None:
    """`FileUrls` goes by it."""
    for character in map(chr, range(128)):
        name = names.sanitise_file_name(f"a{character}b")
        path = names.join_path(names.sanitise_folder_path(f"/c{character}d"), name)
        assert quote(path) == path
