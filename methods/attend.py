"""attend(q, k, v, method): a method's layout, an executor, and back to token order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from methods.blockwise import blockwise
from methods.compiled import compiled_copy
from methods.flash_kernels import flash_4_missing, flash_refusal
from methods.longformer import Longformer, attend_globals
from methods.method import DTYPES, Layout, Method, Problem, ScoreMod
from methods.presets import METHODS, resolve
from methods.varlen import Windows

Executor = Callable[[Layout], tuple[Tensor, Tensor | None]]

# Compiled FlexAttention, the same by flash-attn-4's kernels, FlexAttention uncompiled (N x N
# scores), and plain PyTorch: any device, float64, both passes.
EXECUTORS = ("flex", "flash", "eager", "blockwise")
# What attend takes besides "auto". varlen is flash-attention over shifted keys, for causal banded
# methods of at most two windows a head; it has no layout to execute.
BACKENDS = (*EXECUTORS, "varlen")
_ROUTES = ("auto", *BACKENDS)
NO_LSE = "FlexAttention's CPU kernel gives no log-sum-exp"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Route(NamedTuple):
    """What a kind of call runs, found once: whatever does not depend on the tensors' elements."""

    run: Plan | Windows
    device: str  # type of the device
    refuses_leaves: bool  # tensors that want a gradient, even under no_grad


def attend(
    q: Tensor, k: Tensor, v: Tensor, method: str | Method = "spattention", causal: bool = True,
    backend: str = "auto", global_tokens: Tensor | None = None,
    global_qkv: tuple[Tensor, Tensor, Tensor] | None = None, state: Any = None,
) -> Tensor:  # fmt: skip
    """Sparse attention by any method of the suite.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D], Hq a multiple of Hkv; k is q where a method shares queries and keys.
        method: a name in METHODS or a Method.
        causal: whether query i sees only keys j <= i.
        backend: a name in BACKENDS, or "auto": flex, but blockwise for float64, and on a CPU where
            a gradient is asked for or the method needs the log-sum-exp.
        global_tokens: bool [B, N], Longformer's global tokens in place of its prefix.
        global_qkv: Longformer's projections for rows of global tokens, shaped as q, k, v.
        state: of this call, in place of what the method prepares: BigBird's `drawn_blocks`,
            Reformer's `rounds`.

    Returns:
        [B, Hq, N, D] in the dtype of q; rows of queries that see no key are 0.

    Raises:
        ValueError: what was given does not go together; one line says what is allowed.
    """
    if torch.compiler.is_compiling():
        return _apart(q, k, v, method, causal, backend, global_tokens, global_qkv, state)
    if type(causal) is not bool:  # to a cache 1 is True
        Problem(causal=causal)  # says what is allowed
    given = (q, k, v) if global_qkv is None else _with_own(q, k, v, global_qkv)
    kinds, leaves = _kinds(given)
    if type(method) is str:
        method = METHODS.get(method, method)
    own = None if global_tokens is None and len(given) == 3 else global_tokens is not None
    wants_grad = leaves and torch.is_grad_enabled()
    try:
        route = _route(method, kinds, wants_grad, k is q, causal, backend, own)
    except TypeError:  # of a method that cannot be hashed, above all
        _check_backend(backend)
        resolve(method)
        raise
    if leaves and route.refuses_leaves:
        given = tuple(x.detach() for x in given)
    return _run(route, given, global_tokens, own, state)


# It compiles for static shapes, whatever the model around it does. No decorator: it would take a
# tenth of what a call costs beyond what is compiled.
_apart = torch.compiler.disable(attend)


def _with_own(q: Any, k: Any, v: Any, global_qkv: Any) -> tuple[Any, ...]:
    """All tensors of a call, the projections of global rows behind q, k and v."""
    given = (q, k, v, *(global_qkv if isinstance(global_qkv, Sequence) else (global_qkv,)))
    if len(given) != 6:
        _refuse_kinds(given)
    return given


def _kinds(given: tuple[Any, ...]) -> tuple[tuple, bool]:
    """Shape, dtype and device of each tensor, and whether any wants a gradient."""
    kinds, leaves = (), False
    try:
        for x in given:
            kinds += x.shape, x.dtype, x.device
            leaves = leaves or x.requires_grad
    except AttributeError:
        _refuse_kinds(given)
        raise
    return kinds, leaves


def _check_backend(backend: Any) -> None:
    if backend not in _ROUTES:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(_ROUTES)}")


def _refuse_kinds(given: tuple[Any, ...]) -> None:
    kinds = ", ".join(type(x).__name__ for x in given)
    raise ValueError(f"q, k, v (and global_qkv) are {kinds}; they must be 3 (and 3) tensors")


def _run(
    route: _Route, given: tuple[Tensor, ...], global_tokens: Tensor | None,
    own: bool | None, state: Any,
) -> Tensor:  # fmt: skip
    """attend, once it is known how; own is not None where there are global tokens to be heard."""
    if torch.is_autocast_enabled(route.device):
        with torch.autocast(route.device, enabled=False):  # it computes in the dtype of q
            return _run(route, given, global_tokens, own, state)
    run = route.run
    if own is None:
        return run(*given, state)[0]
    if state is not None:
        raise ValueError("state goes with neither global_tokens nor global_qkv: give one")
    parts = run.problem, run.execute, global_tokens, given[3:] or None
    return attend_globals(run.method, *given[:3], *parts)


@lru_cache(maxsize=256)
def _route(
    method: str | Method, kinds: tuple, wants_grad: bool, tied: bool, causal: bool, backend: str,
    own: bool | None,
) -> _Route:  # fmt: skip
    """How calls of one kind are run, once they are found to be right.

    Args:
        kinds: shape, dtype and device of each tensor, one after the other.
        wants_grad: whether a gradient is asked for.
        tied: whether k is q.
        own: None, or that the caller gives global tokens (True) or their projections alone.
    """
    _check_backend(backend)
    shapes, dtypes, devices = kinds[::3], kinds[1::3], kinds[2::3]
    if len({*dtypes}) > 1 or len({*devices}) > 1:
        told = ", ".join(f"{x} on {device}" for x, device in zip(dtypes, devices, strict=True))
        raise ValueError(f"tensors differ in dtype or device: {told}; all must be as q")
    method, dtype, device = resolve(method), dtypes[0], devices[0]
    if device.type == "meta":
        raise ValueError("q, k, v are on meta, without elements; give tensors on cpu or cuda")
    if method.shared_qk and not tied:
        raise ValueError(f"{method.name} shares queries and keys; k must be the tensor that q is")
    backend = _backend_for(method, dtype, device, wants_grad, backend)
    if own is not None:
        if backend == "varlen":
            raise ValueError("backend 'varlen' takes no global_tokens and no global_qkv")
        method = _with_globals(method, own)
    p, on_gpu = _problem(shapes[:3], dtype, causal), device.type == "cuda"
    run = _cached_plan(method, p, device, backend)
    return _Route(run, device.type, backend in ("flex", "eager") and not on_gpu)


@lru_cache(maxsize=256)
def _cached_plan(method: Method, p: Problem, device: torch.device, backend: str) -> Plan | Windows:
    """One of each, however it is asked for: it is compiled once."""
    return plan(method, p, backend)


def _problem(shapes: Sequence[torch.Size], dtype: torch.dtype, causal: bool) -> Problem:
    """The problem of tensors q, k and v."""
    q, k, v = shapes
    if len(q) != 4 or k != v or len(k) != 4 or (q[0], q[2], q[3]) != (k[0], k[2], k[3]):
        raise ValueError(
            "attend needs q [B, Hq, N, D] and k, v [B, Hkv, N, D]; "
            f"got q {list(q)}, k {list(k)}, v {list(v)}"
        )
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    return Problem(
        batch=q[0], q_heads=q[1], kv_heads=k[1], seq_len=q[2], head_dim=q[3],
        dtype=_DTYPE_NAMES[dtype], causal=causal,
    )  # fmt: skip


def _with_globals(method: Method, given: bool) -> Longformer:
    """The method whose global tokens a caller gives, which then has no prefix of its own."""
    if not isinstance(method, Longformer):
        raise ValueError(f"{method.name} has no global tokens to be given; longformer has")
    return replace(method, n_global=0) if given else method


def _backend_for(
    method: Method, dtype: torch.dtype, device: torch.device, wants_grad: bool, backend: str
) -> str:
    """The executor of a call, "auto" resolved."""
    on_gpu = device.type == "cuda"
    if backend == "auto":
        flex = dtype != torch.float64 and (on_gpu or not (wants_grad or method.needs_lse))
        return "flex" if flex else "blockwise"
    if backend == "flash" and (missing := flash_4_missing(device)):
        raise ValueError(f"backend 'flash' on {device}: {missing}")
    if backend in ("flex", "eager") and wants_grad and not on_gpu:
        raise ValueError(f"backend {backend!r} has no backward on a CPU; blockwise has")
    if backend == "flex" and method.needs_lse and not on_gpu:
        raise ValueError(f"backend 'flex' on a CPU: {NO_LSE}, which {method.name} needs")
    return backend


@dataclass(frozen=True, eq=False)
class Plan:
    """A function (q, k, v) -> (out, lse) for one problem, by way of the method's layout.

    lse is in token order, or None where the executor does not give it. A state that is given
    stands in for what the method prepares.
    """

    method: Method
    problem: Problem
    block_size: tuple[int, int]
    execute: Executor

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        if state is None:
            state = self.method.prepare(q, k, self.problem)
        else:
            self.method.check_state(state, self.problem)
        layout = self.method.layout(q, k, v, self.problem, state, self.block_size)
        out, lse = self.execute(layout)
        return (out, lse) if layout.restore is None else (layout.restore(out, lse), None)


def plan(
    method: Method,
    p: Problem,
    backend: str,
    block_size: tuple[int, int] = (128, 128),
) -> Plan | Windows:
    """A function (q, k, v, state) -> (out, lse) of a method on one of BACKENDS.

    What it compiles, it compiles on its first call. That k is q where a method shares them is the
    caller's business here; `attend` looks.

    Raises:
        ValueError: the backend is unknown or does not take the method or the dtype, or the
            method's parameters do not fit the problem.
        NotImplementedError: the backend does not take the block size.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(_ROUTES)}")
    method.validate(p)
    if backend == "varlen":
        return Windows(method, p)
    return Plan(method, p, block_size, executor(backend, p, block_size))


def executor(backend: str, p: Problem, block_size: tuple[int, int] = (128, 128)) -> Executor:
    """What turns a Layout into (out, lse or None), both in the order of the layout."""
    if backend == "blockwise":
        return lambda x: blockwise(x.q, x.k, x.v, x.block_mask, x.score_mod)
    call = _flex if backend == "eager" else compiled_copy(_flex)
    options = _flash_options(p, block_size) if backend == "flash" else _tiles(p, block_size)
    grouped = p.group > 1
    return lambda x: call(x.q, x.k, x.v, x.block_mask, x.score_mod, grouped, x.needs_lse, options)


def _flash_options(p: Problem, block_size: tuple[int, int]) -> dict[str, str]:
    """What has FlexAttention call flash-attn-4 instead of a Triton kernel.

    It ignores the block lists beside a mask_mod that is a constant. No method has one: even that
    of dense attention compares positions.
    """
    if reason := flash_refusal(p):
        raise ValueError(f"backend 'flash': {reason}")
    if block_size[0] % 64 or block_size[1] != 128:
        raise NotImplementedError(
            f"backend 'flash' takes blocks of 128 keys and a multiple of 64 rows, not {block_size}"
        )
    return {"BACKEND": "FLASH"}


def _tiles(p: Problem, block_size: tuple[int, int]) -> dict[str, int | str] | None:
    """What the CUDA kernels are to do otherwise than torch has them; None is nothing.

    A tile must divide its block, and in the backward M1 must divide N1 and N2 must divide M2;
    torch has one default configuration, made for blocks of 128. For float32 it multiplies without
    tensor cores; three TF32 products are as exact, and are fastest in tiles of 32 rows: of those
    tried on an H200 at head dim 128, by 1.2 times forward and 1.4 backward over torch's own.
    Between 128 and 256 features, which kernels take as 256, torch's own fit in no shared memory.
    """
    rows, keys = block_size
    small, options = min(32, rows, keys), {}
    if min(rows, keys) < 128:
        options = {
            "fwd_BLOCK_M": min(128, rows), "fwd_BLOCK_N": min(64, keys),
            "bwd_BLOCK_M1": small, "bwd_BLOCK_N1": min(64, keys),
            "bwd_BLOCK_M2": min(64, rows), "bwd_BLOCK_N2": small,
        }  # fmt: skip
    if p.dtype == "float32" and p.head_dim <= 128 and _three_tf32():
        if p.seq_len >= 128:  # fewer queries have a kernel of their own
            options |= {
                "fwd_BLOCK_M": small, "fwd_BLOCK_N": min(64, keys),
                "fwd_num_warps": 4, "fwd_num_stages": 2,
            }  # fmt: skip
        options |= {
            "bwd_BLOCK_M1": small, "bwd_BLOCK_N1": small, "bwd_BLOCK_M2": small,
            "bwd_BLOCK_N2": small, "bwd_num_warps": 4, "bwd_num_stages": 1,
            "FLOAT32_PRECISION": "'tf32x3'",
        }  # fmt: skip
    elif p.dtype == "float32" and 128 < p.head_dim < 256 and p.seq_len >= 128:
        options |= {
            "fwd_BLOCK_M": small, "fwd_BLOCK_N": min(64, keys),
            "fwd_num_warps": 8, "fwd_num_stages": 1,
        }  # fmt: skip
    return options or None


def _three_tf32() -> bool:
    """Whether products of float32 are to be exact, on a chip that has TF32."""
    exact = torch.get_float32_matmul_precision() == "highest"
    cuda = torch.cuda.is_available() and torch.version.hip is None
    return exact and cuda and torch.cuda.get_device_capability() >= (8, 0)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, score_mod: ScoreMod | None,
    grouped: bool, needs_lse: bool, options: dict[str, int | str] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    answer = flex_attention(
        q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=grouped,
        kernel_options=options if q.is_cuda else None,
        return_aux=AuxRequest(lse=True) if needs_lse else None,
    )  # fmt: skip
    return (answer[0], answer[1].lse) if needs_lse else (answer, None)
