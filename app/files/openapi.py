"""How the endpoints look in OpenAPI, where FastAPI cannot tell: streamed bodies, raw answers."""

from typing import Any

from app.files.schemas import ErrorBody, FileObject, UpdateRequest, UploadFields, UploadResponse

UPLOAD_PATH = "/api/v1/files/upload"

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is not right; the message says why."},
    401: {"model": ErrorBody, "description": "No private key."},
    403: {"model": ErrorBody, "description": "An unknown private key."},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "No such file."}
}
_REFERENCE = "#/components/schemas/{model}"
_BASIC: list[dict[str, list[str]]] = [{"privateKey": []}]

UPLOADED: dict[str, Any] = {
    "fileId": "6673f88237b244ef54d60180",
    "name": "test-image.jpg",
    "size": 117079,
    "versionInfo": {"id": "6673f88237b244ef54d60180", "name": "Version 1"},
    "filePath": "/test-image.jpg",
    "url": "http://127.0.0.1:8000/demo/test-image.jpg",
    "fileType": "image",
    "height": 500,
    "width": 1000,
    "orientation": 1,
    "thumbnailUrl": "http://127.0.0.1:8000/demo/tr:n-media_library_thumbnail/test-image.jpg",
    "AITags": [{"name": "Landscape", "confidence": 93.5, "source": "google-auto-tagging"}],
    "extensionStatus": {"google-auto-tagging": "success", "aws-auto-tagging": "pending"},
}

DETAILED: dict[str, Any] = {
    "type": "file",
    "fileId": "6673f88237b244ef54d60180",
    "name": "test-image.jpg",
    "filePath": "/test-image.jpg",
    "tags": ["dress"],
    "AITags": [{"name": "Landscape", "confidence": 93.5, "source": "google-auto-tagging"}],
    "versionInfo": {"id": "6673f88237b244ef54d60180", "name": "Version 1"},
    "embeddedMetadata": None,
    "customCoordinates": None,
    "customMetadata": {},
    "isPrivateFile": False,
    "isPublished": True,
    "url": "http://127.0.0.1:8000/demo/test-image.jpg",
    "thumbnail": "http://127.0.0.1:8000/demo/tr:n-media_library_thumbnail/test-image.jpg",
    "fileType": "image",
    "mime": "image/jpeg",
    "height": 500,
    "width": 1000,
    "hasAlpha": False,
    "size": 117079,
    "createdAt": "2026-11-20T06:14:41.313Z",
    "updatedAt": "2026-11-20T06:14:44.021Z",
    "extensionStatus": {"google-auto-tagging": "success", "aws-auto-tagging": "success"},
}


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """Adds what streamed bodies refer to and how to authenticate; leaves out the unsent 422."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    components = schema.setdefault("components", {})
    for model in (UploadFields, UpdateRequest):
        definitions = model.model_json_schema(ref_template=_REFERENCE).get("$defs", {})
        components.setdefault("schemas", {}).update(definitions)
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["securitySchemes"] = {
        "privateKey": {
            "type": "http",
            "scheme": "basic",
            "description": "The private key as the user name; any password.",
        }
    }
    return schema


def _answer(model: Any, example: Any, errors: dict[int | str, Any]) -> dict[int | str, Any]:
    return {200: {"model": model, "content": {"application/json": {"example": example}}}, **errors}


def _upload_body() -> dict[str, Any]:
    schema = UploadFields.model_json_schema(ref_template=_REFERENCE)
    schema.pop("$defs", None)
    schema["properties"]["extensions"] = {
        "type": "string",
        "description": "JSON array of extensions.",
        "examples": ['[{"name":"google-auto-tagging","minConfidence":80,"maxTags":10}]'],
    }
    schema["properties"] = {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "The bytes; or, as a text field, base64, a data URI or an http(s) URL.",
        },
        **schema["properties"],
    }
    schema["required"] = ["file", "fileName"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _json_body(model: Any) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=_REFERENCE)
    schema.pop("$defs", None)
    return {"required": True, "content": {"application/json": {"schema": schema}}}


UPLOAD: dict[str, Any] = {
    "responses": _answer(
        UploadResponse,
        UPLOADED,
        {
            **_ERRORS,
            413: {"model": ErrorBody, "description": "The file is too large."},
            415: {"model": ErrorBody, "description": "The body is compressed."},
        },
    ),
    "openapi_extra": {"requestBody": _upload_body(), "security": [*_BASIC, {}]},
}
LIST: dict[str, Any] = {
    "responses": _answer(list[FileObject], [DETAILED], _ERRORS),
    "openapi_extra": {"security": _BASIC},
}
DETAILS: dict[str, Any] = {
    "responses": _answer(FileObject, DETAILED, {**_ERRORS, **_NOT_FOUND}),
    "openapi_extra": {"security": _BASIC},
}
UPDATE: dict[str, Any] = {
    "responses": _answer(FileObject, DETAILED, {**_ERRORS, **_NOT_FOUND}),
    "openapi_extra": {"security": _BASIC, "requestBody": _json_body(UpdateRequest)},
}
DELETE: dict[str, Any] = {
    "status_code": 204,
    "responses": {204: {"description": "Gone."}, **_ERRORS, **_NOT_FOUND},
    "openapi_extra": {"security": _BASIC},
}
