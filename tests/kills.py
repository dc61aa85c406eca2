"""Faults by real signals: run_bench.py is disturbed, resumed, and nothing may be lost.

`python -m tests.kills` starts real sweeps in a temporary folder, kills them and their workers at
random moments, fills their disk, damages their files, gives them methods that crash, hang and ask
for too much memory, goes on by `--resume`, and writes a line for each fault. A fault has passed
where, in the end, every row of an undisturbed run is there exactly once, rows of groups that were
complete are the very same lines, no process is left, and exit statuses and typed rows are right.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields, replace
from functools import partial
from pathlib import Path

from tests.disturbed import ROOT, RUN_S, Case, Finding, Ground, Run, intact, key

Kind = Callable[[Ground, str], Iterator[Finding]]
TABLE = ROOT / "results" / "cpu" / "kills.csv"
PAGE = 4096  # bytes, of a tmpfs

FAULTY = f"{ROOT / 'tests' / 'faulty.py'}:FAULTY"


def _case(ground: Ground, kind: str, what: str, **changes: object) -> Case:
    """A fault of the plain sweep."""
    keys = ground.reference(ground.plain).keys
    return Case(ground, kind, what, ground.plain, keys, ground.new_folder(), **changes)


def sweep_kill(ground: Ground, kind: str) -> Iterator[Finding]:
    for _ in range(ground.kills):
        yield _struck(
            ground, kind, "kill -9 of the sweep", _end_sweep(signal.SIGKILL),
            exits=(-signal.SIGKILL,),
        )  # fmt: skip


def worker_kill(ground: Ground, kind: str) -> Iterator[Finding]:
    for _ in range(ground.kills):
        yield _struck(
            ground, kind, "kill -9 of the worker", _end_worker,
            exits=(0, 1), crashed=True, complete=True,
        )  # fmt: skip


def interrupt(ground: Ground, kind: str) -> Iterator[Finding]:
    ways = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM, "sigint_group": signal.SIGINT}
    number = ways[kind]
    strike = _end_sweep(number)
    if kind == "sigint_group":  # as Ctrl-C on a terminal
        strike = lambda run: _sent(os.killpg, run.process.pid, number)  # noqa: E731
    for _ in range(max(1, ground.kills // 4)):
        name = f"{number.name} to {'all processes' if kind == 'sigint_group' else 'the sweep'}"
        # To a shell both are one: while it imports, a sweep ends by the signal itself.
        yield _struck(ground, kind, name, strike, exits=(128 + number, -number))


def _struck(
    ground: Ground, kind: str, what: str, strike: Callable[[Run], bool], **right: object
) -> Finding:
    """Strikes at a random moment between two problems on disk, or before the first.

    By the clock alone most strikes would meet nothing but imports. Where the run had ended by
    then, another moment is drawn.
    """
    steps = ground.reference(ground.plain).steps[:-1]
    while True:
        case, step = _case(ground, kind, what, **right), ground.random.randrange(len(steps))
        run, delay = case.start(), ground.random.uniform(0, steps[step])
        if run.wait_for_problems(step) and run.wait_until(run.seconds + delay):
            at = run.seconds
            if strike(run):
                return case.conclude(run, at)
        run.wait()


def _end_sweep(number: signal.Signals) -> Callable[[Run], bool]:
    return lambda run: _sent(os.kill, run.process.pid, number)


def _end_worker(run: Run) -> bool:
    workers = run.wait_for_workers()
    return bool(workers) and _sent(os.kill, workers[0], signal.SIGKILL)


def _sent(send: Callable[[int, int], None], pid: int, number: int) -> bool:
    try:
        send(pid, number)
    except ProcessLookupError:
        return False
    return True


CULPRITS = {
    "segfault": "crash", "hang": "timeout", "compile_hang": "timeout", "oom_fwd": "oom",
    "oom_bwd": "oom", "raise": "crash", "compile_raise": "crash", "device_assert": "crash",
}  # fmt: skip


def culprit(ground: Ground, kind: str) -> Iterator[Finding]:
    """A method that fails by itself: a typed row, and the others are measured."""
    if kind == "device_assert" and ground.device == "cpu":
        yield Finding(kind=kind, what="skipped", device="cpu", note="skipped: needs CUDA")
        return
    how, limit = ("hang", 20) if CULPRITS[kind] == "timeout" else (kind, 60)
    case = _faulty_case(ground, kind, how, limit)
    run = case.start()
    yield case.conclude(run, None)


def _faulty_case(ground: Ground, kind: str, how: str, limit: float) -> Case:
    compiled = kind.startswith("compile_")
    backends = ("blockwise", "flex") if compiled else ("blockwise", "sdpa-flash")
    sound = ground.sweep("spattention", FAULTY, backends=backends)
    keys = Counter()
    for known in ground.reference(sound).keys:
        keys[tuple(f"how='{how}'" if field == "how='none'" else field for field in known)] += 1
    arguments = ground.sweep(
        "spattention", f"{FAULTY}:how='{how}'", backends=backends, limit=limit
    )
    status = CULPRITS[how]
    return Case(
        ground, kind, f"a method that does: {kind}", arguments, keys, ground.new_folder(),
        exits=(int(status == "crash"),), culprit=status, complete=True,
    )  # fmt: skip


def sweep_kill_hang(ground: Ground, kind: str) -> Iterator[Finding]:
    """The sweep dies while its worker is in a cell that does not end."""
    case = _faulty_case(ground, kind, "hang", limit=60)
    case.what, case.exits, case.complete = "kill -9 of the sweep in a hang", (-9,), False
    run = case.start()
    run.wait_until(run.seconds + sum(ground.reference(ground.plain).steps) + 5)
    at = run.seconds
    _sent(os.kill, run.process.pid, signal.SIGKILL)
    yield case.conclude(run, at, resume=("--time-limit", "20"))


def compile_kill(ground: Ground, kind: str) -> Iterator[Finding]:
    """Kills while kernels are compiled ahead: of the sweep, and of a process that compiles."""
    # A pool that lost a process leaves the rest to the one that measures: that takes longer.
    arguments = ground.sweep("standard", "spattention", backends=("flex",), limit=RUN_S)
    keys = ground.reference(arguments).keys
    for victim in ("the sweep", "a process that compiles"):
        what = f"kill -9 of {victim} while compiling ahead"
        case = Case(
            ground, kind, what, arguments, keys, ground.new_folder(), from_empty_caches=True
        )
        run = case.start()
        workers = run.wait_for_workers(2)
        run.wait_until(run.seconds + ground.random.uniform(3, 12))
        at = run.seconds
        if victim == "the sweep":
            case.exits = (-signal.SIGKILL,)
            _sent(os.kill, run.process.pid, signal.SIGKILL)
        else:
            case.exits, case.complete = (0,), True
            _sent(os.kill, workers[-1], signal.SIGKILL)
        yield case.conclude(run, at)


def disk_full(ground: Ground, kind: str) -> Iterator[Finding]:
    """A disk of so many bytes: a tmpfs where one can be mounted, else a limit on file sizes."""
    needed = -(-len(ground.reference(ground.plain).text) // PAGE)
    for pages in range(1, min(4, needed)):
        case = _case(ground, kind, "", exits=(2,))
        size = PAGE * pages
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(case.path.parent)]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            case.what = f"tmpfs of {size} bytes"
            run = case.start()
            run.wait()
            grown = ["mount", "-o", "remount,size=4m", str(case.path.parent)]
            subprocess.run(grown, check=True)
            finding = case.conclude(run, None, note=_said(run, "No space left on device"))
            subprocess.run(["umount", str(case.path.parent)], check=True)
        else:
            case.what = f"file size limit of {size} bytes"
            limits = (size, resource.RLIM_INFINITY)
            run = case.start(preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
            run.wait()
            finding = case.conclude(run, None, note=_said(run, "File too large"))
        yield finding


def _said(run: Run, message: str) -> str:
    """Empty where the run said so, in the last of its lines."""
    lines = run.log.read_text(errors="replace").splitlines()
    return "" if lines and lines[-1].startswith("error: ") and message in lines[-1] else "message"


def two_at_once(ground: Ground, kind: str) -> Iterator[Finding]:
    """A second sweep of the same name while the first one goes on."""
    case = _case(ground, kind, "a second sweep of the same file", exits=(0,), complete=True)
    run = case.start()
    run.wait_for_workers()
    at = run.seconds
    other = case.folder / "second"
    other.mkdir()
    (other / "results").symlink_to(case.path.parent)
    second = Run((*case.arguments, "--resume"), other, case.cache)
    refused = second.wait() == 2 and not _said(second, "is being written by another process")
    yield case.conclude(run, at, note="" if refused else "not refused")


def torn(ground: Ground, kind: str) -> Iterator[Finding]:
    """The last line ends in its middle."""
    text = ground.reference(ground.plain).text
    last = text.rfind(b"\n", 0, -1) + 1
    for _ in range(5):
        cut = ground.random.randrange(last + 1, len(text))
        case = _case(ground, kind, f"the last line ends after {cut - last} bytes")
        case.path.write_bytes(text[:cut])
        yield case.conclude(None, None)


def corrupt(ground: Ground, kind: str) -> Iterator[Finding]:
    """Damage in the middle of a file, with whole lines around it."""
    text = ground.reference(ground.plain).text
    for what, damage in DAMAGES.items():
        lines = text.split(b"\n")
        number = ground.random.randrange(1, len(lines) - 1)
        lines[number] = damage(ground, lines[number])
        case = _case(ground, kind, what)
        case.path.write_bytes(b"\n".join(lines))
        aside = case.path.with_suffix(".csv.damaged")
        finding = case.conclude(None, None)
        kept = aside.exists() and aside.read_bytes() == lines[number] + b"\n"
        yield finding if kept else replace(finding, passed=False, note="the line is not kept")


DAMAGES: dict[str, Callable[[Ground, bytes], bytes]] = {
    "a line of garbage": lambda ground, line: b"lorem ipsum; dolor, sit amet",
    "a line of binary bytes": lambda ground, line: ground.random.randbytes(300).replace(
        b"\n", b""
    ),
    "a quote that is not closed": lambda ground, line: line[:20] + b',"' + line[20:],
    "a line of nothing": lambda ground, line: b"",
    "a formula for a number": lambda ground, line: line.replace(b",4,4,", b",=cmd(),4,"),
    "two lines joined": lambda ground, line: line + line,
}


def header(ground: Ground, kind: str) -> Iterator[Finding]:
    """A damaged first line: refused, the file untouched; mended by hand it goes on."""
    text = ground.reference(ground.plain).text
    case = _case(ground, kind, "the first line damaged: refused until it is mended", exits=(2,))
    damaged = text.replace(b"time_utc", b"time_\xff\x00", 1)
    case.path.write_bytes(damaged)
    case.arguments = (*case.arguments, "--resume")
    run = case.start()
    run.wait()
    note = _said(run, "not a results file") or "changed" * (case.path.read_bytes() != damaged)
    case.path.write_bytes(text)
    case.arguments = case.arguments[:-1]
    yield case.conclude(run, None, note=note)


def code(ground: Ground, kind: str) -> Iterator[Finding]:
    """Code in fields that are text: data like any other, kept and never run."""
    case = _case(ground, kind, "code in the parameters and the method of two rows")
    trap, lines = case.folder / "trap", ground.reference(ground.plain).text.split(b"\n")
    attack = f"window=__import__('os').mkdir('{trap}')".encode()
    script = case.folder / "evil.py"
    script.write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    spoilt = [number for number, line in enumerate(lines) if b",spattention," in line][:2]
    names = (b"spattention", f"{script}:METHOD".encode())
    for number, name, other in zip(spoilt, names, (attack, b""), strict=True):
        before, _, after = lines[number].partition(b",spattention,")
        _, _, after = after.partition(b",blockwise,")
        lines[number] = before + b"," + name + b"," + other + b",blockwise," + after
    case.path.write_bytes(b"\n".join(lines))
    case.expected = case.expected + Counter(
        key(row) for row in intact(case.path.read_bytes()) if key(row) not in case.expected
    )
    finding = case.conclude(None, None)
    yield replace(finding, passed=False, note="the code was run") if trap.exists() else finding


KINDS: dict[str, Kind] = {
    "sweep_kill": sweep_kill,
    "worker_kill": worker_kill,
    **dict.fromkeys(("sigint", "sigint_group", "sigterm"), interrupt),
    **dict.fromkeys(CULPRITS, culprit),
    "sweep_kill_hang": sweep_kill_hang,
    "compile_kill": compile_kill,
    "disk_full": disk_full,
    "two_at_once": two_at_once,
    "torn": torn,
    "corrupt": corrupt,
    "header": header,
    "code": code,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Disturb sweeps; write what became of them.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--kills", type=int, default=20, help="random moments a kind")
    parser.add_argument("--small", action="store_true", help="two problems, few samples")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    passed = True
    with tempfile.TemporaryDirectory() as folder, args.output.open("w", newline="") as file:
        ground = Ground(args.device, Path(folder), args.kills, args.small)
        ground.random.seed(args.seed)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Finding))
        for kind in args.kinds:
            for finding in KINDS[kind](ground, kind):
                writer.writerow(astuple(finding))
                file.flush()
                print(*astuple(finding), sep="  ", flush=True)
                passed = passed and (finding.passed or finding.note.startswith("skipped"))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
