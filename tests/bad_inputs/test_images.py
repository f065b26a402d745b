"""Pictures that are too large, too laborious, two things at once, or what another program runs."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pyvips

from app.images import ImagePool
from tests import pictures
from tests.conftest import clean_environment, start_server
from tests.delivery.support import put, visit
from tests.delivery.test_delivery import is_guarded
from tests.emulators.receiver import Receiver
from tests.files.helpers import UPLOAD, accepted, nothing_left, refused
from tests.files.support import asking
from tests.server import EventLoop, LoupeServer
from tests.torture.harness import AUTH, ServerProcess

Make = Callable[[], bytes]
BOTH = asking("google-auto-tagging", "aws-auto-tagging")


class NoDecoder(ImagePool):
    """Counts what a child would have been asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def _run(self, *args: Any) -> Any:
        self.asked += 1
        raise AssertionError("a picture was about to be decoded")


@pytest.fixture(scope="module")
def no_decoder() -> NoDecoder:
    return NoDecoder()


@pytest.fixture
def decoder(no_decoder: NoDecoder) -> NoDecoder:
    no_decoder.asked = 0
    return no_decoder


@pytest.fixture(scope="module")
def without_decoder(
    event_loop_thread: EventLoop,
    no_decoder: NoDecoder,
    sqlite_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LoupeServer]:
    """Extensions are on, but no child process is there to decode a picture."""
    directory = tmp_path_factory.mktemp("headers")
    (directory / "loupe.db").write_bytes(sqlite_template.read_bytes())
    with pytest.MonkeyPatch.context() as environment:
        clean_environment(environment)
        server = start_server(
            event_loop_thread,
            no_decoder,
            directory,
            f"sqlite:///{directory / 'loupe.db'}",
            google_auto_tagging="local",
            aws_auto_tagging="local",
        )
    yield server
    server.stop()


# --- sizes ------------------------------------------------------------------------------------


def _jpeg_of_size(width: int, height: int) -> bytes:
    """The frame header says so; the scan is that of a small picture."""
    whole = pictures.jpeg()
    frame = whole.index(b"\xff\xc0") + 5
    return whole[:frame] + struct.pack(">HH", height, width) + whole[frame + 4 :]


IMPOSSIBLE: dict[str, Make] = {
    "50,000 x 50,000": pictures.bomb_header_png,
    "101 megapixels": lambda: pictures.png_of_size(10_100, 10_000),
    "one row too many": lambda: pictures.png_of_size(10_000, 10_001),
    "169 megapixels, all there": pictures.PICTURES["png-169-megapixels"],
    "0 x 0": pictures.zero_png,
    "0 x 10": lambda: pictures.png_of_size(0, 10),
    "10 x 0": lambda: pictures.png_of_size(10, 0),
    "JPEG of 65,000 x 65,000": lambda: _jpeg_of_size(65_000, 65_000),
}


@pytest.mark.parametrize("make", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_size_out_of_bounds_is_400_by_the_header_alone(
    without_decoder: LoupeServer, decoder: NoDecoder, make: Make
) -> None:
    with nothing_left(without_decoder):
        message = refused(without_decoder.upload(make(), "a.png", extensions=BOTH), 400)
    assert "pixels" in message
    assert decoder.asked == 0


def test_the_largest_picture_is_taken(without_decoder: LoupeServer) -> None:
    answer = accepted(without_decoder.upload(pictures.png_of_size(10_000, 10_000)))
    assert (answer["width"], answer["height"]) == (10_000, 10_000)


def _bmp_of_negative_height() -> bytes:
    whole = pictures.bmp()
    return whole[:22] + struct.pack("<i", -(2**31)) + whole[26:]


def _wmf() -> bytes:
    return b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhHIH", 0, 0, 9, 9, 96, 0, 0) + bytes(100)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/x) (w) file\n"
FOREIGN: dict[str, Make] = {
    "PostScript": lambda: POSTSCRIPT,
    "EPS with a preview": lambda: (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<I", 30) + bytes(22) + POSTSCRIPT
    ),
    "PDF": pictures.pdf,
    "WMF": _wmf,
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(200),
    "CUR": lambda: b"\0\0\2\0\1\0" + bytes(100),
    "BMP of negative height": _bmp_of_negative_height,
    "SVG": pictures.svg,
    "PPM": lambda: b"P6 9 9 255\n" + bytes(243),
    "Matlab": lambda: b"MATLAB 5.0 MAT-file" + bytes(200),
    "vips": lambda: b"\xb6\xa6\xf2\x08" + bytes(200),
    "MVG": lambda: b"push graphic-context\nimage over 0,0 0,0 'https://example.com/x'\n",
}


def _children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {int(kid) for path in tasks.glob("*/children") for kid in path.read_text().split()}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_other_programs_draw_is_a_raw_file_and_no_program_is_started(
    without_decoder: LoupeServer, decoder: NoDecoder, make: Make
) -> None:
    children = _children()
    answer = accepted(without_decoder.upload(make(), "a.png", extensions=BOTH))
    assert answer["fileType"] == "non-image"
    assert set(answer["extensionStatus"].values()) == {"failed"}
    assert visit(answer["url"]).content == make()
    assert visit(f"{answer['url']}?tr=n-ik_ml_thumbnail").status_code == 400
    assert decoder.asked == 0
    assert _children() == children


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_no_loader_beyond_the_six_can_be_reached(make: Make) -> None:
    """In this process as in the children, which set libvips up in the same way."""
    with pytest.raises(pyvips.Error):
        pyvips.Image.new_from_buffer(make(), "")


@pytest.mark.parametrize(
    "loader", ["svgload_buffer", "pdfload_buffer", "magickload_buffer", "ppmload_buffer", "csvload"]
)
def test_loaders_are_blocked_by_name_too(loader: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1,2\n")
    with pytest.raises(pyvips.Error):
        pyvips.Operation.call(loader, pictures.svg() if "buffer" in loader else str(path))


# --- what is work -----------------------------------------------------------------------------

LABORIOUS: dict[str, Make] = {
    "169 megapixels in half a megabyte": pictures.PICTURES["png-169-megapixels"],
    "text of 800 MiB": pictures.PICTURES["png-text-bomb"],
    "GIF of 200,000 frames": pictures.PICTURES["gif-many-frames"],
    "TIFF whose pages are a circle": pictures.PICTURES["tiff-circular"],
    "TIFF of 60,000 pages": pictures.PICTURES["tiff-many-pages"],
    "WebP of 100,000 frames": pictures.PICTURES["webp-many-frames"],
    "PNG of 100,000 chunks": pictures.PICTURES["png-many-chunks"],
    "JPEG of millions of markers": pictures.PICTURES["jpeg-many-markers"],
}


def _memory_kib(process: ServerProcess, what: str) -> int:
    assert process.process is not None
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1])


def _upload(process: ServerProcess, content: bytes) -> httpx.Response:
    return httpx.post(
        process.url + UPLOAD,
        files={"file": ("a.png", content)},
        data={"fileName": "a.png", "extensions": BOTH},
        auth=AUTH,
        timeout=120,
    )


@pytest.mark.parametrize("make", LABORIOUS.values(), ids=LABORIOUS)
def test_a_laborious_picture_costs_the_server_itself_no_memory(
    process: ServerProcess, make: Make
) -> None:
    assert process.process is not None
    content = make()
    assert _upload(process, pictures.png()).status_code == 200  # whatever is loaded once
    Path(f"/proc/{process.process.pid}/clear_refs").write_text("5")
    before = _memory_kib(process, "VmRSS")
    answer = _upload(process, content)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert set(answer.json()["extensionStatus"].values()) <= {"success", "failed"}
        httpx.get(f"{answer.json()['url']}?tr=n-ik_ml_thumbnail", timeout=120)
    # The upload itself passes through in blocks of a megabyte.
    assert _memory_kib(process, "VmHWM") - before < 16 * 1024


# --- two things at once -----------------------------------------------------------------------

SCRIPT = b"<script>alert(1)</script>"
HTML = b"<!doctype html><html><body>" + SCRIPT + b"</body></html>"
POLYGLOTS: dict[str, tuple[Make, str, str]] = {
    "JPEG with an HTML tail": (pictures.jpeg_with_html_tail, "a.jpg", "image/jpeg"),
    "GIF that is an archive": (
        lambda: pictures.transparent_gif() + b"PK\5\6" + bytes(18),
        "a.jar",
        "image/gif",
    ),
    "GIF that is a script": (lambda: b"GIF89a=1;/*" + bytes(20) + b"*/alert(1)", "a.js", ""),
    "PNG with HTML in a text": (
        lambda: pictures.png_of_size(9, 9, pictures.png_chunk(b"tEXt", b"a\0" + HTML)),
        "a.html",
        "image/png",
    ),
    "PDF that is a script": (lambda: b"%PDF-1.4\n/*" + pictures.pdf() + b"*/alert(1)", "a.js", ""),
    "HTML named .jpg": (lambda: HTML, "a.jpg", "application/octet-stream"),
    "HTML behind a JPEG's first bytes": (lambda: b"\xff\xd8\xff" + HTML, "a.html", ""),
    "HTML with a byte order mark": (lambda: b"\xef\xbb\xbf" + HTML, "a.html", ""),
    "HTML in UTF-16": (lambda: HTML.decode().encode("utf-16"), "a.html", ""),
    "HTML in UTF-7": (lambda: b"+ADw-script+AD4-alert(1)+ADw-/script+AD4-", "a.html", ""),
}


@pytest.mark.parametrize(("make", "name", "mime"), POLYGLOTS.values(), ids=POLYGLOTS)
def test_a_file_of_two_natures_is_shown_as_a_picture_or_not_at_all(
    shared_server: LoupeServer, make: Make, name: str, mime: str
) -> None:
    answer = visit(put(shared_server, make(), name)["url"])
    assert answer.status_code == 200
    assert answer.content == make()
    assert is_guarded(answer.headers)
    shown_as = answer.headers["content-type"].partition(";")[0]
    if mime:
        assert shown_as == mime
    if not shown_as.startswith("image/"):
        assert answer.headers["content-disposition"].startswith("attachment")


def _svg(body: str, doctype: str = "") -> bytes:
    opening = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<?xml version="1.0"?>{doctype}{opening} width="9" height="9">{body}</svg>'.encode()


def _laughs() -> str:
    entities = ['<!ENTITY a0 "ha">']
    entities += [f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)]
    return f"<!DOCTYPE svg [{''.join(entities)}]>"


def _svgs(url: str) -> dict[str, bytes]:
    return {
        "script": _svg("<script>alert(1)</script>"),
        "handler": _svg('<rect width="9" height="9" onload="alert(1)"/>'),
        "foreign object": _svg(f"<foreignObject>{HTML.decode()}</foreignObject>"),
        "external picture": _svg(f'<image xlink:href="{url}" width="9" height="9"/>'),
        "external style": _svg(f'<style>@import "{url}";</style>'),
        "external use": _svg(f'<use xlink:href="{url}#x"/>'),
        "external entity": _svg("&x;", f'<!DOCTYPE svg [<!ENTITY x SYSTEM "{url}">]>'),
        "external DTD": _svg("", f'<!DOCTYPE svg SYSTEM "{url}">'),
        "file entity": _svg("&x;", '<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "10^9 laughs": _svg("<text>&a9;</text>", _laughs()),
    }


@pytest.mark.parametrize("name", list(_svgs("")))
def test_a_hostile_svg_is_kept_unread_and_shown_in_a_sandbox(
    without_decoder: LoupeServer, decoder: NoDecoder, name: str
) -> None:
    with Receiver() as elsewhere:
        content = _svgs(elsewhere.url_for("/fetched"))[name]
        answer = accepted(without_decoder.upload(content, "a.svg", extensions=BOTH))
        assert answer["fileType"] == "non-image"
        assert set(answer["extensionStatus"].values()) == {"failed"}
        delivered = visit(answer["url"])
        assert delivered.content == content
        assert is_guarded(delivered.headers)
        assert visit(f"{answer['url']}?tr=n-ik_ml_thumbnail").status_code == 400
        assert elsewhere.connections == 0
    assert decoder.asked == 0
