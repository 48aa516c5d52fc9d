"""Validation of JSON and YAML objects: keys and types, with errors that name both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

TYPE_NAMES = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


def check_fields(
    where: str, data: Any, required: Mapping[str, type], optional: Mapping[str, type] = MappingProxyType({})
) -> None:
    """Raise ValueError unless `data` is a mapping with these keys and types (`object`: any type)."""
    known = required | optional
    if not isinstance(data, Mapping):
        wanted = ", ".join(sorted(known)) or "no keys"
        raise ValueError(f"{where} is {data!r}; wanted an object with the keys {wanted}.")
    if missing := sorted(required.keys() - data.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    if unknown := sorted(data.keys() - known.keys()):
        wanted = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}. Known are {wanted}.")
    for key, kind in known.items():
        if key in data:
            check_type(where, key, data[key], kind)


def check_dataclass(where: str, data: Any, kind: type, omit: Sequence[str] = ()) -> None:
    """Raise ValueError unless `data` has the fields of a dataclass but those in `omit`, of any type."""
    fields = {field.name: field.default for field in dataclasses.fields(kind) if field.name not in omit}
    required = {name: object for name, default in fields.items() if default is dataclasses.MISSING}
    check_fields(where, data, required, dict.fromkeys(fields, object))


def check_type(where: str, key: str, value: Any, kind: type) -> None:
    """Raise ValueError unless the value of `key` has this type; a bool is not a whole number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
        raise ValueError(f"{where}: {key} is {value!r}; wanted {TYPE_NAMES[kind]}.")
