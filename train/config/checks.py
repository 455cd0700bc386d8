"""What configuration classes check of their fields: gin checks names, never types."""

import dataclasses
import types
import typing
from typing import Any, Literal


def matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the annotated type; an int is a float, a bool is not an int."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(matches(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = typing.get_origin(hint) or hint
    return hint is Any or isinstance(value, origin)


def describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_args(hint):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def check_types(config: Any) -> None:
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.init and not matches(value, hints[item.name]):
            raise ValueError(f"{type(config).__name__}.{item.name}={value!r} must be {describe(hints[item.name])}")


def at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{type(config).__name__}.{name}={value!r} must be at least {minimum}")
