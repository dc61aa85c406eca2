"""The row of a results file, the CSV store, and the environment that a row was measured in."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.metadata
import io
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

import torch

from methods import Problem

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("layout", "fwd", "bwd", "fwd_bwd")
CLOCKS = ("device", "kernels", "host")


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
        kernel, tiles: of the kernels of one call, the longest first; semicolon-separated.
        discarded: samples thrown away, for thermal or hardware slowdown.
        ci_low_us, ci_high_us: 99 % interval of the median.
        error_out, error_dq, error_dk, error_dv: relative Frobenius error of the worst block.
        error_budget: largest share of an error budget that was used; above 1 is a mismatch.
        matmul_tflop_s, copy_gb_s: this chip's own ceilings, measured by the run.
        sm_mhz, power_w: medians right after the samples; celsius: the highest.
        throttled: why the chip was slower than it can be, and after how many of the samples.
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

    @property
    def problem(self) -> Problem:
        return Problem(**{f.name: getattr(self, f.name) for f in fields(Problem)})

    @property
    def samples(self) -> list[float]:
        return [float(x) for x in self.samples_us.split(";")] if self.samples_us else []


COLUMNS = tuple(field.name for field in fields(Row))
_TYPES = get_type_hints(Row)


def environment(device: torch.device, extra_code: Iterable[Path] = ()) -> Environment:
    """The environment of measurements on a device; extra_code are files of the user's own."""
    cuda = device.type == "cuda"
    return Environment(
        git_sha=_git_sha(),
        code=code_hash(extra_code),
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if cuda else _processor(),
        driver=_driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        torch=torch.__version__,
        triton=_version("triton"),
        flash_attn=_version("flash-attn-4") or _version("flash-attn"),
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

    Raises:
        BlockingIOError: another process holds the file.
        ValueError: the file exists and is not a results file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Store:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
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
        except BlockingIOError:
            raise BlockingIOError(f"{self.path} is being written by another process") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, rows: Iterable[Row]) -> None:
        """Writes rows in one piece and waits until the disk has them."""
        self._write(rows, header=False)

    def replace(self, rows: Iterable[Row]) -> None:
        """Makes these the only rows of the file, at once or not at all."""
        draft = self.path.with_suffix(".csv.new")
        old, self._file = self._file, draft.open("w+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._write(rows, header=True)
        os.replace(draft, self.path)
        old.close()

    def _mend(self) -> None:
        """Cuts off a last line that an interrupted write left incomplete; starts a new file."""
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            self._file.truncate(end)
        if end == 0:
            self._write((), header=True)
        else:
            _check_header(content[:end].decode().splitlines()[0], self.path)

    def _write(self, rows: Iterable[Row], header: bool) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows({k: _encode(v) for k, v in asdict(row).items()} for row in rows)
        self._file.seek(0, os.SEEK_END)
        self._file.write(text.getvalue().encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; a torn last line is passed over.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a results file, or a line of it is damaged; names the line.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file (byte {error.start})") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    _check_header(lines[0] if lines else "", path)
    rows = []
    for number, values in enumerate(csv.reader(lines[1:]), 2):
        try:
            pairs = zip(COLUMNS, values, strict=True)
            rows.append(Row(**{name: _decode(name, value) for name, value in pairs}))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: damaged ({error})") from None
    return rows


def _check_header(line: str, path: Path) -> None:
    if tuple(line.split(",")) != COLUMNS:
        raise ValueError(f"{path}: not a results file of this version (its first line differs)")


def _encode(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    # A row is one line of the file, so that a torn one can be told.
    return "" if value is None else str(value).replace("\n", " ")


def _decode(name: str, text: str) -> Any:
    hint = _TYPES[name]
    kinds = [kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None)]
    if text == "" and kinds != [hint]:
        return None
    if kinds == [bool]:
        return {"True": True, "False": False}[text]
    return kinds[0](text)


def _git_sha() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked archive has no history


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def _processor() -> str:
    """The processor's marketing name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
