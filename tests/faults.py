"""Planted faults: each is put into what a kernel receives or returns, for any executor.

`python -m tests.faults` runs all of them through the gate, on a CPU with the plain PyTorch
executor, with `--device cuda` through compiled FlexAttention, and writes a table of what each one
takes of its error budget, on which device and by which code.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.gate import Gate
from bench.oracle import Verdict
from bench.record import environment
from methods import METHODS, Problem, block_mask
from methods.attend import compiled_copy
from methods.blockwise import blockwise

Executor = Callable[[Tensor, Tensor, Tensor, BlockMask, float], tuple[Tensor, Tensor | None]]

RESULTS = Path(__file__).resolve().parent.parent / "results"
TABLE = RESULTS / "cpu" / "faults.csv"
GPU_TABLE = RESULTS / "h200" / "faults.csv"
CLEAN = "none"
# What the rounding of bfloat16 hides; float32 hides nothing.
HIDDEN = {"float32": set(), "bfloat16": {"scale_off_slightly"}}
LISTS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        block_mask: lists of full width with a place for every head, so that one head can differ.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_mask: BlockMask
    scale: float

    @property
    def head(self) -> int:
        """The head of the faults that sit in one head: a middle one."""
        return self.q.shape[1] // 2


def correct(call: Call) -> Call:
    return call


def mask_shifted(call: Call) -> Call:
    """Every query sees the keys of the query before it."""
    mask = call.block_mask.mask_mod
    return _masked(call, lambda b, h, i, j: mask(b, h, i - 1, j))


def one_key_more(call: Call) -> Call:
    """One query in 64 sees the key after its last one too."""
    mask = call.block_mask.mask_mod
    return _masked(
        call, lambda b, h, i, j: mask(b, h, i, j) | ((i % 64 == 17) & mask(b, h, i + 1, j))
    )


def one_key_less(call: Call) -> Call:
    """One query in 64 does not see its last key."""
    mask = call.block_mask.mask_mod
    return _masked(
        call, lambda b, h, i, j: mask(b, h, i, j) & ((i % 64 != 17) | mask(b, h, i - 1, j))
    )


def block_lost(call: Call) -> Call:
    """The last block of queries, in one head, misses a block of keys: a full one if it can."""
    lists = _lists(call)
    place = (0, call.head, -1)
    kind = "full_kv_num_blocks" if lists["full_kv_num_blocks"][place] else "kv_num_blocks"
    lists[kind][place] -= 1
    return _listed(call, lists)


def partial_as_full(call: Call) -> Call:
    """The last block of queries, in one head, takes its last partial block for a full one."""
    lists = _lists(call)
    place = (0, call.head, -1)
    count, full = lists["kv_num_blocks"][place], lists["full_kv_num_blocks"][place]
    count -= 1
    lists["full_kv_indices"][place][full] = lists["kv_indices"][place][count]
    full += 1
    return _listed(call, lists)


def q_list_missing(call: Call) -> Call:
    """The last block of keys that is seen, in one head, lists no queries for the backward."""
    lists = _lists(call)
    counts = [lists[name][0, call.head] for name in ("q_num_blocks", "full_q_num_blocks")]
    last = (counts[0] + counts[1]).nonzero()[-1]
    for count in counts:
        count[last] = 0
    return _listed(call, lists)


def scale_off(call: Call) -> Call:
    """The scores are multiplied by 1.02 times the scale."""
    return replace(call, scale=1.02 * call.scale)


def scale_off_slightly(call: Call) -> Call:
    """The scores are multiplied by 1.001 times the scale: less than bfloat16 can show."""
    return replace(call, scale=1.001 * call.scale)


def nan_row(call: Call) -> Call:
    """One query of one head is not a number."""
    q = call.q.clone()
    q[0, call.head, 3 * q.shape[2] // 4] = torch.nan
    return replace(call, q=q)


def gradient_twice(call: Call) -> Call:
    """dK of one key and value head is added up twice."""
    k, head = call.k.clone(), call.k.shape[1] // 2
    k[0, head] += call.k[0, head] - call.k[0, head].detach()  # which is 0
    return replace(call, k=k)


FAULTS: dict[str, Callable[[Call], Call]] = {
    fault.__name__: fault
    for fault in (
        mask_shifted, one_key_more, one_key_less, block_lost, partial_as_full, q_list_missing,
        scale_off, scale_off_slightly, nan_row, gradient_twice,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the table; error_budget is the share of the budget, above 1 is caught."""

    fault: str
    method: str
    seq_len: int
    dtype: str
    error_budget: float
    caught: bool


def on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    return blockwise(q, k, v, mask, scale=scale)


def on_cuda() -> Executor:
    """Compiled FlexAttention, under a code object of its own: each faulty mask is a variant."""

    return compiled_copy(_flex)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, None]:
    return flex_attention(q, k, v, block_mask=mask, scale=scale), None


def verdicts(
    name: str, p: Problem, device: torch.device | str = "cpu", execute: Executor = on_cpu,
    block_size: tuple[int, int] = (128, 128),
) -> Iterator[tuple[str, Verdict]]:  # fmt: skip
    """The gate's verdict on the correct call, under the name "none", and on every fault."""
    method = METHODS[name]
    gate = Gate(p, block_size, torch.Generator(device).manual_seed(0), seed=0)
    lists = block_mask(method, p, device, block_size)

    def attention(
        plant: Callable[[Call], Call], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, None]:
        call = plant(Call(q, k, v, lists, p.head_dim**-0.5))
        return execute(call.q, call.k, call.v, call.block_mask, call.scale)[0], None

    for fault, plant in {CLEAN: correct, **FAULTS}.items():
        yield fault, gate.verdict(method, partial(attention, plant), ("fwd_bwd",), ties=False)


def findings(seq_len: int, dtype: str, device: str = "cpu") -> Iterator[Finding]:
    p = Problem(seq_len=seq_len, head_dim=64, dtype=dtype)
    for method in ("spattention", "standard"):
        execute = on_cpu if device == "cpu" else on_cuda()
        for fault, verdict in verdicts(method, p, device, execute):
            excess = verdict.error_budget
            yield Finding(fault, method, seq_len, dtype, excess, not verdict.passed)


def read_table(path: Path = TABLE) -> list[Finding]:
    with open(path, newline="") as file:
        return [
            Finding(
                line["fault"], line["method"], int(line["seq_len"]), line["dtype"],
                float(line["error_budget"]), line["caught"] == "True",
            )
            for line in csv.DictReader(file)
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of planted faults.")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    env = environment(torch.device(args.device))
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*(field.name for field in fields(Finding)), "device", "torch", "code"))
        for seq_len, dtype in itertools.product(args.seq_len, args.dtype):
            for x in findings(seq_len, dtype, args.device):
                found = (x.fault, x.method, x.seq_len, x.dtype, f"{x.error_budget:.3g}", x.caught)
                writer.writerow((*found, env.device, env.torch, env.code))
                file.flush()
                print(*found, flush=True)


def _masked(call: Call, mask_mod: Callable) -> Call:
    mask = call.block_mask
    lists = [getattr(mask, name) for name in LISTS]
    altered = BlockMask(mask.seq_lengths, *lists, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod)
    return replace(call, block_mask=altered)


def _lists(call: Call) -> dict[str, Tensor]:
    """Copies of the lists, with an entry for every head."""
    heads = call.q.shape[1]
    lists = {name: getattr(call.block_mask, name) for name in LISTS}
    return {n: x.expand(-1, heads, *x.shape[2:]).clone() for n, x in lists.items()}


def _listed(call: Call, lists: dict[str, Tensor]) -> Call:
    mask = call.block_mask
    altered = BlockMask(
        mask.seq_lengths, *(lists[name] for name in LISTS),
        BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod,
    )  # fmt: skip
    return replace(call, block_mask=altered)


if __name__ == "__main__":
    main()
