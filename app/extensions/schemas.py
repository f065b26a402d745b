"""What a caller asks for: the `extensions` array of an upload or update."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from app.errors import BadRequest, field_path

GOOGLE = "google-auto-tagging"
AWS = "aws-auto-tagging"
EXTENSIONS = (GOOGLE, AWS)
MAX_ITEMS = 10
MAX_DEPTH = 8


def _number(value: Any) -> Any:
    """JSON numbers only: neither "5" nor true is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("should be a number")
    return value


def _integer(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("should be an integer")
    return value


class AutoTagging(BaseModel):
    """One auto-tagging extension. Snake-case names are those of ImageKit's Python SDK."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"name": GOOGLE, "minConfidence": 80, "maxTags": 10}],
        },
    )

    name: Literal["google-auto-tagging", "aws-auto-tagging"]
    min_confidence: Annotated[
        float,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            validation_alias=AliasChoices("minConfidence", "min_confidence"),
            description="Tags below this confidence, in percent, are left out.",
        ),
        BeforeValidator(_number),
    ]
    max_tags: Annotated[
        int,
        Field(
            ge=0,
            le=30,
            validation_alias=AliasChoices("maxTags", "max_tags"),
            description="At most so many tags, the best ones.",
        ),
        BeforeValidator(_integer),
    ]


_adapter = TypeAdapter(AutoTagging)


class InvalidExtensions(BadRequest):
    def __init__(self, problem: str) -> None:
        super().__init__(
            f"Your request contains invalid value for extensions parameter. {problem}."
        )


def parse_extensions(value: Any) -> list[AutoTagging]:
    """The extensions asked for; `null` and `[]` are none.

    value: what the JSON text held. Raises InvalidExtensions, naming the element and the field.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidExtensions("extensions should be an array")
    if len(value) > MAX_ITEMS:
        raise InvalidExtensions(f"extensions should have at most {MAX_ITEMS} elements")
    wanted = [_parse_one(index, item) for index, item in enumerate(value)]
    seen: set[str] = set()
    for index, extension in enumerate(wanted):
        if extension.name in seen:
            raise InvalidExtensions(f"extensions[{index}].name {extension.name} stands there twice")
        seen.add(extension.name)
    return wanted


def _parse_one(index: int, item: Any) -> AutoTagging:
    where = f"extensions[{index}]"
    if not isinstance(item, dict):
        raise InvalidExtensions(f"{where} should be an object")
    if item.get("name") not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise InvalidExtensions(f"{where}.name should be one of: {known}")
    try:
        return _adapter.validate_python(item)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        what = problem["msg"].removeprefix("Value error, ")
        field = field_path((where, *problem["loc"]))
        raise InvalidExtensions(f"{field} {what[:1].lower()}{what[1:]}") from None


class InvalidJson(ValueError):
    """Not JSON, or nested deeper than anything a request needs."""


def read_json(text: str | bytes) -> Any:
    """Parses JSON as strictly as it is worth: UTF-8, no key twice, no NaN, bounded depth.

    A comma before a closing bracket is forgiven: a documented example of the API that Loupe is
    compatible with has one. Raises InvalidJson.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InvalidJson("should be UTF-8") from None
    try:
        value = _loads(text)
    except InvalidJson:
        value = _loads(_without_trailing_commas(text))
    if _is_deeper_than(value, MAX_DEPTH):
        raise InvalidJson(f"should be nested at most {MAX_DEPTH} levels deep")
    if not _is_encodable(value):
        raise InvalidJson("should hold no lone surrogates")
    return value


def _is_encodable(value: Any) -> bool:
    """False when a text in it is half of a character, which no answer could repeat."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except InvalidJson:
        raise
    except RecursionError:
        raise InvalidJson(f"should be nested at most {MAX_DEPTH} levels deep") from None
    except ValueError:
        raise InvalidJson("should be valid JSON") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidJson("should hold no key twice")
    return value


def _no_constant(name: str) -> Any:
    raise InvalidJson(f"should not hold {name}")


# A string without an end is taken whole too, else each quote in it would be tried as a start.
_STRING_OR_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+"?)|,(?=\s*[}\]])')


def _without_trailing_commas(text: str) -> str:
    return _STRING_OR_TRAILING_COMMA.sub(lambda match: match[1] or "", text)


def _is_deeper_than(value: Any, levels: int) -> bool:
    nested: list[Any] = [value]
    for _ in range(levels + 1):
        nested = [
            child
            for item in nested
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not nested:
            return False
    return True
