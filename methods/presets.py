"""The table of methods: every preset under its name, in the order of tables and figures."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from functools import cached_property

from methods.bigbird import BigBird
from methods.longformer import Longformer
from methods.mehc import MehcBigBird, MehcLongformer, MehcReformer
from methods.method import Method
from methods.reformer import Reformer
from methods.sliding_window import SlidingWindow
from methods.spattention import GappedBands, LocalOnly, SPAttention, SPAttentionReleased
from methods.standard import Standard

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Standard(),
        SlidingWindow(),
        LocalOnly(),
        SPAttention(),
        SPAttentionReleased(),
        GappedBands(),
        Longformer(),
        BigBird(),
        Reformer(),
        MehcLongformer(),
        MehcBigBird(),
        MehcReformer(),
    )
}


def resolve(method: str | Method) -> Method:
    """The Method of a name, or the Method itself.

    Raises:
        ValueError: neither a Method nor the name of a preset; names the nearest, or all. Or a
            Method that is no value, by which its results could be kept.
    """
    if isinstance(method, Method):
        _check_value(method)
        return method
    if not isinstance(method, str):
        raise ValueError(f"method is {method!r}; it must be a Method or the name of a preset")
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(METHODS)}"
        raise ValueError(f"method is {method!r}, which is unknown; {hint}")
    return METHODS[method]


def _follows(kind: type[Method], attribute: str) -> bool:
    return isinstance(getattr(kind, attribute, None), cached_property)


def _check_value(method: Method) -> None:
    """Whether it is what it was whenever it is equal to what it was, and has a name."""
    kind = type(method)
    if not isinstance(name := getattr(method, "name", None), str) or not name:
        raise ValueError(f"{kind.__name__} has no name; give the class an attribute name, a str")
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen
    known = {field.name for field in fields(kind)} if frozen else ()
    loose = [x for x in vars(method) if x not in known and not _follows(kind, x)]
    if loose or (is_dataclass(kind) and not frozen):
        has = f"{', '.join(loose)} can change" if loose else "it is not frozen"
        raise ValueError(f"{name}: {has}; a method's parameters are fields of a frozen dataclass")
    try:
        hash(method)
    except TypeError as error:
        why = f"a field cannot be hashed ({error}); give a tuple in place of a list"
        raise ValueError(f"{name}: {why}") from None
