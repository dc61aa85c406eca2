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
        ValueError: neither a Method nor the name of a preset; names the nearest, or all.
    """
    if isinstance(method, Method):
        try:
            hash(method)
        except TypeError as error:
            why = f"a field cannot be hashed ({error}); give a tuple in place of a list"
            raise ValueError(f"{method.name}: {why}") from None
        return method
    if not isinstance(method, str):
        raise ValueError(f"method is {method!r}; it must be a Method or the name of a preset")
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(METHODS)}"
        raise ValueError(f"method is {method!r}, which is unknown; {hint}")
    return METHODS[method]
