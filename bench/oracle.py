"""The gate: attention and its gradients against float64, block by block, in memory linear in N.

The cotangent is random in a few sampled query rows of every head and 0 in all others. So float64
over the sampled rows alone gives out, LSE and dQ of these rows and *all* of dK and dV exactly; dQ
of every other row must be exactly 0, and everything finite everywhere.

The budget. In every (batch, head, block) the Frobenius error may be at most

    2 * E + FLOOR * u * size + u_acc * spread

E is the error in the same block of a dense reference that rounds as a flash kernel does: scores
and sums in float32; rounded to the problem's type are P (not yet normalised before P V, normalised
before P^T dO), O (delta is taken from the rounded one), dS and all results. E is 0 for float64. u
is the unit roundoff of the problem's type, u_acc that of the sums: float32's, or float64's. With t
for the terms of the sum that an element x is, and n = max(N, D),

    size^2 = sum of x^2 + t^2        spread^2 = sum of n (x^2 + t^2) + (2 c t)^2

The terms of dQ and dK are those before the cancellation in dP - delta: where a row has one key, dS
is 0, and a kernel's is only nearly so. The second and third part cover what E cannot: blocks in
which so few roundings decide that E is small by accident (with FLOOR = 0 correct 16-bit runs use
more than two budgets there), another order of the sums (adding n terms one by one costs
0.41 sqrt(n) u_acc |t|), and errors of the scores, which P turns into relative ones: no score of a
row, less its LSE, is larger than c = |q| max|k| / sqrt(D) + |LSE|.

Float32 products have to be float32's: in TF32, E would be a thousand times too large, so the gate
refuses to run where torch is set to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods import Method, Problem

NAMES = ("out", "lse", "dq", "dk", "dv")
ROWS_PER_BLOCK = 4
FLOOR = 0.5
# Scores in one strip. About six float64 tensors of this size live at once.
STRIP_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


@dataclass(frozen=True)
class Expected:
    """What one tensor must be.

    Attributes:
        value: float64 [B, heads, X, D]; X are the sampled rows, or all keys. D is 1 for the LSE.
        block: block of each of the X positions, int64 [heads or 1, X].
        size: scale of the errors, [B, heads, blocks]; 0 where nothing takes part.
        budget: Frobenius error allowed, [B, heads, blocks].
    """

    value: Tensor
    block: Tensor
    size: Tensor
    budget: Tensor


@dataclass(frozen=True)
class Reference:
    """What every backend must return for one method, problem, inputs and cotangent.

    Attributes:
        block_size: (query rows, keys) of the blocks that errors are summed over.
        rows: sampled query rows, int64 [H, R].
        empty: sampled rows without a key, bool [B, H, R].
        tensors: by name: out, lse, dq, dk, dv.
    """

    p: Problem
    block_size: tuple[int, int]
    rows: Tensor
    empty: Tensor
    tensors: dict[str, Expected]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found.

    Attributes:
        error_out, error_lse, error_dq, error_dk, error_dv: Frobenius error over size in the block
            that used most of its budget; inf where a value that must be exact is not; None where
            the tensor was not given.
        error_budget: largest share of a budget that was used; above 1 is a mismatch.
        reason: one line that names the tensor, batch, head and block of that share.
    """

    error_out: float
    error_lse: float | None = None
    error_dq: float | None = None
    error_dk: float | None = None
    error_dv: float | None = None
    error_budget: float
    reason: str

    @property
    def passed(self) -> bool:
        return self.error_budget <= 1


def sample_rows(p: Problem, q_block: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """Sampled query rows of each head: int64 [H, R], sorted, none twice.

    They are the first and the last row of the sequence and one row of each quarter of each block
    (all rows of a block that has no more). The place in the quarter moves on with the block, with
    the head, and by half a quarter between the halves of a block. So a fault that sits in one row
    of 64 is met: with 8 heads and blocks of 128 every residue modulo 128 is sampled in some head
    from N = 1024 on, and in every head from N = 4352 on.
    """
    heads = torch.arange(p.q_heads)[:, None]
    columns = [torch.full_like(heads, row) for row in {0, p.seq_len - 1}]
    for block, start in enumerate(range(0, p.seq_len, q_block)):
        first, end = max(start, 1), min(start + q_block, p.seq_len - 1)
        parts = min(ROWS_PER_BLOCK, end - first)
        for part in range(parts):
            low, high = (first + (end - first) * x // parts for x in (part, part + 1))
            quarter = high - low
            # 13 and a power of two have no common factor; heads start evenly spread.
            turn = 13 * block + max(1, quarter // p.q_heads) * heads + part // 2 * (quarter // 2)
            columns.append(low + (seed + turn) % quarter)
    return torch.cat(columns, dim=1).sort(dim=1).values.to(device)


def cotangent(p: Problem, rows: Tensor, device: torch.device | str, seed: int = 0) -> Tensor:
    """Cotangent of out [B, H, N, D], in the problem's type: normal in sampled rows, else 0."""
    # Inputs drawn with the same seed must not be the same numbers.
    generator = torch.Generator(device).manual_seed(seed + 0x5EED)
    shape = (p.batch, *rows.shape, p.head_dim)
    values = torch.randn(shape, generator=generator, device=device).to(p.torch_dtype)
    result = values.new_zeros(p.batch, p.q_heads, p.seq_len, p.head_dim)
    return result.scatter_(2, _wide(rows, result), values)


def build_reference(
    method: Method, p: Problem, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cot: Tensor,
    *, state: Any = None, block_size: tuple[int, int] = (128, 128), strip: int | None = None,
) -> Reference:  # fmt: skip
    """Float64 values and budgets; computed once, good for every backend.

    Args:
        q, k, v, cot: [B, Hq, N, D], [B, Hkv, N, D] twice, [B, Hq, N, D], token order.
        rows: what `sample_rows` gave; cot must be 0 in all other rows.
        state: what the method's `prepare` gave.
        block_size: (query rows, keys) of the blocks that errors are summed over.
        strip: scores in a strip; bounds the memory.

    Raises:
        ValueError: float32 products would not be computed in float32.
    """
    backend = torch.backends.cuda if q.is_cuda else torch.backends.mkldnn
    if backend.matmul.fp32_precision not in ("none", "ieee"):
        raise ValueError(
            f"float32 matmul precision is {backend.matmul.fp32_precision!r}; it must be 'ieee'"
        )
    exact, rough = _dense(method, p, q, k, v, cot)
    sizes = _Sizes(exact)
    elements = strip or STRIP_ELEMENTS.get(q.device.type, STRIP_ELEMENTS["cpu"])
    for index in rows.split(max(1, elements // (p.batch * p.q_heads * p.seq_len)), dim=1):
        bias = method.rows(p, q.device, index, state).expand(p.batch, -1, -1, -1)
        sizes.add(*exact.add(index, bias))
        if rough is not exact:
            rough.add(index, bias)
    blocks = rows // block_size[0], torch.arange(p.seq_len, device=q.device)[None] // block_size[1]
    values, near, squares = exact.results(), rough.results(), sizes.squares()
    tensors = {
        name: _expected(p, name, value, near[name], squares[name], blocks[name in ("dk", "dv")])
        for name, value in values.items()
    }
    return Reference(p, block_size, rows, values["lse"][..., 0] == -torch.inf, tensors)


def judge(
    reference: Reference, out: Tensor, lse: Tensor | None = None,
    grads: tuple[Tensor | None, Tensor, Tensor] | None = None,
) -> Verdict:  # fmt: skip
    """Compares what a backend returned with the reference.

    Args:
        out: [B, Hq, N, D], token order.
        lse: natural log-sum-exp [B, Hq, N], -inf in rows without a key; or None.
        grads: (dq or None, dk, dv) for the reference's cotangent; or None.

    Raises:
        ValueError: a tensor does not have the problem's shape.
    """
    given = {"out": out}
    if lse is not None:
        given["lse"] = lse[..., None]
    if grads is not None:
        given |= {n: x for n, x in zip(NAMES[2:], grads, strict=True) if x is not None}
    findings = {name: _find(reference, name, x.detach()) for name, x in given.items()}
    worst = max(findings.values(), key=lambda finding: finding.share)
    errors = {f"error_{name}": finding.error for name, finding in findings.items()}
    return Verdict(**errors, error_budget=worst.share, reason=worst.reason)


@dataclass(frozen=True)
class _Finding:
    """One tensor's worst block: share of its budget, relative error, what and where."""

    share: float
    error: float
    reason: str


def _find(reference: Reference, name: str, x: Tensor) -> _Finding:
    p, expected = reference.p, reference.tensors[name]
    shape = (p.batch, expected.value.shape[1], p.seq_len, expected.value.shape[3])
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    broken = _broken(reference, name, x)
    if broken is not None:
        return _Finding(math.inf, math.inf, broken)
    part = x if name in ("dk", "dv") else x.gather(2, _wide(reference.rows, x))
    squares = _square(_difference(part, expected.value))
    errors = _per_block(squares, expected.block, expected.size).sqrt_()
    shares = torch.where(errors == 0, 0, errors / expected.budget)
    worst = shares.argmax()
    share, error, size = (float(t.flatten()[worst]) for t in (shares, errors, expected.size))
    batch, head, block = (int(i) for i in torch.unravel_index(worst, shares.shape))
    length = reference.block_size[name in ("dk", "dv")]
    last = min((block + 1) * length, p.seq_len) - 1
    place = f"batch {batch}, head {head}, positions {block * length} to {last}"
    reason = f"{name} of {place}: {share:.3g} times the error budget"
    return _Finding(share, error / size if size else error, reason)


def _broken(reference: Reference, name: str, x: Tensor) -> str | None:
    """The first value that breaks what must hold exactly, in words; None where nothing does."""
    flags = torch.zeros_like(x[..., 0], dtype=torch.bool)
    rows = reference.rows.expand(reference.empty.shape)
    if name == "lse":
        sampled = x[..., 0].gather(2, rows) == -torch.inf
        tests = {
            "is NaN or infinite": x[..., 0].isnan() | (x[..., 0] == torch.inf),
            "is -inf in a row with a key, or is not in one without":
                flags.scatter(2, rows, sampled != reference.empty),
        }  # fmt: skip
    else:
        tests = {"is not finite": ~x.isfinite().all(-1)}
    if name in ("out", "dq"):
        # Only sampled rows are known to see a key; dq of all others has a cotangent of 0.
        zero = (flags | (name == "dq")).scatter(2, rows, reference.empty)
        tests["is not 0 in a row without key or cotangent"] = zero & (x != 0).any(-1)
    for what, wrong in tests.items():
        if wrong.any():
            batch, head, position = wrong.nonzero()[0].tolist()
            return f"{name} {what}: batch {batch}, head {head}, position {position}"
    return None


def _dense(method: Method, p: Problem, *inputs: Tensor) -> tuple[_DenseRows, _DenseRows]:
    """The float64 reference and the one that rounds: the same one where the problem is float64."""
    inputs = tuple(x.detach() for x in inputs)
    exact = _DenseRows(method, p, *inputs, torch.float64, None)
    if p.dtype == "float64":
        return exact, exact
    rounding = None if p.dtype == "float32" else p.torch_dtype
    return exact, _DenseRows(method, p, *inputs, torch.float32, rounding)


class _DenseRows:
    """Dense attention and its gradients on strips of query rows, rounded as a flash kernel does.

    Heads that share keys are stacked as rows of one matrix, so that their dK and dV add up.

    Attributes:
        type: of the arithmetic.
        rounding: type that P, O, dS, results and mapped keys are rounded to, or None.
    """

    def __init__(
        self, method: Method, p: Problem, q: Tensor, k: Tensor, v: Tensor, cot: Tensor,
        type: torch.dtype, rounding: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.p, self.q, self.cot, self.type, self.rounding = p, q, cot, type, rounding
        self.scale = p.head_dim**-0.5
        self.given_k = k.to(type).detach().requires_grad_()
        self.keys = torch.enable_grad()(method.keys)(self.given_k)
        self.k, self.v = (x.flatten(0, 1) for x in (self._round(self.keys.detach()), v.to(type)))
        self.dk, self.dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        self.strips: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, index: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """Takes the rows of one strip in; returns their q, cotangent, out, LSE and P, stacked."""
        q, cot = (self._rows(x, index) for x in (self.q, self.cot))
        bias = bias.to(self.type).reshape(len(self.k), -1, self.p.seq_len)
        probs = torch.baddbmm(bias, q, self.k.mT, alpha=self.scale)
        peak = probs.amax(-1, keepdim=True).clamp_(min=torch.finfo(self.type).min)
        total = probs.sub_(peak).exp_().sum(-1, keepdim=True)
        lse = peak + total.log()
        total.clamp_(min=0.5)  # a row without a key has P = 0; every other total is at least 1
        out = self._round((self._round(probs) @ self.v).div_(total))
        probs.div_(total)
        self.dv.baddbmm_(self._round(probs).mT, cot)
        ds = (cot @ self.v.mT).sub_((out * cot).sum(-1, keepdim=True)).mul_(probs)
        ds = self._round(ds)
        self.dk.baddbmm_(ds.mT, q, alpha=self.scale)
        dq = self._round((ds @ self.k).mul_(self.scale))
        self.strips.append(tuple(self.unstacked(x) for x in (out, lse, dq)))
        return q, cot, out, lse, probs

    def results(self) -> dict[str, Tensor]:
        """[B, heads, rows or keys, D] of every tensor; D is 1 for the LSE."""
        rows = (torch.cat(x, dim=2) for x in zip(*self.strips, strict=True))
        shape = (self.p.batch, self.p.kv_heads, self.p.seq_len, -1)
        dk, dv = (self._round(x).view(shape) for x in (self.dk, self.dv))
        (dk,) = torch.autograd.grad(self.keys, self.given_k, dk, retain_graph=True)
        return dict(zip(NAMES, (*rows, self._round(dk), dv), strict=True))

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        shape = (len(self.k), -1, self.p.head_dim)
        return x.gather(2, _wide(index, x)).to(self.type).reshape(shape)

    def unstacked(self, x: Tensor) -> Tensor:
        return x.reshape(self.p.batch, self.p.q_heads, -1, x.shape[-1])

    def _round(self, x: Tensor) -> Tensor:
        return x if self.rounding is None else x.to(self.rounding).to(self.type)


class _Sizes:
    """Sums of t^2, and of (n + 4 c^2) t^2, of the module's docstring, by row and by key.

    Squares of sums over D, which dP and delta are, are taken at |dO|^2 |V|^2 / D and
    |dO|^2 |O|^2 / D: with these the sums over the keys, or rows, are products of matrices.
    """

    def __init__(self, dense: _DenseRows) -> None:
        p = dense.p
        self.dense, self.longest_sum = dense, max(p.seq_len, p.head_dim)
        self.factor, self.shape = p.head_dim**-2, (p.batch, p.kv_heads, -1, 2)
        k, v = _square(dense.k), _square(dense.v)
        self.longest_key = k.amax(-1, keepdim=True).sqrt() * dense.scale
        self.value, self.weights = v[..., None], torch.stack((v, v * k, k), -1)
        # What a method makes of its keys scales gradients as it scales keys.
        self.mapped = (k / _square(dense.given_k.detach()).view_as(k)).nan_to_num(1)[..., None]
        self.sums = v.new_zeros(*v.shape, 6)
        self.rows: list[tuple[Tensor, ...]] = []

    def add(self, q: Tensor, cot: Tensor, out: Tensor, lse: Tensor, probs: Tensor) -> None:
        """Takes one strip in; overwrites probs."""
        q, cot, out = (_square(x) for x in (q, cot, out))
        score = q.sqrt() * self.longest_key + lse[..., 0].abs().nan_to_num(posinf=0)
        spread = torch.stack((torch.ones_like(score), self.longest_sum + 4 * score**2), -1)
        squares = probs.square_()
        values, near, far = (squares @ self.weights).unbind(-1)
        dq = cot * (near + out * far) * self.factor
        rows = (x[..., None] * spread for x in (values, values > 0, dq))
        self.rows.append(tuple(self.dense.unstacked(x) for x in rows))
        columns = torch.stack((cot, cot * q, cot * q * out), -1)[..., None] * spread[..., None, :]
        self.sums.baddbmm_(squares.mT, columns.flatten(-2))

    def squares(self) -> dict[str, Tensor]:
        """[B, heads, rows or keys, 2] of every tensor; the LSE has one term, of 1."""
        rows = (torch.cat(x, dim=2) for x in zip(*self.rows, strict=True))
        dv, near, far = self.sums.unflatten(-1, (3, 2)).unbind(-2)
        dk = (self.value * near + far) * self.factor * self.mapped
        return dict(zip(NAMES, (*rows, dk.view(self.shape), dv.view(self.shape)), strict=True))


def _expected(
    p: Problem, name: str, value: Tensor, near: Tensor, squares: Tensor, block: Tensor
) -> Expected:
    """Value and budget of one tensor, from the rounded one and its squared terms."""
    own = _square(value.masked_fill(value == -torch.inf, 0))
    size, spread = squares[..., 0] + own, squares[..., 1] + max(p.seq_len, p.head_dim) * own
    error = _square(_difference(near, value))
    empty = own.new_zeros(*own.shape[:2], int(block.max()) + 1)
    size, spread, error = (_per_block(x, block, empty).sqrt_() for x in (size, spread, error))
    sums = torch.finfo(torch.float64 if p.dtype == "float64" else torch.float32).eps / 2
    rounding = sums if name == "lse" else torch.finfo(p.torch_dtype).eps / 2
    return Expected(value, block, size, 2 * error + FLOOR * rounding * size + sums * spread)


def _difference(x: Tensor, value: Tensor) -> Tensor:
    """x - value, and 0 where both are -inf."""
    return torch.where(x == value, 0, x.double() - value)


def _per_block(x: Tensor, block: Tensor, like: Tensor) -> Tensor:
    """Sums of x [B, heads, X] over blocks, [B, heads, blocks]."""
    return torch.zeros_like(like).scatter_add_(2, block.expand(x.shape), x)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """Row numbers [H, R] as an index [B, H, R, D] for gather and scatter on dim 2 of `like`."""
    return rows[None, :, :, None].expand(like.shape[0], -1, -1, like.shape[3])
