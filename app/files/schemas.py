"""What goes over the wire: the fields of requests, and the shape of responses for OpenAPI.

camelCase lives here only, by one alias generator.
"""

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel

from app.errors import BadRequest, first_problem
from app.extensions.schemas import AutoTagging, InvalidJson, parse_extensions, read_json
from app.files.names import (
    has_control_characters,
    is_storable_text,
    sanitise_file_name,
    sanitise_folder_path,
)

M = TypeVar("M", bound=BaseModel)

MAX_TAG_CHARACTERS = 500
MAX_DESCRIPTION_CHARACTERS = 20_000
_COORDINATES = re.compile(r"[0-9]{1,6}(?:,[0-9]{1,6}){3}")
NOT_YET = "Your request contains {} parameter, which this version of Loupe does not support yet."


class TagsTooLong(BadRequest):
    def __init__(self) -> None:
        super().__init__(
            "Your request contains invalid value for tags parameter. "
            "Combined length of all tags should be less than or equal to 500."
        )


def clean_tags(tags: list[str]) -> list[str] | None:
    """Tags in order, each once, without blank ones; None when none are left."""
    sent = [tag.strip() for tag in tags if tag.strip()]
    cleaned = list(dict.fromkeys(sent))
    if any("%" in tag or has_control_characters(tag) for tag in cleaned):
        raise BadRequest(
            "Your request contains invalid value for tags parameter. "
            "Tags should hold neither % nor control characters."
        )
    if sum(len(tag) for tag in sent) > MAX_TAG_CHARACTERS:
        raise TagsTooLong
    return cleaned or None


def _form_tags(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        items = _form_json(value, "tags")
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError("should be an array of strings")
        return clean_tags(items)
    return clean_tags(value.split(","))


def _form_bool(value: Any) -> Any:
    if isinstance(value, str):
        known = {"true": True, "false": False}
        if value.strip().lower() not in known:
            raise ValueError("should be true or false")
        return known[value.strip().lower()]
    return value


def _form_json(value: str, parameter: str) -> Any:
    try:
        return read_json(value)
    except InvalidJson as error:
        raise BadRequest(
            f"Your request contains invalid value for {parameter} parameter. {parameter} {error}."
        ) from None


def _form_extensions(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return parse_extensions(_form_json(value, "extensions") if value.strip() else None)


def no_custom_metadata_yet(value: Any) -> dict[str, Any]:
    """Custom fields do not exist yet, so no key can be right."""
    if value is not None and not isinstance(value, dict):
        raise BadRequest(
            "Invalid custom metadata.", errors={"customMetadata": "should be an object"}
        )
    if value:
        raise BadRequest(
            "Invalid custom metadata.",
            errors={str(key): "no such custom metadata field exists" for key in value},
        )
    return {}


def _form_custom_metadata(value: Any) -> Any:
    if isinstance(value, str):
        value = _form_json(value, "customMetadata") if value.strip() else None
    return no_custom_metadata_yet(value)


def _coordinates(value: Any) -> Any:
    if isinstance(value, str):
        compact = value.replace(" ", "")
        if not compact:
            return None
        if not _COORDINATES.fullmatch(compact):
            raise ValueError("should be four whole numbers: x,y,width,height")
        return compact
    return value


def _description(value: Any) -> Any:
    if isinstance(value, str):
        if not is_storable_text(value):
            raise ValueError("should hold neither NUL nor lone surrogates")
        return value or None
    return value


def _comma_separated(value: Any) -> Any:
    if isinstance(value, str):
        return {item.strip() for item in value.split(",") if item.strip()}
    return value


def _blank_is_none(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


def _not_yet(parameter: str) -> BeforeValidator:
    def refuse(value: Any) -> Any:
        if value in (None, ""):
            return None
        raise BadRequest(NOT_YET.format(parameter))

    return BeforeValidator(refuse)


NOT_SUPPORTED: Any = Field(description="Not supported yet.", json_schema_extra={"maxLength": 0})
FormBool = Annotated[bool, BeforeValidator(_form_bool)]
Coordinates = Annotated[
    str | None, BeforeValidator(_coordinates), Field(examples=["10,10,200,200"])
]
Description = Annotated[
    Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)] | None,
    BeforeValidator(_description),
]
WebhookUrl = Annotated[
    str | None,
    BeforeValidator(_blank_is_none),
    Field(
        description="Gets the final status of each extension that the response calls pending.",
        examples=["https://example.com/hooks/loupe"],
    ),
]


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=False)


class UploadFields(Camel):
    """Every text field of an upload's form, checked. Fields that are not known are ignored."""

    file_name: Annotated[str, BeforeValidator(sanitise_file_name)]
    use_unique_file_name: FormBool = True
    tags: Annotated[
        list[str] | None,
        BeforeValidator(_form_tags),
        Field(description="Comma separated, at most 500 characters in all."),
    ] = None
    folder: Annotated[str, BeforeValidator(sanitise_folder_path)] = "/"
    is_private_file: FormBool = False
    is_published: FormBool = True
    custom_coordinates: Coordinates = None
    response_fields: Annotated[
        set[str],
        BeforeValidator(_comma_separated),
        Field(
            description="Comma separated: tags, customCoordinates, isPrivateFile, isPublished, "
            "customMetadata. metadata, embeddedMetadata and selectedFieldsSchema are accepted "
            "and left out for now."
        ),
    ] = Field(default_factory=set)
    extensions: Annotated[
        list[AutoTagging],
        BeforeValidator(_form_extensions),
        Field(description="JSON array."),
    ] = Field(default_factory=list)
    webhook_url: WebhookUrl = None
    overwrite_file: FormBool = True
    overwrite_ai_tags: Annotated[FormBool, Field(alias="overwriteAITags")] = True
    overwrite_tags: FormBool = True
    overwrite_custom_metadata: FormBool = True
    custom_metadata: Annotated[
        dict[str, Any],
        BeforeValidator(_form_custom_metadata),
        Field(description="JSON object; `{}` until custom fields exist."),
    ] = Field(default_factory=dict)
    description: Description = None
    transformation: Annotated[str | None, _not_yet("transformation"), NOT_SUPPORTED] = None
    checks: Annotated[str | None, _not_yet("checks"), NOT_SUPPORTED] = None

    @classmethod
    def parse(cls, fields: dict[str, str]) -> Self:
        """Raises BadRequest with one sentence that names the field."""
        if "fileName" not in fields:
            raise BadRequest("Your request is missing fileName parameter.")
        return validated(cls, fields)


class Publish(Camel):
    model_config = ConfigDict(extra="forbid")

    is_published: StrictBool
    include_file_versions: StrictBool = False


def _json_extensions(value: Any) -> Any:
    return parse_extensions(value)


def _json_tags(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("should be an array of strings, or null")
    return clean_tags(value)


def _removed_ai_tags(value: Any) -> Any:
    if value is None or value == "all":
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest(
            "Your request contains invalid value for removeAITags. Please provide 'all' or an "
            "array of strings. Example - ['t-shirt','summer-sale']."
        )
    return value


class UpdateRequest(Camel):
    """The body of an update. What is absent stays as it is; `null` unsets."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "tags": ["dress", "summer"],
                    "removeAITags": "all",
                    "extensions": [
                        {"name": "google-auto-tagging", "minConfidence": 80, "maxTags": 10}
                    ],
                    "webhookUrl": "https://example.com/hooks/loupe",
                }
            ]
        }
    )

    tags: Annotated[list[str] | None, BeforeValidator(_json_tags)] = None
    remove_ai_tags: Annotated[
        list[str] | Literal["all"] | None,
        BeforeValidator(_removed_ai_tags),
        Field(alias="removeAITags", description="Removed before the extensions run."),
    ] = None
    extensions: Annotated[list[AutoTagging], BeforeValidator(_json_extensions)] = Field(
        default_factory=list
    )
    webhook_url: WebhookUrl = None
    custom_coordinates: Coordinates = None
    custom_metadata: Annotated[
        dict[str, Any],
        BeforeValidator(no_custom_metadata_yet),
        Field(json_schema_extra={"maxProperties": 0}),
    ] = Field(default_factory=dict)
    description: Description = None
    publish: Publish | None = None

    @model_validator(mode="after")
    def _publish_stands_alone(self) -> Self:
        if self.publish is not None and len(self.model_fields_set) > 1:
            raise ValueError("publish cannot be combined with other parameters")
        return self

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises BadRequest with one sentence that names the key."""
        try:
            value = read_json(body)
        except InvalidJson as error:
            raise BadRequest(f"Your request contains invalid JSON: it {error}.") from None
        if not isinstance(value, dict):
            raise BadRequest("Your request contains invalid JSON: it should be an object.")
        return validated(cls, value)


SORT_FIELDS = (
    "NAME",
    "CREATED",
    "UPDATED",
    "HEIGHT",
    "WIDTH",
    "SIZE",
    "RELEVANCE",
    "DURATION",
    "ORIGINAL_CREATION_DATE",
)
SORT_DIRECTIONS = ("ASC", "DESC")
FILE_TYPES = ("all", "image", "non-image")
MAX_LIMIT = 1000
MAX_SKIP = 2**31 - 1
LISTED_TYPES = ("file", "file-version", "folder", "all")
SORTS = tuple(f"{direction}_{field}" for direction in SORT_DIRECTIONS for field in SORT_FIELDS)

# What parameters may be is described here and checked elsewhere, with the contract's messages.


def skipped(description: str) -> Any:
    return Field(description=description, json_schema_extra={"minimum": 0, "maximum": MAX_SKIP})


LIMIT: Any = Field(
    description=f"1 to {MAX_LIMIT}.", json_schema_extra={"minimum": 1, "maximum": MAX_LIMIT}
)


def choice(*values: str, alias: str | None = None, description: str | None = None) -> Any:
    return Field(
        alias=alias,
        description=description or ", ".join(values),
        json_schema_extra={"enum": list(values)},
    )


class ListParameters(Camel):
    """The query string of a list, as it is sent."""

    skip: Annotated[int, skipped("How many files to leave out at the start.")] = 0
    limit: Annotated[int, LIMIT] = MAX_LIMIT
    sort: Annotated[str, choice(*SORTS, description="ASC_ or DESC_ and a field: `ASC_NAME`.")] = (
        "ASC_CREATED"
    )
    path: Annotated[str | None, Field(description="Only this folder, not those in it.")] = None
    name: Annotated[str | None, Field(description="The exact name.")] = None
    tags: Annotated[str | None, Field(description="Comma separated; any of them.")] = None
    file_type: Annotated[str, choice(*FILE_TYPES)] = "all"
    kind: Annotated[str, choice("file", alias="type", description="Only `file` for now.")] = "file"
    search_query: Annotated[str | None, NOT_SUPPORTED] = None


class ListQuery(BaseModel):
    """The checked query of a list. tags: a file with any of them is listed."""

    skip: int = 0
    limit: int = 1000
    sort_field: str = "CREATED"
    descending: bool = False
    folder: str | None = None
    name: str | None = None
    tags: list[str] = Field(default_factory=list)
    is_image: bool | None = None


def _not_always(when: str) -> Any:
    """A key that some answers lack. As a factory, since a default would show in the schema."""
    return Field(default_factory=lambda: None, description=when)


OF_IMAGES = "Of images only."
ON_REQUEST = "If `responseFields` names it."
Url = Annotated[str, Field(json_schema_extra={"format": "uri"})]


class FileVersionInfo(BaseModel):
    id: str
    name: str = Field(examples=["Version 1"])


class AITagModel(BaseModel):
    name: str
    confidence: float = Field(ge=0, le=100)
    source: Literal["google-auto-tagging", "aws-auto-tagging"]


ExtensionStatus = dict[str, Literal["success", "pending", "failed"]]


class FileObject(Camel):
    """A file's details. `extensionStatus` is that of the latest run of each extension."""

    type: Literal["file", "file-version"]
    file_id: str
    name: str
    file_path: str
    tags: list[str] | None
    ai_tags: Annotated[list[AITagModel] | None, Field(alias="AITags")]
    version_info: FileVersionInfo
    embedded_metadata: dict[str, Any] | None
    custom_coordinates: str | None
    custom_metadata: dict[str, Any]
    is_private_file: bool
    is_published: bool
    url: Url
    thumbnail: Url = _not_always(OF_IMAGES)
    file_type: Literal["image", "non-image"]
    mime: str
    height: int = _not_always(OF_IMAGES)
    width: int = _not_always(OF_IMAGES)
    size: int
    has_alpha: bool = _not_always(OF_IMAGES)
    description: str = _not_always("If the file has one.")
    created_at: datetime
    updated_at: datetime
    extension_status: ExtensionStatus = _not_always(
        "If an extension has run on it; in an update, one of this request. Not in lists."
    )


class UploadResponse(Camel):
    """The answer to an upload; some keys only on request, see `responseFields`."""

    file_id: str
    name: str
    size: int
    version_info: FileVersionInfo
    file_path: str
    url: Url
    file_type: Literal["image", "non-image"]
    height: int = _not_always(OF_IMAGES)
    width: int = _not_always(OF_IMAGES)
    orientation: int = _not_always(OF_IMAGES)
    thumbnail_url: Url = _not_always(OF_IMAGES)
    ai_tags: Annotated[list[AITagModel] | None, Field(alias="AITags")]
    tags: list[str] | None = _not_always(ON_REQUEST)
    custom_coordinates: str | None = _not_always(ON_REQUEST)
    is_private_file: bool = _not_always(ON_REQUEST)
    is_published: bool = _not_always(ON_REQUEST)
    custom_metadata: dict[str, Any] = _not_always(ON_REQUEST)
    description: str = _not_always("If one was sent.")
    extension_status: ExtensionStatus = _not_always("If the request has extensions.")


class ErrorBody(BaseModel):
    message: str
    help: str
    reason: str = _not_always("Stable, where programs may want to tell refusals apart.")
    errors: dict[str, str] = _not_always("By key, for custom metadata.")


def validated(model: type[M], value: dict[str, Any]) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise BadRequest(first_problem(error.errors(include_url=False))) from None
