"""What was aimed at in training on an H200, and what of it was reached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bench.derived import Cell, cell_of, problem_of
from bench.figures import Value
from bench.notes import NOTHING
from bench.paper_speeds import EAGER
from bench.record import Row
from bench.report import quantity
from bench.tables import markdown
from bench.trainings import Training, quotient, tokens_per_s

# Tokens/s of the same model in steps of 32768 tokens, by method, kind of backend and N: the least
# that an earlier prototype reached on one H200 (driver 580.159, torch 2.11.0, Triton 3.6).
PROTOTYPE = {
    ("standard", "sdpa", 1024): 525_700, ("standard", "flex", 1024): 505_000,
    ("spattention", "flex", 1024): 554_000, ("spattention_released", "flex", 1024): 523_000,
    ("standard", "sdpa", 8192): 361_200, ("standard", "flex", 8192): 327_800,
    ("spattention", "flex", 8192): 511_200, ("spattention_released", "flex", 8192): 432_900,
    ("standard", "sdpa", 32768): 187_100, ("standard", "flex", 32768): 151_200,
    ("spattention", "flex", 32768): 406_800,
}  # fmt: skip
PROTOTYPE_TOKENS = 32768
# Likewise at N = 1024 in steps of 4096 tokens, FlexAttention not compiled.
AS_RELEASED = {"standard": 39_800, "spattention_released": 13_000}
# What `spattention` was to reach at this N: over the fastest dense step, and of Amdahl's figure.
AIM_LENGTH, AIM_SPEEDUP, AIM_OF_AMDAHL = 32768, 2.2, 0.95
LONGER = 1.03  # times as long; what deserves a word
REACHED, MISSED = "reached", "missed"
UNSURE = "neither reached nor missed for certain"


def aims(found: Sequence[Training], swept: Sequence[Row] = ()) -> Iterator[str]:
    """What was aimed at, and what of it was reached.

    Args:
        swept: rows of a sweep, whose attention calls are held beside those of the steps' own run.
    """
    taken = {
        x.head.seq_len: x
        for x in found
        if (x.head.world_size, x.head.batch * x.head.seq_len) == (1, PROTOTYPE_TOKENS)
    }
    lines = [
        (f"`{method}`", str(n), f"{quantity(aim)}, {kind}", *_reached(taken[n], method, kind, aim))
        for (method, kind, n), aim in PROTOTYPE.items()
        if n in taken
    ]
    if lines:
        heads = ("method", "N", "prototype", "the same here", "fastest here")
        yield "\n".join(markdown(heads, lines, numbers=range(1, 5)))
        yield (
            "Aimed at were at least the tokens/s of an earlier prototype of the same model on an "
            "H200 with torch 2.11, where it had several the fewest; in brackets what of them was "
            "reached, rounded down, on the same kind of backend and on the fastest of all. "
            f"{_missed(_judged(taken))}"
        )
    if AIM_LENGTH in taken and (text := _speedup_aim(taken[AIM_LENGTH], swept)):
        yield text


def as_released(found: Training) -> str | None:
    """What was aimed at with FlexAttention as the released code calls it, and what was reached."""
    told = []
    for method, aim in AS_RELEASED.items():
        cell = Cell(method, None, EAGER)
        if found.us(cell) and (rate := tokens_per_s(found.rows[cell])):
            told.append(
                f"{quantity(aim)} with `{method}` on `{EAGER}` ({_percent(rate.y / aim)}: "
                f"{_verdict(rate, aim)})"
            )
    return f"Aimed at, as above, were {' and '.join(told)}." if told else None


def _judged(taken: Mapping[int, Training]) -> dict[str, list[tuple[str, int]]]:
    """Methods and N by verdict: the fastest cell is held against the most that was aimed at."""
    most = {}
    for (method, _, n), aim in PROTOTYPE.items():
        most[method, n] = max(aim, most.get((method, n), 0))
    judged: dict[str, list[tuple[str, int]]] = {}
    for (method, n), aim in most.items():
        if n in taken and (best := taken[n].best(method, None)):
            verdict = _verdict(tokens_per_s(taken[n].rows[best]), aim)
            judged.setdefault(verdict, []).append((method, n))
    return judged


def _missed(judged: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """What no backend reached of the prototype's tokens/s, or not for certain."""
    texts = {UNSURE: f"{UNSURE} on any backend", MISSED: f"{MISSED} on every backend"}
    told = (
        f"{text.capitalize()}: {', '.join(f'`{m}` at N = {n}' for m, n in judged[verdict])}."
        for verdict, text in texts.items() if verdict in judged
    )  # fmt: skip
    return " ".join(told) or "All are reached."


def _reached(found: Training, method: str, kind: str, aim: float) -> Iterator[str]:
    timed = [cell for cell in found.cells if cell.method == method and found.us(cell)]
    for cells in ([cell for cell in timed if cell.backend.startswith(kind)], timed):
        best = min(cells, key=found.us, default=None)
        rate = best and tokens_per_s(found.rows[best]).y
        yield f"{quantity(rate)}, {best.backend} ({_percent(rate / aim)})" if rate else NOTHING


def _percent(share: float) -> str:
    """Rounded down: a hundred is an aim that was reached."""
    return f"{math.floor(100 * share)}%"


def _speedup_aim(found: Training, swept: Sequence[Row]) -> str | None:
    best = found.best("spattention", None)
    gain, bound = (best and x(best) for x in (found.speedup, found.amdahl))
    if not gain:
        return None
    text = (
        f"At N = {AIM_LENGTH} a step with `spattention` ({best.backend}) is {gain.y:.2f} times as "
        f"fast as the fastest dense one{_between(gain)}; the aim, {AIM_SPEEDUP}, is "
        f"{_verdict(gain, AIM_SPEEDUP)}.{_rest(found, best)}"
    )
    if not bound:
        return f"{text} By Amdahl's law it has no figure: {found.no_amdahl(best)}."
    share = quotient(gain, bound)
    return (
        f"{text} The step is {share.y:.2f} times as fast as the speed-up of its attention call "
        f"allows by Amdahl's law{_between(share)}; the aim, {AIM_OF_AMDAHL}, is "
        f"{_verdict(share, AIM_OF_AMDAHL)}.{_by_sweep(found, best, bound, swept)}"
    )


def _rest(found: Training, best: Cell) -> str:
    """Where another backend of the method leaves more time to attention and less to the rest."""
    own = [c for c in found.cells if c[:2] == best[:2] and found.rows[c].other_us]
    least = min(own, key=lambda cell: found.rows[cell].other_us, default=best)
    here, there = (found.rows[cell].other_us for cell in (best, least))
    if not here or here < LONGER * there:
        return ""
    return (
        f" All but attention takes {here / 1e3:.1f} ms of it, and {there / 1e3:.1f} of a step on "
        f"{least.backend}."
    )


def _by_sweep(found: Training, best: Cell, bound: Value, swept: Sequence[Row]) -> str:
    """Amdahl's figure by a sweep's times of the same two calls."""
    calls = {
        cell_of(row): row
        for row in swept
        if (row.phase, row.clock, row.status) == ("fwd_bwd", "device", "ok")
        and problem_of(row) == problem_of(found.head)
    }
    other = found.amdahl(best, calls)
    if other is None:
        return ""
    gains = [x[found.dense].median_us / x[best].median_us for x in (found.calls, calls)]
    return (
        f" Its call is {gains[0]:.2f} times as fast as the dense one where the steps were timed, "
        f"{gains[1]:.2f} in a sweep: by that, the law allows {other.y:.2f}, not {bound.y:.2f}."
    )


def _between(value: Value) -> str:
    return f" ({value.low:.2f} to {value.high:.2f})" if value.low and value.high else ""


def _verdict(value: Value, aim: float) -> str:
    if (value.low or value.y) >= aim:
        return REACHED
    return MISSED if (value.high or value.y) < aim else UNSURE
