"""Real sweeps that are disturbed and resumed, and the judgement of what they leave.

A results file is read here without the code under test. Processes are found in /proc, by a mark
in their environment: Linux only.
"""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "KILLS_MARK"
ENDS_S = 20.0  # what a killed process started has ended after this time
RUN_S = 600.0  # no run takes longer
PROBLEM = ("batch", "q_heads", "kv_heads", "seq_len", "head_dim", "dtype", "causal")
KEY = (*PROBLEM, "q_block", "kv_block", "method", "params", "backend", "phase", "clock")
Line = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table.

    Attributes:
        at_s: seconds after the start at which it happened; None where a file was changed.
        exit_disturbed, exit_resumed: exit statuses; minus the signal that ended a process.
        rows_left: intact rows in the file before the run was resumed.
        rows: rows in the end, and how many of each status.
        lines_lost: lines of complete groups that are not in the file any more.
        keys_equal: whether every row of an undisturbed run is there exactly once.
        orphans: processes of the disturbed run that were left after it.
        note: what was wrong, or why it was not done.
        code: of the suite, as most rows have it.
    """

    kind: str
    what: str
    device: str
    at_s: float | None = None
    exit_disturbed: int | None = None
    rows_left: int = 0
    exit_resumed: int | None = None
    rows: int = 0
    statuses: str = ""
    lines_lost: int = 0
    keys_equal: bool = False
    orphans: int = 0
    passed: bool = False
    note: str = ""
    code: str = ""


class Run:
    """A run_bench.py process and everything that it starts; what it compiles lies in `cache`."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, cache: Path, **options: object
    ) -> None:
        self.mark, self.log = f"{os.getpid()}-{time.monotonic_ns()}", folder / "log"
        environ = os.environ | {MARK: self.mark, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        command = [sys.executable, str(ROOT / "run_bench.py"), "--run", "run", "--output",
                   str(folder), *arguments]  # fmt: skip
        self.started = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, start_new_session=True, **options
            )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def wait(self) -> int:
        try:
            return self.process.wait(RUN_S)
        # After Ctrl-C what is left would disturb whatever comes next.
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            for pid in (self.process.pid, *self.alive()):
                _kill(pid)
            if isinstance(error, subprocess.TimeoutExpired):
                return self.process.wait()
            raise

    def wait_until(self, moment: float) -> bool:
        """Whether the run still goes on at that moment."""
        try:
            self.process.wait(max(0.0, moment - self.seconds))
        except subprocess.TimeoutExpired:
            return True
        return False

    def alive(self) -> list[int]:
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                pass  # it has ended, or is somebody else's
        return found

    def workers(self) -> list[int]:
        """Processes that measure, then those that compile ahead."""
        found = []
        for pid in self.alive():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if b"spawn_main" in command and int(stat[1]) == self.process.pid:
                found.append((int(stat[19]), pid))
        return [pid for _, pid in sorted(found)]

    def wait_for_problems(self, number: int) -> bool:
        """Whether so many problems are on disk and the run still goes on."""
        while self.process.poll() is None:
            if problems_in(self.log.parent) >= number:
                return True
            time.sleep(0.02)
        return False

    def wait_for_workers(self, number: int = 1) -> list[int]:
        """At least so many, or none where the run ends before."""
        while self.process.poll() is None:
            if len(workers := self.workers()) >= number:
                return workers
            time.sleep(0.02)
        return []

    def orphans(self) -> int:
        """Processes left some seconds after the end; they are ended here."""
        deadline = time.monotonic() + ENDS_S
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            _kill(pid)
        return len(left)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
        text: its file.
        steps: how long it took to its first problem on disk, from each to the next, to its end.
    """

    text: bytes
    steps: tuple[float, ...]

    @property
    def keys(self) -> Counter:
        return Counter(map(key, intact(self.text)))


class Ground:
    """Where faults happen: a device, a folder, and the random moments."""

    def __init__(self, device: str, folder: Path, kills: int, small: bool) -> None:
        self.device, self.folder, self.kills = device, folder, kills
        self.cache = folder / "cache"
        self.random, self.number = random.Random(0), count()
        # Short calls on a GPU go round thousands of sets of inputs, until these exceed its L2.
        scale = 1 if device == "cpu" else 32
        lengths = [str(scale * n) for n in ((64, 96) if small else (64, 96, 128, 192))]
        self.base = (
            "--device", device, "--heads", "4", "--head-dim", "64", "--phases", "fwd", "fwd_bwd",
            "--rounds", "8", "--seconds", "1",
        )  # fmt: skip
        # A culprit's neighbours are in its own problem; kills want one before and one after.
        self.few = lengths[:1] if small else lengths[:2]
        self.plain = self.sweep("standard", "spattention", lengths=lengths)
        self._references: dict[tuple[str, ...], Reference] = {}

    def sweep(
        self, *methods: str, lengths: Sequence[str] | None = None,
        backends: Sequence[str] = ("blockwise", "sdpa-flash"), limit: float = 60,
    ) -> tuple[str, ...]:  # fmt: skip
        lengths = lengths or self.few
        return (*self.base, "--methods", *methods, "--seq-len", *lengths, "--backends", *backends,
                "--time-limit", str(limit))  # fmt: skip

    def new_folder(self) -> Path:
        folder = self.folder / str(next(self.number))
        (folder / "results").mkdir(parents=True)
        return folder

    def reference(self, arguments: tuple[str, ...]) -> Reference:
        if arguments not in self._references:
            folder = self.new_folder()
            run, times = Run(arguments, folder, self.cache), [0.0]
            while run.process.poll() is None:
                if problems_in(folder) == len(times):
                    times.append(run.seconds)
                time.sleep(0.02)
            times.append(run.seconds)
            if run.wait() != 0:
                raise RuntimeError(f"an undisturbed run failed: {run.log.read_text()}")
            text = (folder / "results" / "run.csv").read_bytes()
            steps = tuple(after - before for before, after in pairwise(times))
            self._references[arguments] = Reference(text, steps)
        return self._references[arguments]


@dataclass
class Case:
    """One fault on its way: what was asked, what must come out."""

    ground: Ground
    kind: str
    what: str
    arguments: tuple[str, ...]
    expected: Counter
    folder: Path
    exits: tuple[int, ...] = ()  # right exit statuses of the disturbed run
    crashed: bool = False  # whether rows of a failure may be there, of any cell
    culprit: str | None = None  # status of the rows of `faulty`
    complete: bool = False  # whether the disturbed run must have come to its end by itself
    from_empty_caches: bool = False

    @property
    def path(self) -> Path:
        return self.folder / "results" / "run.csv"

    @property
    def cache(self) -> Path:
        return self.folder / "cache" if self.from_empty_caches else self.ground.cache

    def start(self, **options: object) -> Run:
        return Run(self.arguments, self.folder, self.cache, **options)

    def conclude(
        self, run: Run | None, at: float | None, resume: Sequence[str] = (), note: str = ""
    ) -> Finding:
        """Waits for the disturbed run, resumes it and judges what is there in the end."""
        disturbed = run.wait() if run else None
        orphans = run.orphans() if run else 0
        log = run.log.read_text(errors="replace") if run else ""
        before = self.path.read_bytes() if self.path.exists() else b""
        again = Run((*self.arguments, "--resume", *resume), self.folder, self.cache)
        resumed = again.wait()
        orphans += again.orphans()
        log += again.log.read_text(errors="replace")
        after = self.path.read_bytes()
        rows = intact(after)
        left = [row for row in intact(before) if key(row) in self.expected]
        lost = complete_lines(before, self.expected) - set(after.split(b"\n"))
        statuses = Counter(row["status"] for row in rows)
        wrong = [note] if note else []
        wrong += ["traceback"] * ("Traceback" in log)
        wrong += ["exit of the disturbed run"] * (run is not None and disturbed not in self.exits)
        wrong += ["exit of the resumed run"] * (resumed != int("crash" in statuses))
        wrong += ["statuses"] * (not self.right_statuses(rows))
        keys = Counter(map(key, rows))
        equal = keys == self.expected and after.count(b"\n") == len(rows) + 1
        wrong += ["incomplete"] * (self.complete and len(left) != self.expected.total())
        return Finding(
            kind=self.kind, what=self.what, device=self.ground.device,
            at_s=None if at is None else round(at, 2), exit_disturbed=disturbed,
            rows_left=len(left), exit_resumed=resumed, rows=len(rows),
            statuses=" ".join(f"{name}:{n}" for name, n in sorted(statuses.items())),
            lines_lost=len(lost), keys_equal=equal, orphans=orphans,
            passed=equal and not lost and not orphans and not wrong, note="; ".join(wrong),
            code=Counter(row["code"] for row in rows).most_common(1)[0][0] if rows else "",
        )  # fmt: skip

    def right_statuses(self, rows: list[Line]) -> bool:
        faulty = {x["status"] for x in rows if x["method"] == "faulty" and not refused(x)}
        others = {x["status"] for x in rows if x["method"] != "faulty" and not refused(x)}
        if self.crashed:  # one cell was running when the process was ended
            ended = {(x["method"], x["backend"], x["seq_len"]) for x in rows
                     if x["status"] == "crash"}  # fmt: skip
            return others <= {"ok", "crash"} and len(ended) <= 1
        expected = {self.culprit} if self.culprit else set()
        # A compiled culprit is right where nothing is compiled.
        return others == {"ok"} and faulty - {"ok"} == expected


def refused(row: Line) -> bool:
    return row["status"] == "unsupported" and row["backend"] == "flex" and row["phase"] != "fwd"


def intact(text: bytes) -> list[Line]:
    """Whole lines with as many fields as the header has, of a known kind."""
    *lines, _torn = text.split(b"\n")
    if not lines:
        return []
    names, rows = lines[0].decode(errors="replace").split(","), []
    for line in lines[1:]:
        values = next(csv.reader([line.decode(errors="replace")]), [])
        row = dict(zip(names, values, strict=False))
        if len(values) == len(names) and row.get("seq_len", "").isdecimal():
            rows.append(row)
    return rows


def problems_in(folder: Path) -> int:
    path = folder / "results" / "run.csv"
    return len({row["seq_len"] for row in intact(path.read_bytes())}) if path.exists() else 0


def key(row: Line) -> tuple[str, ...]:
    clock = row["clock"].replace("kernels", "device")
    return tuple(clock if name == "clock" else row[name] for name in KEY)


def complete_lines(text: bytes, expected: Counter) -> set[bytes]:
    """Lines of the problems of which every row is there."""
    size = len(PROBLEM)
    there = Counter(k[:size] for k in map(key, intact(text)) if k in expected)
    wanted = Counter(k[:size] for k in expected)
    header, *lines = text.split(b"\n")[:-1] or [b""]
    return {
        line
        for line in lines
        for row in intact(header + b"\n" + line + b"\n")
        if key(row) in expected and there[key(row)[:size]] == wanted[key(row)[:size]]
    }


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
