"""Validation of a node's inputs against its schema; ComfyUI itself only validates widget values.

Values that come through links are not checked by the host. It also passes links with unknown names to
`execute`, as programs send them that write image0 for images.image0.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ...easyref_core.mllm.instructions import require_text
from ...easyref_core.utils.errors import shorten

Checks = dict[str, Callable[[Any], None]]  # by the input's name


def validates_inputs(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Class decorator: `execute` raises ValueError or TypeError for inputs outside the node's schema.

    Inputs that the node lists in FILE_INPUTS are left out: it looks its files up itself, because their list
    changes while the host runs.
    """
    execute = node.__dict__["execute"].__func__
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def validated(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        _require_known(node, kwargs)
        checks, takes_lists = _checks(node)
        for name, value in signature.bind(cls, *args, **kwargs).arguments.items():
            if name in checks:
                for element in _require_filled(name, value) if takes_lists else [value]:
                    checks[name](element)
        return execute(cls, *args, **kwargs)

    node.execute = classmethod(validated)
    return node


@functools.cache
def _checks(node: type[io.ComfyNode]) -> tuple[Checks, bool]:
    """The check of each input, and True if the node takes lists."""
    schema = node.define_schema()
    files = getattr(node, "FILE_INPUTS", ())
    kinds = {
        io.Int.Input: _require_number,
        io.Float.Input: _require_number,
        io.Boolean.Input: _require_bool,
        io.String.Input: _require_text,
        io.Combo.Input: _require_option,
    }
    inputs = [entry for entry in schema.inputs if type(entry) in kinds and entry.id not in files]
    return {entry.id: functools.partial(kinds[type(entry)], entry) for entry in inputs}, schema.is_input_list


def _require_known(node: type[io.ComfyNode], inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for inputs that the node does not have."""
    names = _socket_names(node)
    for name, value in inputs.items():
        # An input that grows is a mapping of its sockets, unless a link has its bare name.
        if name not in names or (names[name] != (name,) and not isinstance(value, Mapping)):
            raise ValueError(unknown_input(node, name))


def unknown_input(node: type[io.ComfyNode], name: str) -> str:
    """Error message for an input that the node does not have: the name to use instead, or all names."""
    sockets = _socket_names(node).values()
    known = ", ".join(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" for names in sockets)
    nearest = [socket for names in sockets for socket in names if name in socket.split(".")]
    remedy = f"Connect it to {nearest[0]}." if nearest else "Rename or remove it."
    display_name = node.define_schema().display_name
    return f"{display_name} has no input {shorten(repr(name))}; its inputs are {known}. {remedy}"


@functools.cache
def _socket_names(node: type[io.ComfyNode]) -> dict[str, tuple[str, ...]]:
    """Names of each input in a prompt: its id, or of an input that grows images.image0 and so on."""
    return {
        entry.id: tuple(f"{entry.id}.{name}" for name in entry.template.names)
        if isinstance(entry, io.Autogrow.Input)
        else (entry.id,)
        for entry in node.define_schema().inputs
    }


def _require_filled(name: str, values: Any) -> Any:
    if not len(values):
        raise ValueError(f"{name} is an empty list; wanted at least one value. Check what is linked to it.")
    return values


def _invalid_value_message(
    entry: Any, value: Any, allowed: str, remedy: str = "Check what is linked to it."
) -> str:
    return f"{entry.id} is {shorten(repr(value))}; wanted {allowed}. {remedy}"


def _require_number(entry: io.Float.Input | io.Int.Input, value: Any) -> None:
    low, high = entry.min, entry.max
    kind, noun = (Integral, "a whole number") if isinstance(entry, io.Int.Input) else (Real, "a number")
    within = isinstance(value, kind) and (low is None or low <= value) and (high is None or value <= high)
    # true and false are numbers to Python, but as an index they select differently
    if within and not isinstance(value, bool) and (isinstance(value, Integral) or math.isfinite(value)):
        return
    bounds = "" if low is None or high is None else f" from {low} to {high}"
    raise ValueError(_invalid_value_message(entry, value, noun + bounds))


def _require_bool(entry: io.Boolean.Input, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(_invalid_value_message(entry, value, "true or false"))


def _require_text(entry: io.String.Input, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(_invalid_value_message(entry, value, "a text"))
    require_text(value, entry.id)


def _require_option(entry: io.Combo.Input, value: Any) -> None:
    if not isinstance(value, str) or value not in entry.options:
        raise ValueError(
            _invalid_value_message(entry, value, f"one of: {', '.join(entry.options)}", "Choose one of them.")
        )
