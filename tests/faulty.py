"""A method that does what takes processes down, for `tests/kills.py`; `how` says which."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods import Method, Problem
from methods.method import MaskMod, ScoreMod

HANG_S = 90  # bounded: what nobody ends must end by itself
TOO_MUCH = 1 << 50  # bytes


def _segfault(device: torch.device) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(device: torch.device) -> None:
    for _ in range(HANG_S):
        if device.type == "cuda":
            torch.cuda._sleep(1_500_000_000)  # cycles: about a second
            torch.cuda.synchronize(device)
        else:
            time.sleep(1)


def _device_assert(device: torch.device) -> None:
    torch.zeros(1, device=device)[torch.full((1,), 7, device=device)]


def _raise(device: torch.device) -> None:
    raise RuntimeError("this method is wrong")


ACTS: dict[str, Callable[[torch.device], None]] = {
    "segfault": _segfault,
    "hang": _hang,
    "device_assert": _device_assert,
    "raise": _raise,
}


class _Greedy(torch.autograd.Function):
    """The identity, which asks for too much memory in one of its passes."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, how: str) -> Tensor:
        ctx.how = how
        if how == "oom_fwd":
            torch.empty(TOO_MUCH, dtype=torch.int8, device=score.device)
        return score.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.how == "oom_bwd":
            torch.empty(TOO_MUCH, dtype=torch.int8, device=grad.device)
        return grad, None


@dataclass(frozen=True)
class Faulty(Method):
    """Causal attention, unless `how` names a fault."""

    name: ClassVar[str] = "faulty"
    paper: ClassVar[str] = "none"
    how: str = "none"

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> MaskMod:
        ACTS.get(self.how, lambda device: None)(device)
        how = self.how

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            if how == "compile_raise" and torch.compiler.is_compiling():
                raise RuntimeError("this method cannot be compiled")
            return q_idx >= kv_idx

        return mask

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> ScoreMod | None:
        if not self.how.startswith("oom"):
            return None
        how = self.how
        return lambda score, b, h, q_idx, kv_idx: _Greedy.apply(score, how)


FAULTY = Faulty()
