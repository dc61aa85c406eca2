"""How much the heads of a model that trains differ, by the measures of `specialisation`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from bench.cells import Group
from bench.masks import mask_grid
from bench.models import LanguageModel, Model, build
from bench.record import STEP, Row
from bench.specialisation import Specialised, measure, uniform, weights_of
from methods import Method

INITIAL, TRAINED = "initial", "trained"  # before the first step, after the last
MOST_TOKENS = 2048  # whose N x N weights of every head have room
SEQUENCES = 4


@dataclass(frozen=True, kw_only=True)
class TrainedHeads(Specialised):
    """Measures of one layer of a model; `weights` is uniform, INITIAL or TRAINED.

    Attributes:
            data, recipe: what it was trained on, and how long; as rows have them.
        sequences: of the text, that were looked at.
        params: of the method; None where it has none.
    """

    device: str
    torch: str
    source: str
    model: str
    data: str
    recipe: str
    seq_len: int
    sequences: int
    params: str | None
    backend: str


def head_measures(
    trained: LanguageModel, model: Model, method: Method, group: Group, ids: Tensor, weights: str
) -> list[Specialised]:
    """Measures of every layer of a model as it is, on the first of ids [B, N].

    Before the first step those of uniform attention stand before them: what the mask alone does.
    A bias that the method's score_mod may add is left out.
    A copy attends densely in float32, since a kernel keeps no attention weights.
    """
    p = group.problem
    allowed = torch.from_numpy(mask_grid(method, replace(p, batch=1))).to(ids.device)
    about = {"method": method.name, "weights": weights, "seed": group.seed}
    found = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.float().repeat_interleave(p.group, dim=1) for x in (method.keys(k), v))
        attention = weights_of(q.float(), k, allowed)
        found.append(measure(attention, allowed, layer=len(found) + 1, **about))
        return (attention @ v).to(q.dtype)

    with torch.no_grad():
        copy = build(model, attend, p.seq_len, p.torch_dtype, ids.device, group.seed)
        copy.load_state_dict(trained.state_dict())
        copy.hidden(ids[:SEQUENCES])
    if weights == INITIAL:
        found.insert(0, measure(uniform(allowed), allowed, method=method.name, weights="uniform"))
    return found


def written(lines: Iterable[Specialised]) -> str:
    """As a row keeps them: JSON, a mapping for each line."""
    return json.dumps([asdict(line) for line in lines])


def after_training(rows: Sequence[Row], source: str) -> list[TrainedHeads]:
    """Lines of the rows whose heads were measured, each method on the backend measured last.

    Raises:
        ValueError: a row has damaged ones.
    """
    measured = [x for x in rows if x.phase == STEP and x.status == "ok" and x.heads]
    last = {(x.model, x.data, x.seq_len, x.method, x.params): x
            for x in sorted(measured, key=lambda row: row.time_utc)}  # fmt: skip
    return [line for row in last.values() for line in _lines(row, source)]


def _lines(row: Row, source: str) -> list[TrainedHeads]:
    names = "device", "torch", "model", "data", "recipe", "seq_len", "params", "backend"
    about = {name: getattr(row, name) for name in names}
    about |= {"source": source, "sequences": min(row.batch, SEQUENCES)}
    known = {field.name for field in fields(Specialised)}
    try:
        found = json.loads(row.heads)
        return [TrainedHeads(**{name: line[name] for name in known}, **about) for line in found]
    except (ValueError, KeyError, TypeError) as error:
        what = f"{source}: the heads of a row of {row.method}"
        raise ValueError(f"{what} are damaged ({error})") from None
