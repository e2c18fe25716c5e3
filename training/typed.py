"""Mappings as YAML gives them -> dataclasses whose fields have types: every name known, every value of its type.

A dataclass checks the ranges of its fields itself, by `require` in its `__post_init__`.
"""

import ast
import dataclasses
import difflib
import inspect
import types
import typing
from typing import Any, Literal

from hfclip_errors import UsageError


# Asked for out of habit. The answer is why there is none.
ACCUMULATION = ("gradient_accumulation_steps", "accumulation_steps", "gradient_accumulation", "accum_freq")
NO_ACCUMULATION = (
    " The gradients of small contrastive batches do not add up to that of the large one: each pair would meet only the "
    "negatives of its own small batch. optim.micro_batch_size saves the same memory and is exact."
)
NAMES = {type(None): "null", str: "text", int: "int", float: "number", bool: "true or false", dict: "mapping"}


def require(condition: bool, name: str, found: Any, expected: str) -> None:
    """Raises UsageError unless the condition holds."""
    if not condition:
        raise UsageError(f"{name}: found {found!r}, expected {expected}.")


def build(kind: type, values: Any, name: str = "") -> Any:
    """Builds the dataclass `kind` from a mapping; an empty section of a file is None.

    Args:
        name: of the value, for messages; "" for the whole.

    Raises:
        UsageError: for an unknown name, a wrong type or choice, or what the dataclass finds out of range.
    """
    values, hints = {} if values is None else values, typing.get_type_hints(kind)
    require(isinstance(values, dict), name, values, "a mapping of settings")
    prefix = f"{name}." if name else ""
    for key in values:
        if key not in hints:
            what = "setting" if name else "section"
            raise UsageError(f"Unknown {what} {prefix + str(key)!r}.{nearest(str(key), list(hints), prefix)}")
    given = {key: cast(value, hints[key], prefix + key) for key, value in values.items()}
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in given and not _has_default(f)]
    given |= {key: build(hints[key], None, prefix + key) for key in missing if dataclasses.is_dataclass(hints[key])}
    for key in missing:
        require(key in given, prefix + key, None, describe(hints[key]))
    return kind(**given)


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def cast(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint`; only changes of form that lose nothing (1 -> 1.0, "1e-3" -> 0.001, "a,b" -> ["a", "b"])."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind, parts = typing.get_origin(option), typing.get_args(option)
        if kind is Literal and value in parts:
            return value
        if kind is list and isinstance(value, (list, str)):
            words = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value
            return [cast(word, parts[0], f"{name}[{i}]") for i, word in enumerate(words)]
        if kind is dict and isinstance(value, dict):
            return {
                cast(key, parts[0], name): cast(entry, parts[1], f"{name}[{key!r}]") for key, entry in value.items()
            }
        if option is Any:
            return value
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:  # YAML reads 1e-3 as text
                return float(value)
            except ValueError:
                continue
        # bool is a kind of int in Python, but `batch_size: true` is a mistake.
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise UsageError(f"{name}: found {value!r}, expected {describe(hint)}.")


def describe(hint: Any) -> str:
    """A type in words."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(describe, parts))
    if kind is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if kind is list:
        return "list of mappings" if dataclasses.is_dataclass(parts[0]) else f"list of {describe(parts[0])}"
    return NAMES.get(kind or hint, "mapping")


def field_docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        node.target.id: " ".join(text.value.value.split())
        for node, text in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """The hint that follows an unknown name."""
    if name.lstrip("-").rsplit(".", 1)[-1].replace("-", "_") in ACCUMULATION:
        return NO_ACCUMULATION
    close = [k for k in known if k.endswith("." + name.lstrip("-"))] or difflib.get_close_matches(name, known, n=1)
    return (
        f" Did you mean {prefix + close[0]!r}?"
        if close
        else f" Expected one of: {', '.join(prefix + k for k in known)}."
    )
