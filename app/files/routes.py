"""The media API's endpoints: they parse, call and answer. `library.py` and `upload.py` do it."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from unicodedata import normalize

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from app.auth import Authenticator
from app.errors import BadRequest, JsonResponse
from app.files import openapi
from app.files.library import MediaLibrary
from app.files.names import is_storable_text, sanitise_folder_path
from app.files.schemas import (
    FILE_TYPES,
    LISTED_TYPES,
    MAX_LIMIT,
    MAX_SKIP,
    NOT_YET,
    SORT_DIRECTIONS,
    SORT_FIELDS,
    ListQuery,
)
from app.files.upload import Uploader, UploadVersion
from app.logs import request_id

MAX_BODY_BYTES = 1024 * 1024


class KeyedRoute(APIRoute):
    """Asks for a private key before anything of the request is looked at.

    Not by a dependency: FastAPI's way to resolve one costs as much as reading a file's row.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_with_key(request: Request) -> Response:
            authenticator: Authenticator = request.app.state.authenticator
            authenticator.require_private_key(request.headers.get("authorization"))
            return await handle(request)

        return handle_with_key


def _library(request: Request) -> MediaLibrary:
    library: MediaLibrary = request.app.state.library
    return library


FileId = Annotated[str, openapi.identifier("A file's `fileId`.")]
SORTS = tuple(f"{direction}_{field}" for direction in SORT_DIRECTIONS for field in SORT_FIELDS)

upload_router = APIRouter(tags=["Upload"])
router = APIRouter(prefix="/v1/files", tags=["Files"], route_class=KeyedRoute)


@upload_router.post("/api/v1/files/upload", **openapi.UPLOAD)
async def upload_file(request: Request) -> Response:
    """Stores a file, and tags it if `extensions` ask for it.

    Each extension is tried at once, for as long as the server's time budget allows; what has
    finished by then is in this response, the rest is `pending` and finishes in the background.
    """
    uploader: Uploader = request.app.state.uploader
    return JsonResponse(await uploader.upload(request, request_id()))


@upload_router.post("/api/v2/files/upload", **openapi.UPLOAD)
async def upload_file_v2(request: Request) -> Response:
    """As v1, but a client without a private key sends a JSON web token in `token`."""
    uploader: Uploader = request.app.state.uploader
    return JsonResponse(await uploader.upload(request, request_id(), UploadVersion.V2))


@upload_router.options("/api/v1/files/upload", include_in_schema=False)
@upload_router.options("/api/v2/files/upload", include_in_schema=False)
async def upload_options() -> Response:
    return Response(status_code=204, headers={"allow": "POST, OPTIONS"})


# A coroutine, though it waits for nothing: a plain function would be run in a thread.
async def _list_query(
    skip: Annotated[int, openapi.skip("How many files to leave out at the start.")] = 0,
    limit: Annotated[int, openapi.LIMIT] = MAX_LIMIT,
    sort: Annotated[
        str, openapi.choice(*SORTS, description="ASC_ or DESC_ and a field: `ASC_NAME`.")
    ] = "ASC_CREATED",
    path: Annotated[str | None, Query(description="Only this folder, not those in it.")] = None,
    name: Annotated[str | None, Query(description="The exact name.")] = None,
    tags: Annotated[str | None, Query(description="Comma separated; any of them.")] = None,
    file_type: Annotated[str, openapi.choice(*FILE_TYPES, alias="fileType")] = "all",
    kind: Annotated[
        str, openapi.choice("file", alias="type", description="Only `file` for now.")
    ] = "file",
    search_query: Annotated[
        str | None,
        Query(
            alias="searchQuery",
            description="Not supported yet.",
            json_schema_extra={"maxLength": 0},
        ),
    ] = None,
) -> ListQuery:
    check_page(skip, limit)
    _check_kind(kind, search_query)
    if file_type not in FILE_TYPES:
        raise BadRequest(
            "Your request contains invalid value for fileType parameter. "
            "Please provide one of the following: all, image, non-image."
        )
    direction, _, sort_field = sort.partition("_")
    if direction not in SORT_DIRECTIONS or sort_field not in SORT_FIELDS:
        raise BadRequest("Your request contains invalid value for sort parameters.")
    return ListQuery(
        skip=skip,
        limit=limit,
        sort_field=sort_field,
        descending=direction == "DESC",
        folder=None if path is None else sanitise_folder_path(path),
        name=None if name is None else normalize("NFC", _storable(name, "name")),
        tags=[tag.strip() for tag in _storable(tags or "", "tags").split(",") if tag.strip()],
        is_image=None if file_type == "all" else file_type == "image",
    )


def _storable(text: str, parameter: str) -> str:
    """Raises BadRequest for what no database can be asked for."""
    if not is_storable_text(text):
        raise BadRequest(f"Your request contains invalid value for {parameter} parameter.")
    return text


def check_page(skip: int, limit: int) -> None:
    if skip < 0:
        raise BadRequest(
            "The value of skip parameter should be greater than or equal to 0. "
            f"Value sent is {skip}."
        )
    if skip > MAX_SKIP:
        raise BadRequest(f"Maximum value of skip parameter is {MAX_SKIP}. Value sent is {skip}.")
    if limit < 1:
        raise BadRequest(f"Minimum value of limit parameter is 1. Value sent is {limit}.")
    if limit > MAX_LIMIT:
        raise BadRequest(f"Maximum value of limit parameter is {MAX_LIMIT}. Value sent is {limit}.")


def _check_kind(kind: str, search_query: str | None) -> None:
    if kind not in LISTED_TYPES:
        raise BadRequest(
            "Your request contains invalid value for type parameter. Please provide one of the "
            "following: file, file-version, folder, all."
        )
    if kind != "file":
        raise BadRequest(NOT_YET.format(f"type={kind}"))
    if search_query:
        raise BadRequest(NOT_YET.format("searchQuery"))


@router.get("", **openapi.LIST)
async def list_files(
    request: Request, query: Annotated[ListQuery, Depends(_list_query)]
) -> Response:
    """Files in the media library: an array, oldest first unless `sort` says otherwise."""
    return JsonResponse(await _library(request).list(query))


@router.get("/{file_id}/details", **openapi.DETAILS)
async def file_details(request: Request, file_id: FileId) -> Response:
    """The current version, and in `extensionStatus` the latest run of each extension on it."""
    return JsonResponse(await _library(request).details(file_id))


@router.patch("/{file_id}/details", **openapi.UPDATE)
async def update_file_details(request: Request, file_id: FileId) -> Response:
    """Changes the keys that are sent; `removeAITags` first, then `extensions`."""
    body = await read_body(request)
    return JsonResponse(await _library(request).update(file_id, body, request_id()))


@router.delete("/{file_id}", **openapi.DELETE)
async def delete_file(request: Request, file_id: FileId) -> Response:
    """Deletes the file with all its versions."""
    await _library(request).delete(file_id)
    return Response(status_code=204)


async def read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BadRequest(f"Your request has a body of more than {MAX_BODY_BYTES} bytes.")
    return bytes(body)
