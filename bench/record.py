"""The row of a results file, the CSV store, and the environment that a row was measured in."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import math
import os
import platform
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

import torch

from bench.facts import ROOT, driver, git_sha, processor, version
from methods import Problem

PHASES = ("layout", "prepare", "fwd", "bwd", "fwd_bwd")  # of a sweep
STEP = "step"  # of training: forward, backward and optimiser
CLOCKS = ("device", "kernels", "host")
STATUSES = ("ok", "oom", "unsupported", "mismatch", "crash", "timeout")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a measurement depends on besides the cell; all of it is part of a row."""

    git_sha: str | None
    code: str
    host: str
    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    flash_attn: str | None
    python: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell, phase and clock. None is an empty field; there is no NaN.

    Attributes:
        l2: "cold" (rotated or flushed) or "warm"; None on a CPU.
        samples_us: semicolon-separated; the k-th was taken in the k-th of `rounds`.
        rounds: semicolon-separated; None where a cell ran alone, so that nothing pairs with it.
        kernel, tiles: of one call in another process, longest first; semicolon-separated.
        discarded: samples thrown away, for thermal or hardware slowdown.
        ci_low_us, ci_high_us: 99 % interval of the median.
        error_out, error_dq, error_dk, error_dv: relative Frobenius error of the worst block.
        error_budget: largest share of an error budget that was used; above 1 is a mismatch.
        matmul_tflop_s, copy_gb_s: this chip's own ceilings, measured by the run.
        sm_mhz: right after the samples. power_w, celsius: of the chip, other cells included.
        throttled: why the chip was slower than it can be, and after how many of the samples.
        model: that trains; batch is the sequences of each of its world_size processes.
        data: "random", or the name of the text and the start of its hash.
        parameters: of the model. model_flops: of its products in one step of one process.
        losses: of every step from the first, those of the warm-up too; semicolon-separated.
        attention_us, other_us: time of the device in attention and in other kernels, in one step.
        recipe: steps, warm-up, learning rate and seed.
        heads: of a text's training, how much heads differ: what `bench/trained_heads.py` writes.
        step_kernels: microseconds, kind and name, the longest first, small ones of a kind in one;
            semicolon-separated.
    """

    run: str
    time_utc: str
    git_sha: str | None
    code: str
    host: str
    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    flash_attn: str | None
    python: str
    threads: int
    method: str
    params: str | None
    backend: str
    kernel: str | None = None
    tiles: str | None = None
    batch: int
    q_heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    dtype: str
    causal: bool
    q_block: int
    kv_block: int
    phase: str
    clock: str
    l2: str | None = None
    status: str = "ok"
    reason: str | None = None
    compile_s: float | None = None
    samples_us: str | None = None
    rounds: str | None = None
    discarded: int = 0
    median_us: float | None = None
    ci_low_us: float | None = None
    ci_high_us: float | None = None
    peak_bytes: int | None = None
    allowed_pairs: int | None = None
    computed_pairs: int | None = None
    error_out: float | None = None
    error_dq: float | None = None
    error_dk: float | None = None
    error_dv: float | None = None
    error_budget: float | None = None
    matmul_tflop_s: float | None = None
    copy_gb_s: float | None = None
    sm_mhz: int | None = None
    power_w: float | None = None
    celsius: int | None = None
    throttled: str | None = None
    model: str | None = None
    world_size: int | None = None
    data: str | None = None
    parameters: int | None = None
    model_flops: float | None = None
    losses: str | None = None
    attention_us: float | None = None
    other_us: float | None = None
    recipe: str | None = None
    heads: str | None = None
    step_kernels: str | None = None

    @property
    def problem(self) -> Problem:
        return Problem(**{f.name: getattr(self, f.name) for f in fields(Problem)})

    @property
    def samples(self) -> list[float]:
        return [float(x) for x in self.samples_us.split(";")] if self.samples_us else []


COLUMNS = tuple(field.name for field in fields(Row))
_HEADER = (",".join(COLUMNS) + "\n").encode()
# Of files from before there were rows of training, or more of them; they are read all the same.
_OLDER = [COLUMNS[: COLUMNS.index(x)] for x in ("model", "recipe", "heads", "step_kernels")]
_TYPES = get_type_hints(Row)
DIGITS = 1e-5  # as a share: numbers are kept to six digits
LONGEST = 2**31 - 1  # characters of a field: samples and losses have no limit of their own


def environment(device: torch.device, extra_code: Iterable[Path] = ()) -> Environment:
    """The environment of measurements on a device; extra_code are files of the user's own."""
    cuda = device.type == "cuda"
    return Environment(
        git_sha=git_sha(),
        code=code_hash(extra_code),
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if cuda else processor(),
        driver=driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        torch=torch.__version__,
        triton=version("triton"),
        flash_attn=version("flash-attn-4") or version("flash-attn"),
        python=platform.python_version(),
        threads=torch.get_num_threads(),
    )


def code_hash(extra: Iterable[Path] = ()) -> str:
    """Hash of the sources of methods/ and bench/ (and of files of the user's own)."""
    digest = hashlib.sha256()
    for folder in ("methods", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    for path in sorted(extra):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """A CSV of rows that one process at a time appends to; what was written is never lost.

    A last line that an interrupted write left incomplete is cut off. Any other damaged line goes
    to FILE.damaged, as it is; its cell counts as not measured.

    Attributes:
        rows: what the file held when it was opened.
        damaged: lines set aside at that time.

    Raises:
        BlockingIOError: another process holds the file.
        OSError: the file cannot be written; what it held stays as it was.
        ValueError: the file exists and is not a results file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_suffix(".csv.damaged")
        self._draft = path.with_suffix(".csv.new")

    def __enter__(self) -> Store:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            self._mend()
        except (OSError, ValueError):
            self._file.close()
            raise
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except BlockingIOError:
            free = False
        if not free:  # or a writer has just put another file in the place of this one
            raise BlockingIOError(f"{self.path} is being written by another process")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, rows: Iterable[Row]) -> None:
        """Writes rows in one piece and waits until the disk has them."""
        self._write(_lines(rows))

    def replace(self, rows: Iterable[Row]) -> None:
        """Makes these the only rows of the file, at once or not at all."""
        self._replace(_HEADER + _lines(rows))

    def put(
        self, rows: list[Row], finished: list[Row], key: Callable[[Row], Hashable]
    ) -> list[Row]:
        """The file's rows with finished ones in place of those that have their keys, on disk."""
        fresh = {key(row) for row in finished}
        kept = [row for row in rows if key(row) not in fresh]
        if len(kept) == len(rows):
            self.append(finished)
        else:
            self.replace(kept + finished)
        return kept + finished

    def _replace(self, content: bytes) -> None:
        old, self._file = self._file, self._draft.open("w+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write(content)
            os.replace(self._draft, self.path)
        except OSError:
            self._file.close()
            self._file = old
            self._draft.unlink(missing_ok=True)
            raise
        old.close()
        _sync_folder(self.path.parent)

    def _mend(self) -> None:
        """Makes every line a row, or starts a new file."""
        self._draft.unlink(missing_ok=True)  # a process died while it wrote this
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        self.rows, good, bad = [], [], []
        if not lines and _HEADER.startswith(torn):
            self._file.truncate(0)
            self._write(_HEADER)
            _sync_folder(self.path.parent)
            lines, torn = [_HEADER.rstrip()], b""
        columns = _columns(lines[0] if lines else torn, self.path)
        empty = b"," * (len(COLUMNS) - len(columns))
        for line in lines[1:]:
            try:
                self.rows.append(_parse(line, columns))
                good.append(line + empty)
            except _DAMAGE:
                bad.append(line)
        self.damaged = len(bad)
        if bad:
            with self.aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in bad))
                os.fsync(file.fileno())
        if bad or empty:
            self._replace(_HEADER + b"".join(line + b"\n" for line in good))
        elif torn:
            self._file.truncate(self._file.seek(0, os.SEEK_END) - len(torn))

    def _write(self, content: bytes) -> None:
        end, left = self._file.seek(0, os.SEEK_END), memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; a torn last line is passed over.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a results file, or a line of it is damaged; names the line.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
    columns = _columns(lines[0] if lines else b"", path)
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(_parse(line, columns))
        except _DAMAGE as error:
            raise ValueError(f"{path}, line {number}: damaged ({error})") from None
    return rows


# What reading a damaged line raises; what cannot be decoded is a ValueError too.
_DAMAGE = (ValueError, KeyError, csv.Error)


def _parse(line: bytes, columns: Sequence[str]) -> Row:
    """The row of one line, which is data and nothing else: no field of it is evaluated."""
    csv.field_size_limit(LONGEST)
    (values,) = csv.reader([line.decode()], strict=True)
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} fields of {len(columns)}")
    row = Row(**{k: decode(k, v) for k, v in zip(columns, values, strict=True)})
    for name, allowed in (("phase", (*PHASES, STEP)), ("clock", CLOCKS), ("status", STATUSES)):
        if getattr(row, name) not in allowed:
            raise ValueError(f"{name} is {getattr(row, name)!r}")
    _ = row.problem  # it has to be read from it later
    times = (1.0 if row.median_us is None else row.median_us, *row.samples)
    if not all(0 < us < math.inf for us in times):
        raise ValueError("a time is no positive number")
    if row.rounds and len({*map(int, row.rounds.split(";"))}) != len(row.samples):
        raise ValueError("rounds and samples do not go together")
    if row.samples and row.median_us is not None:
        middle = statistics.median(row.samples)
        if not math.isclose(row.median_us, middle, rel_tol=DIGITS):
            raise ValueError(f"median_us is {row.median_us:g}; that of the samples is {middle:g}")
        ends = row.ci_low_us or row.median_us, row.ci_high_us or row.median_us
        if not ends[0] <= row.median_us <= ends[1]:
            raise ValueError("median_us lies outside its interval")
    return row


def _lines(rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([encode(getattr(row, name)) for name in COLUMNS] for row in rows)
    return text.getvalue().encode(errors="backslashreplace")


def _sync_folder(folder: Path) -> None:
    """Waits until the disk knows the names of the folder's files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _columns(header: bytes, path: Path) -> Sequence[str]:
    for columns in (COLUMNS, *_OLDER):
        if header.decode(errors="replace") == ",".join(columns):
            return columns
    raise ValueError(f"{path}: not a results file of this version; its first line differs")


def encode(value: Any) -> Any:
    """A value as a field of a CSV."""
    if isinstance(value, float):
        return f"{value:.6g}"
    # A row is one line of the file, so that a torn one can be told.
    return "" if value is None else " ".join(str(value).splitlines()).replace("\0", " ")


def decode(name: str, text: str, hints: Mapping[str, Any] = _TYPES) -> Any:
    """The value of a field, by its type hint: a plain type, or one or None."""
    hint = hints[name]
    kinds = [kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None)]
    if text == "" and kinds != [hint]:
        return None
    if kinds == [bool]:
        return {"True": True, "False": False}[text]
    value = kinds[0](text)
    if value != value:
        raise ValueError(f"{name} is {text!r}")
    return value
