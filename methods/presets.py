"""The table of methods: every preset under its name, in the order of tables and figures."""

from __future__ import annotations

import difflib

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


def _check_value(method: Method) -> None:
    """Whether it is what it was whenever it is equal to what it was, and has a name."""
    kind = type(method)
    if not isinstance(name := getattr(method, "name", None), str) or not name:
        raise ValueError(f"{kind.__name__} has no name; give the class an attribute name, a str")
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise ValueError(f"{name}: its class {kind.__name__} must be a @dataclass(frozen=True)")
    try:
        hash(method)
    except TypeError as error:
        why = f"a field cannot be hashed ({error}); give a tuple in place of a list"
        raise ValueError(f"{name}: {why}") from None
