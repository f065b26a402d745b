"""The media API's endpoints: they parse, call and answer. `library.py` and `upload.py` do it."""

from typing import Annotated, Any, get_type_hints
from unicodedata import normalize

from fastapi import APIRouter, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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
    ListParameters,
    ListQuery,
    validated,
)
from app.files.upload import Uploader, UploadVersion
from app.logs import request_id

MAX_BODY_BYTES = 1024 * 1024


class DirectRoute(APIRoute):
    """Calls the endpoint with the request, the parameters of its path as they came and, if it has a
    `query`, what its model makes of the query string.

    FastAPI reads the same signature for OpenAPI, but does not run it: its way to resolve one takes
    longer than reading a file's row.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self._respond
        self._query_model: type[BaseModel] | None = get_type_hints(self.endpoint).get("query")

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        self.check(request)
        arguments = request.path_params
        if self._query_model is not None:
            query = validated(self._query_model, dict(request.query_params))
            arguments = {**arguments, "query": query}
        response: Response = await self.endpoint(request, **arguments)
        await response(scope, receive, send)

    def check(self, request: Request) -> None:
        """Comes before anything of the request is looked at. Raises ApiError."""


class KeyedRoute(DirectRoute):
    """Asks for a private key."""

    def check(self, request: Request) -> None:
        authenticator: Authenticator = request.app.state.authenticator
        authenticator.require_private_key(request.headers.get("authorization"))


def _library(request: Request) -> MediaLibrary:
    library: MediaLibrary = request.app.state.library
    return library


FileId = Annotated[str, openapi.identifier("A file's `fileId`.")]

upload_router = APIRouter(tags=["Upload"], route_class=DirectRoute)
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
async def upload_options(request: Request) -> Response:
    return Response(status_code=204, headers={"allow": "POST, OPTIONS"})


def _checked(parameters: ListParameters) -> ListQuery:
    check_page(parameters.skip, parameters.limit)
    _check_kind(parameters.kind, parameters.search_query)
    if parameters.file_type not in FILE_TYPES:
        raise BadRequest(
            "Your request contains invalid value for fileType parameter. "
            "Please provide one of the following: all, image, non-image."
        )
    direction, _, sort_field = parameters.sort.partition("_")
    if direction not in SORT_DIRECTIONS or sort_field not in SORT_FIELDS:
        raise BadRequest("Your request contains invalid value for sort parameters.")
    path, name, tags = parameters.path, parameters.name, parameters.tags or ""
    return ListQuery(
        skip=parameters.skip,
        limit=parameters.limit,
        sort_field=sort_field,
        descending=direction == "DESC",
        folder=None if path is None else sanitise_folder_path(path),
        name=None if name is None else normalize("NFC", _storable(name, "name")),
        tags=[tag.strip() for tag in _storable(tags, "tags").split(",") if tag.strip()],
        is_image=None if parameters.file_type == "all" else parameters.file_type == "image",
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
async def list_files(request: Request, query: Annotated[ListParameters, Query()]) -> Response:
    """Files in the media library: an array, oldest first unless `sort` says otherwise."""
    return JsonResponse(await _library(request).list(_checked(query)))


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
