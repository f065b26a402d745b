"""Reads the upload's multipart form as it arrives: fields into memory, the file into staging."""

import asyncio
from dataclasses import dataclass, field

from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from app.errors import ApiError, BadRequest
from app.files.staging import FileTooLarge, Sink, Staging, TextFile

MAX_PARTS = 100
MAX_FIELD_BYTES = 64 * 1024
MAX_BOUNDARY_CHARACTERS = 200
MAX_PART_HEADER_BYTES = 8 * 1024
MAX_EPILOGUE_BYTES = 8 * 1024


@dataclass(slots=True)
class UploadForm:
    """fields: every text field but `file`. file_url: set when `file` is to be fetched."""

    fields: dict[str, str] = field(default_factory=dict)
    has_file: bool = False
    file_url: str | None = None


class MalformedForm(BadRequest):
    def __init__(self, problem: str) -> None:
        super().__init__(f"Your request is not a valid multipart/form-data body: {problem}.")


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """idle_seconds: without a byte. deadline_seconds: for the whole body.

    restrict_client_params: client-side uploads may name neither extensions nor a webhook.
    """

    max_bytes: int
    max_pixels: int
    idle_seconds: float
    deadline_seconds: float
    restrict_client_params: bool


class TooSlow(ApiError):
    def __init__(self) -> None:
        super().__init__(408, "Your request's body arrives too slowly.")


async def read_upload_form(request: Request, staging: Staging, limits: UploadLimits) -> UploadForm:
    """Streams the file into `staging` and returns the rest of the form.

    Raises TooSlow (408), FileTooLarge (413), MalformedForm and others (400).
    """
    _refuse_encoded_body(request)
    _refuse_certainly_too_large(request, limits.max_bytes)
    reader = _FormReader(staging)
    parser = PushMultipartParser(
        _boundary(request),
        max_header_size=MAX_PART_HEADER_BYTES,
        max_segment_count=MAX_PARTS,
        strict=True,
    )
    try:
        async with asyncio.timeout(None) as patience:
            await _parse(parser, reader, _Body(request.receive, limits, patience))
        parser.close()
    except TimeoutError:
        raise TooSlow from None
    except ParserLimitReached:
        raise MalformedForm("it has too many parts, or too long headers") from None
    except MultipartError:
        raise MalformedForm("it is incomplete, or its parts cannot be told apart") from None
    except UnicodeDecodeError:
        raise MalformedForm("it holds text that is not UTF-8") from None
    return reader.form


class _Body:
    """A request's body as it arrives, with patience for clients only: not while a disk is slow."""

    def __init__(self, receive: Receive, limits: UploadLimits, patience: asyncio.Timeout) -> None:
        self._receive = receive
        self._idle_seconds = limits.idle_seconds
        self._patience = patience
        self._now = asyncio.get_running_loop().time
        self._deadline = self._now() + limits.deadline_seconds
        self._is_over = False

    async def next_chunk(self) -> bytes | None:
        """None at the end. Raises ClientDisconnect."""
        if self._is_over:
            return None
        self._patience.reschedule(min(self._deadline, self._now() + self._idle_seconds))
        message = await self._receive()
        self._patience.reschedule(None)
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._is_over = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


async def _parse(parser: PushMultipartParser, reader: "_FormReader", body: _Body) -> None:
    """Feeds the parser up to the chunk with the closing boundary.

    What follows, mostly one line break, means nothing; the parser refuses it in another chunk.
    """
    end = b"\r\n--" + parser.boundary + b"--"
    before = b""
    while (chunk := await body.next_chunk()) is not None:
        if not chunk:
            continue
        has_part_ended = False
        for event in parser.parse(chunk):
            if event is None:
                has_part_ended = True
                await reader.end()
            elif isinstance(event, MultipartSegment):
                has_part_ended = False
                reader.begin(event)
            elif reader.sink is not None:
                await reader.sink.write(event)
            else:
                reader.add_text(event)
        # Looked for only where it can be, and from there backwards.
        if has_part_ended and (before + chunk).rfind(end) >= 0:
            await _skip(body)
        before = (before + chunk[-len(end) :])[-len(end) :]


async def _skip(epilogue: _Body) -> None:
    size_bytes = 0
    while (chunk := await epilogue.next_chunk()) is not None:
        size_bytes += len(chunk)
        if size_bytes > MAX_EPILOGUE_BYTES:
            raise MalformedForm("it goes on after its end")


def _refuse_encoded_body(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Your request contains an encoded body. Send it without encoding.")


def _refuse_certainly_too_large(request: Request, max_bytes: int) -> None:
    """Base64 is a third longer than the file, and the form has other fields too."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes * 4 // 3 + 1024 * 1024:
        raise FileTooLarge


def _boundary(request: Request) -> str:
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    boundary: str = options.get("boundary", "")
    if content_type.lower() != "multipart/form-data":
        raise MalformedForm("its content type says something else")
    if not boundary or len(boundary) > MAX_BOUNDARY_CHARACTERS:
        raise MalformedForm("its boundary is missing or too long")
    return boundary


class _FormReader:
    """Follows the parser's events: a part begins, a piece of it, a part ends.

    sink: takes the pieces of the part that is the file; null in every other.
    """

    def __init__(self, staging: Staging) -> None:
        self.form = UploadForm()
        self.sink: Sink | None = None
        self._staging = staging
        self._name = ""
        self._text = bytearray()

    def begin(self, part: MultipartSegment) -> None:
        self._name = part.name
        self._text.clear()
        self.sink = None
        if self._name in self.form.fields or (self._name == "file" and self.form.has_file):
            raise MalformedForm(f"the field {self._name[:100]!a} stands there twice")
        if self._name == "file":
            self.form.has_file = True
            self.sink = self._staging if part.filename is not None else TextFile(self._staging)

    def add_text(self, piece: bytes | bytearray) -> None:
        self._text += piece
        if len(self._text) > MAX_FIELD_BYTES:
            raise MalformedForm(f"the field {self._name!a} is too long")

    async def end(self) -> None:
        if self.sink is None:
            self.form.fields[self._name] = self._text.decode()
        elif isinstance(self.sink, TextFile):
            await self.sink.finish()
            self.form.file_url = self.sink.url
