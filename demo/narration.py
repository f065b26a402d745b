"""What the demo prints."""

import json
from typing import Any

WIDTH = 96


class DemoFailed(Exception):
    """One sentence for whoever watches."""


def step(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def say(text: str) -> None:
    print(f"    {text}".rstrip(), flush=True)


def show(value: Any) -> None:
    """JSON, with what fits into one line in one line."""
    for line in _lines(value, WIDTH - 4):
        say(line)


def _lines(value: Any, width: int, taken: int = 0) -> list[str]:
    """taken: characters of the first line that the key before the value needs."""
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or taken + len(short) < width:
        return [short]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    items = (
        [(f"{json.dumps(key, ensure_ascii=False)}: ", item) for key, item in value.items()]
        if isinstance(value, dict)
        else [("", item) for item in value]
    )
    lines = [opening]
    for number, (key, item) in enumerate(items, start=1):
        first, *rest = _lines(item, width - 2, len(key))
        lines += [f"  {key}{first}", *(f"  {line}" for line in rest)]
        lines[-1] += "," if number < len(items) else ""
    return [*lines, closing]
