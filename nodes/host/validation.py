"""Nodes take what they say they take: numbers within their bounds, choices that there are, texts.

The host asks this of what is typed into a workflow, not of what comes to the same inputs through links. It also hands
links with unknown names to `execute`, as programs send them that write image0 for images.image0.
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


def validate_inputs_of(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` raises ValueError or TypeError for names and values that its schema does not allow."""
    run = node.__dict__["execute"].__func__
    signature = inspect.signature(run)

    @functools.wraps(run)
    def execute(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        _require_known(node, kwargs)
        checks, takes_lists = _checks(node)
        for name, value in signature.bind(cls, *args, **kwargs).arguments.items():
            if name in checks:
                for one in _each(name, value) if takes_lists else [value]:
                    checks[name](one)
        return run(cls, *args, **kwargs)

    node.execute = classmethod(execute)
    return node


@functools.cache
def _checks(node: type[io.ComfyNode]) -> tuple[Checks, bool]:
    """What to ask of each input, and whether the node takes lists.

    FILE_INPUTS of a node are left out: it looks its files up itself, as their list changes while the host runs.
    """
    schema = node.define_schema()
    own = getattr(node, "FILE_INPUTS", ())
    kinds = {
        io.Int.Input: _number,
        io.Float.Input: _number,
        io.Boolean.Input: _switch,
        io.String.Input: _text,
        io.Combo.Input: _choice,
    }
    inputs = [one for one in schema.inputs if type(one) in kinds and one.id not in own]
    return {one.id: functools.partial(kinds[type(one)], one) for one in inputs}, schema.is_input_list


def _require_known(node: type[io.ComfyNode], given: Mapping[str, Any]) -> None:
    """Raises ValueError for inputs that the node does not have, and names those that it has."""
    names = _names(node)
    for name, value in given.items():
        # An input that grows is a mapping of its sockets, unless a link has its bare name.
        if name not in names or (names[name] != (name,) and not isinstance(value, Mapping)):
            raise ValueError(unknown_input(node, name))


def unknown_input(node: type[io.ComfyNode], name: str) -> str:
    """An error for an input that the node does not have: the name to use in place of `name`, or all names."""
    sockets = _names(node).values()
    known = ", ".join(
        several[0] if len(several) == 1 else f"{several[0]} to {several[-1]}" for several in sockets
    )
    nearest = [socket for several in sockets for socket in several if name in socket.split(".")]
    remedy = f"Connect it to {nearest[0]}." if nearest else "Rename or remove it."
    display_name = node.define_schema().display_name
    return f"{display_name} has no input {shorten(repr(name))}; its inputs are {known}. {remedy}"


@functools.cache
def _names(node: type[io.ComfyNode]) -> dict[str, tuple[str, ...]]:
    """Names of each input in a prompt: its own, or of an input that grows, images.image0 and so on."""
    return {
        one.id: tuple(f"{one.id}.{name}" for name in one.template.names)
        if isinstance(one, io.Autogrow.Input)
        else (one.id,)
        for one in node.define_schema().inputs
    }


def _each(name: str, values: Any) -> Any:
    if not len(values):
        raise ValueError(f"{name} is an empty list; wanted at least one value. Check what is linked to it.")
    return values


def _number(declared: io.Float.Input | io.Int.Input, value: Any) -> None:
    low, high = declared.min, declared.max
    kind, wanted = (Integral, "a whole number") if isinstance(declared, io.Int.Input) else (Real, "a number")
    within = isinstance(value, kind) and (low is None or low <= value) and (high is None or value <= high)
    # true and false are numbers to Python, but not where they choose a place in a tensor
    if within and not isinstance(value, bool) and (isinstance(value, Integral) or math.isfinite(value)):
        return
    bounds = "" if low is None or high is None else f" from {low} to {high}"
    raise ValueError(
        f"{declared.id} is {shorten(repr(value))}; wanted {wanted}{bounds}. Check what is linked to it."
    )


def _switch(declared: io.Boolean.Input, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{declared.id} is {shorten(repr(value))}; wanted true or false. Check what is linked to it."
        )


def _text(declared: io.String.Input, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{declared.id} is {shorten(repr(value))}; wanted a text. Check what is linked to it."
        )
    require_text(value, declared.id)


def _choice(declared: io.Combo.Input, value: Any) -> None:
    if not isinstance(value, str) or value not in declared.options:
        raise ValueError(
            f"{declared.id} is {shorten(repr(value))}; wanted one of: {', '.join(declared.options)}. Choose one of them."
        )
