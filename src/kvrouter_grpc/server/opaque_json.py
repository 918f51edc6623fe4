"""Reads the JSON objects that a request carries for the engine."""

from collections.abc import Collection

import msgspec

from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import Json

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


def read_object(field: str, text: str, violations: Violations) -> dict[str, Json] | None:
    """Decode the JSON object in `field`; None when it is empty or wrong.

    Args:
        field: Name of the field.
        text: Its value, at most 1 MiB of JSON nested at most 32 deep.
        violations: Takes what is wrong.
    """
    if not text:
        return None
    if not violations.check_text(field, text, MAX_BYTES):
        return None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError):
        violations.add(field, 'is not valid JSON; give a JSON object such as {"key": "value"}')
        return None
    except RecursionError:
        violations.add(field, _TOO_DEEP)
        return None
    if not isinstance(value, dict):
        violations.add(field, f"must be a JSON object, got {_KINDS[type(value)]}")
        return None
    if _deeper_than(MAX_DEPTH, value):
        violations.add(field, _TOO_DEEP)
        return None
    return value


_TOO_DEEP = f"is nested too deep, at most {MAX_DEPTH} levels are allowed"
_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _deeper_than(limit: int, value: dict[str, Json]) -> bool:
    level: list[Collection[Json]] = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True
