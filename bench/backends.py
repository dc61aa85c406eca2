"""Ways to run a Problem, by name: the executors of methods/, dense kernels, other libraries."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import peers
from bench.timing import Call
from methods import Banded, Method, Problem
from methods.attend import NO_LSE, plan
from methods.banded import shared_window
from methods.flash_kernels import flash_4_missing, flash_refusal, kernel_for
from methods.varlen import refusal as varlen_refusal

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

BACKWARD_PHASES = ("bwd", "fwd_bwd")


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        about: one line for `list`.
        uses_blocks: whether it visits the blocks of a BlockMask (and has a layout to build).
        compiles: whether its first call compiles, so that it is worth doing ahead.
        few_kernels: whether the names of a call's kernels say what it ran.
        build: (method, problem, device, block_size) -> (q, k, v) -> (out, lse or None).
        missing: device -> why this machine cannot run it, or None.
        refuses: (method, problem, device, phase) -> why not this cell, or None.
        ties: whether it takes q for k where a method shares them; the gradient is one for both.
        computes: whether it can compute a method at all, whatever the problem.
        says_no: what its kernels raise, besides what compilers do, where they do not take a
            problem.
    """

    name: str
    about: str
    build: Callable[[Method, Problem, torch.device, tuple[int, int]], Attention]
    uses_blocks: bool = False
    compiles: bool = False
    few_kernels: bool = False
    missing: Callable[[torch.device], str | None] = lambda device: None
    refuses: Callable[[Method, Problem, torch.device, str], str | None] = lambda *cell: None
    ties: bool = False
    computes: Callable[[Method], bool] = lambda method: True
    says_no: tuple[type[Exception], ...] = ()

    def refusal(self, method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
        """Why this machine, method, problem and phase cannot be measured, or None."""
        if phase == "layout" and not self.uses_blocks:
            return "no block lists to build"
        if phase == "prepare" and (not self.uses_blocks or method.static):
            return "nothing follows from the inputs here"
        try:
            method.validate(p)
        except ValueError as error:
            return str(error)
        return self.missing(device) or self.refuses(method, p, device, phase)


def first_calls(attention: Attention, inputs: tuple[Tensor, ...], phases: Sequence[str]) -> None:
    """What samplers will call: without gradients and with them, as far as the phases need it."""
    if "fwd" in phases:
        phase_call(attention, "fwd", inputs)()
    if any(phase in BACKWARD_PHASES for phase in phases):
        forward_backward(attention, inputs)


def phase_call(attention: Attention, phase: str, inputs: tuple[Tensor, ...]) -> Call:
    """What one sample of a phase runs."""
    q, k, v, grad_out = inputs
    if phase == "fwd":
        return partial(forward, attention, *(x.detach() for x in (q, k, v)))
    if phase == "fwd_bwd":
        return lambda: forward_backward(attention, inputs)
    out = attention(q, k, v)[0]
    return lambda: torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)


def forward(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        return attention(q, k, v)


def forward_backward(attention: Attention, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q, k, v, grad_out = inputs
    return torch.autograd.grad(attention(q, k, v)[0], (q, k, v), grad_out)


def _planned(name: str) -> Callable[..., Attention]:
    def build(
        method: Method, p: Problem, device: torch.device, block_size: tuple[int, int]
    ) -> Attention:
        return plan(method, p, name, block_size)

    return build


def _no_compiler(device: torch.device) -> str | None:
    if device.type != "cpu":
        return None
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "FlexAttention's CPU kernel needs a C++ compiler (c++, g++ or clang++ on the PATH)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "FlexAttention's CPU kernel needs Python's headers (python3-dev)"
    return None


def _flex_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    if p.dtype == "float64":
        return "FlexAttention's kernels have no float64"
    if device.type == "cpu" and method.needs_lse:
        return f"{NO_LSE}, which {method.name} needs"
    return _forward_only_on_cpu(device, phase)


def _eager_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    return _forward_only_on_cpu(device, phase)


def _forward_only_on_cpu(device: torch.device, phase: str) -> str | None:
    if device.type == "cpu" and phase in BACKWARD_PHASES:
        return "FlexAttention has no backward on a CPU"
    return None


def _build_sdpa(
    kernel: SDPBackend, method: Method, p: Problem, device: torch.device, block_size: tuple
) -> Attention:
    grouped = p.group > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=p.causal, enable_gqa=grouped
            )  # fmt: skip
        return out, None

    return run


def _cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "a CUDA kernel"


def _sdpa_refuses(
    kernel: SDPBackend, method: Method, p: Problem, device: torch.device, phase: str
) -> str | None:
    """Asks the dispatcher itself, with tensors that hold no data of that size."""
    if device.type == "cpu":
        return None
    tensors = [
        torch.empty((1, heads, p.seq_len, p.head_dim), dtype=p.torch_dtype, device=device)
        for heads in (p.q_heads, p.kv_heads, p.kv_heads)
    ]
    for tensor in tensors:
        tensor.requires_grad_(phase in BACKWARD_PHASES)
    parameters = torch.backends.cuda.SDPAParams(*tensors, None, 0.0, p.causal, p.group > 1)
    can_use = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
    }[kernel]
    return None if can_use(parameters, False) else f"{kernel.name} does not take this problem"


def _sdpa(name: str, about: str, kernel: SDPBackend, missing: Callable) -> Backend:
    return Backend(
        name, about, partial(_build_sdpa, kernel), missing=missing,
        refuses=partial(_sdpa_refuses, kernel), computes=_among("standard"), few_kernels=True,
    )  # fmt: skip


def _among(*names: str) -> Callable[[Method], bool]:
    return lambda method: method.name in names


def _flash_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    return flash_refusal(p)


def _varlen_missing(device: torch.device) -> str | None:
    try:
        kernel_for(device)
    except ValueError as error:
        return str(error)
    return None


def _varlen_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    return varlen_refusal(method, p) or kernel_for(device).refusal(p)


def _fa4_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    if shared_window(method, p) is None:
        return f"flash-attn-4 has one window for all heads; those of {method.name} differ"
    return flash_refusal(p)


def _build_fa4(
    method: Banded, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> Attention:
    from flash_attn.cute import flash_attn_func

    reach = shared_window(method, p)
    left = None if reach + 1 >= p.seq_len else reach
    right = 0 if p.causal else left
    window = (None, None) if left is None else (left, right)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        # Its layout is [B, N, H, D]; it takes any strides, so that nothing is copied.
        out, _ = flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=p.causal, window_size=window
        )
        return out.transpose(1, 2), None

    return run


# How flash-attn-4 refuses a problem, before it has launched a kernel.
FLASH_4_SAYS_NO = (AssertionError, NotImplementedError, ValueError)

# In the order of every table and figure.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "flex", "compiled FlexAttention over block lists (CPU: forward only)",
            _planned("flex"), uses_blocks=True, compiles=True, few_kernels=True,
            missing=_no_compiler, refuses=_flex_refuses,
        ),
        Backend(
            "flash", "compiled FlexAttention over block lists, by flash-attn-4's kernels",
            _planned("flash"), uses_blocks=True, compiles=True, few_kernels=True,
            missing=flash_4_missing, refuses=_flash_refuses, says_no=FLASH_4_SAYS_NO,
        ),
        Backend(
            "varlen", "flash-attention over shifted keys, all heads in one call; banded, causal",
            _planned("varlen"), missing=_varlen_missing, refuses=_varlen_refuses,
            computes=lambda method: isinstance(method, Banded), few_kernels=True,
            says_no=FLASH_4_SAYS_NO,
        ),
        Backend(
            "eager", "FlexAttention without torch.compile, as the released code calls it: N x N",
            _planned("eager"), refuses=_eager_refuses,
        ),
        Backend(
            "blockwise", "plain PyTorch over the listed blocks; any device, float64, both passes",
            _planned("blockwise"), uses_blocks=True,
        ),
        Backend(
            "fa4", "flash-attn-4 called directly: dense, and windows that all heads share",
            _build_fa4, missing=flash_4_missing, refuses=_fa4_refuses,
            computes=_among("standard", "sliding_window", "local_only"), few_kernels=True,
            says_no=FLASH_4_SAYS_NO,
        ),
        _sdpa(
            "sdpa-flash", "PyTorch's SDPA, flash kernel (flash-attn 2 on CUDA)",
            SDPBackend.FLASH_ATTENTION, lambda device: None,
        ),
        _sdpa(
            "sdpa-cudnn", "PyTorch's SDPA, cuDNN kernel", SDPBackend.CUDNN_ATTENTION, _cuda_only
        ),
        _sdpa(
            "sdpa-efficient", "PyTorch's SDPA, memory-efficient kernel",
            SDPBackend.EFFICIENT_ATTENTION, _cuda_only,
        ),
        Backend(
            "hf", "transformers' own modules, without their projections", peers.hf_build,
            missing=lambda device: peers.not_installed("transformers"), refuses=peers.hf_refuses,
            computes=_among("longformer", "bigbird", "reformer"), ties=True,
        ),
        Backend(
            "reformer-pytorch", "LSHAttention of reformer-pytorch", peers.reformer_pytorch_build,
            missing=lambda device: peers.not_installed("reformer_pytorch"),
            refuses=peers.reformer_pytorch_refuses, computes=_among("reformer"), ties=True,
        ),
        Backend(
            "xformers", "memory_efficient_attention of xformers, causal or in one window",
            peers.xformers_build, missing=peers.xformers_missing, refuses=peers.xformers_refuses,
            computes=_among("standard", "sliding_window", "longformer"), few_kernels=True,
        ),
    )
}  # fmt: skip
