"""`GET /{imagekitId}/{path}`: the stored bytes, or a thumbnail of them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from sqlalchemy import Row
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.db import Database
from app.delivery.lookup import read_version_at
from app.delivery.negotiation import accepts
from app.delivery.ranges import Part, RangeNotSatisfiable, is_not_modified, requested_part
from app.delivery.signed_urls import has_valid_signature
from app.delivery.thumbnails import Thumbnails
from app.delivery.transformations import Target, parse_target
from app.errors import ApiError, BadRequest
from app.files.names import has_control_characters
from app.files.types import is_shown_inline
from app.ids import is_id
from app.images import ImageUnreadable
from app.keys import Keys
from app.storage.base import BlobMissing, Storage

RawHeaders = list[tuple[bytes, bytes]]

REVALIDATED = b"max-age=0, must-revalidate"
# A file is always a guest in the page that shows it: it runs nothing and is what it says.
AS_A_GUEST = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"access-control-allow-origin", b"*"),
    (b"cross-origin-resource-policy", b"cross-origin"),
)


class NotDelivered(ApiError):
    def __init__(self) -> None:
        super().__init__(
            404,
            "The requested file does not exist.",
            headers={"ik-error": "ENOENT - File not found", "cache-control": "no-store"},
        )


class SignatureRequired(ApiError):
    def __init__(self) -> None:
        super().__init__(
            401,
            "Your request needs a valid signature to access this file.",
            headers={"ik-error": "EACCES - Access denied", "cache-control": "no-store"},
        )


class NoThumbnail(BadRequest):
    def __init__(self, why: str) -> None:
        super().__init__(f"There is no thumbnail of this file: {why}")


@dataclass(frozen=True, slots=True)
class Delivery:
    """Answers delivery requests, as an ASGI application. imagekit_id: starts every raw path."""

    db: Database
    storage: Storage
    thumbnails: Thumbnails
    keys: Keys
    imagekit_id: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"allow": "GET, HEAD"})
        response = await self.respond(Request(scope, receive))
        await response(scope, receive, send)

    async def respond(self, request: Request) -> Response:
        """Raises NotDelivered, SignatureRequired, BadRequest."""
        raw_path = request.scope["raw_path"].decode("latin-1").removeprefix(f"/{self.imagekit_id}/")
        query = request.scope["query_string"].decode("latin-1")
        target = parse_target(_decoded(raw_path), query)
        if target.version_id is not None and not is_id(target.version_id):
            raise NotDelivered
        version = await self.db.read(read_version_at, target.path, target.version_id)
        if version is None or not version.is_published:
            raise NotDelivered
        if version.is_private and not target.thumbnail:
            self._require_signature(f"{raw_path}?{query}")
        if target.thumbnail:
            return await self._thumbnail(request, version)
        return await self._original(request, version, target)

    def _require_signature(self, raw_target: str) -> None:
        private_keys = [pair.private for pair in self.keys.pairs]
        if not has_valid_signature(raw_target, private_keys, self.db.clock.wall()):
            raise SignatureRequired

    async def _thumbnail(self, request: Request, version: Row[Any]) -> Response:
        if not version.is_image:
            raise NoThumbnail("it is not an image.")
        as_webp = accepts(request.headers.getlist("accept"), "image/webp")
        etag = f'"{version.sha256[:32]}-{"webp" if as_webp else "t"}"'
        headers = _headers(version, etag, is_private=False)
        headers.append((b"vary", b"Accept"))
        if is_not_modified(request.headers, etag):
            return _with(headers, Response(status_code=304))
        try:
            thumbnail = await self.thumbnails.get(version.blob_key, as_webp=as_webp)
        except ImageUnreadable as error:
            raise NoThumbnail(str(error)) from None
        except BlobMissing:
            raise NotDelivered from None
        headers.append((b"content-type", thumbnail.mime.encode()))
        headers.append((b"content-length", b"%d" % len(thumbnail.content)))
        return _with(headers, Response(thumbnail.content))

    async def _original(self, request: Request, version: Row[Any], target: Target) -> Response:
        etag = f'"{version.sha256[:32]}"'
        headers = _headers(version, etag, is_private=version.is_private)
        headers.append((b"accept-ranges", b"bytes"))
        if is_not_modified(request.headers, etag):
            return _with(headers, Response(status_code=304))
        headers.append((b"content-type", _content_type(version.mime).encode()))
        if target.as_attachment or not is_shown_inline(version.mime):
            headers.append((b"content-disposition", _attachment(version.name).encode()))
        size = version.size_bytes
        try:
            is_get = request.method == "GET"  # ranges belong to no other method
            part = requested_part(request.headers, size, etag) if is_get else None
        except RangeNotSatisfiable:
            raise ApiError(
                416,
                "The requested range lies outside the file.",
                headers={"content-range": f"bytes */{size}"},
            ) from None
        if part is not None:
            content_range = f"bytes {part.start}-{part.end - 1}/{size}"
            headers.append((b"content-range", content_range.encode()))
        return await self._bytes(
            request, version.blob_key, part or Part(0, size), headers, 206 if part else 200
        )

    async def _bytes(
        self, request: Request, key: str, part: Part, headers: RawHeaders, status: int
    ) -> Response:
        headers.append((b"content-length", b"%d" % (part.end - part.start)))
        if request.method == "HEAD":
            return _with(headers, Response(status_code=status))
        pieces = self.storage.read(key, part.start, part.end)
        try:
            first = await anext(pieces, b"")
        except BlobMissing:
            raise NotDelivered from None
        if len(first) == part.end - part.start:
            return _with(headers, Response(first, status))
        return _with(headers, StreamingResponse(_chained(first, pieces), status))


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _decoded(raw_path: str) -> str:
    """The path after the endpoint, percent-decoded, with a slash at the start.

    Doubled slashes are not folded: a file has one path.
    """
    try:
        path = unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        raise NotDelivered from None
    if has_control_characters(path) or "" in path.split("/"):
        raise NotDelivered
    return "/" + path


def _headers(version: Row[Any], etag: str, *, is_private: bool) -> RawHeaders:
    caching = b"private, " if is_private else b"public, "
    return [
        (b"etag", etag.encode()),
        (b"last-modified", _http_date(version.created_at)),
        (b"cache-control", caching + REVALIDATED),
        *AS_A_GUEST,
    ]


@lru_cache(maxsize=1024)
def _http_date(when: datetime) -> bytes:
    return format_datetime(when, usegmt=True).encode()


def _with(headers: RawHeaders, response: Response) -> Response:
    """With these and no others, as they are: to look through them and encode them is what takes
    the time in a response."""
    response.raw_headers = headers
    return response


def _content_type(mime: str) -> str:
    return f"{mime}; charset=utf-8" if mime.startswith("text/") else mime


def _attachment(name: str) -> str:
    ascii_name = name.encode("ascii", "replace").decode().replace("?", "_")
    return f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"
