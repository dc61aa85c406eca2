"""The command line: python run_bench.py [COMMAND] --help; without a command it sweeps."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

# While torch is imported, for seconds, an interrupt just ends this. One that is ignored stays so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import tyro
from rich.console import Console

from bench import figures, report
from bench.backend_figures import draw_backends
from bench.backends import BACKENDS
from bench.compare import compare, sides
from bench.paper_run import Paper, reproduce
from bench.profile import Profile, is_profile, print_profile, profile, read_profile
from bench.record import STEP, Row, read_rows
from bench.request import Sweep, named_device
from bench.specs import parameters_text
from bench.style import drawn_into
from bench.sweep import sweep
from bench.train import Train, train
from bench.train_figures import draw_training
from bench.train_report import print_training
from methods import METHODS

KINDS = {"INT": "whole numbers", "FLOAT": "numbers", "PATH": "a path", "True": "True or False"}
# tyro's complaints.
WRONG_VALUE = re.compile(
    r"Error parsing (?P<flag>--\S+): .*?'(?P<given>[^']*)'"
    rf".*Argument helptext: (?P=flag).*?(?P<kind>{'|'.join(KINDS)})"
)
WRONG_COMMAND = re.compile(
    r"Unrecognized options: (?P<given>.*?) Available subcommands: (?P<allowed>.*?) For full"
)
WRONG_OPTION = re.compile(
    r"Unrecognized (?:or misplaced )?options: (?P<given>[^\s,]+)"
    r"(?:.*?Perhaps you meant: (?P<meant>--\S+))?"
)
NO_VALUE = re.compile(r"Missing value for argument '(?P<option>--[^']+)'")
MISSING = re.compile(r"Missing (?:from run_bench.py \w+: |value for argument ')(?P<what>[^\s']+)")
LOG_WIDTH = 160  # columns where the output is no terminal: enough for every column of a table


@dataclass(frozen=True)
class Plot:
    """Draw the figures and print the tables of a results file again."""

    csv: tyro.conf.Positional[Path]
    """A results file, or a profile's, of which there are tables alone."""
    output: Path | None = None
    """Folder of the figures; default plots/NAME for results/NAME.csv."""


@dataclass(frozen=True)
class Compare:
    """Faster, slower, same or unclear: B.csv against A.csv, or two methods of one file."""

    csv: tyro.conf.Positional[Path]
    """A results file."""
    other: tyro.conf.Positional[Path | None] = None
    """The results file that is held against it."""
    method: str | None = None
    """Instead of a second file, a method of the first: NAME or NAME:parameters, as in its rows."""
    against: str | None = None
    """The method that it is held against."""
    fail_slower: float | None = None
    """Exit with 1 where anything is slower by more than this many percent, by all of its
    interval, or the second file has no time of what the first has one of."""


@dataclass(frozen=True)
class List:
    """Methods and backends, their parameters and papers, and what this machine lacks."""


Command = (
    Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Paper, tyro.conf.subcommand("paper")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "sweep")
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    command = None
    try:
        command = _parse(arguments)
        match command:
            case Sweep():
                return sweep(command, console)
            case Train():
                return train(command, console)
            case Profile():
                return profile(command, console)
            case Plot():
                return _plot(command, console)
            case Compare(csv, other, method, against, fail_slower):
                return compare(*sides(csv, other, method, against), fail_slower, console)
            case Paper():
                return reproduce(command, console)
            case List():
                return _list(console)
    except (ValueError, OSError) as error:
        named = getattr(error, "filename", None)
        print(f"error: {f'{named}: {error.strerror}' if named else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        resumes = isinstance(command, Sweep | Train)
        told = "; finished problems are in the CSV, and --resume with --run and its name goes on"
        print(f"interrupted{told if resumes else ''}", file=sys.stderr)
        return 128 + (interruption.args or (signal.SIGINT,))[0]


def _terminate(number: int, frame: FrameType | None) -> None:
    """A request to end is an interrupt: what was started is ended, what was measured kept."""
    raise KeyboardInterrupt(number)


def _parse(arguments: Sequence[str]) -> Sweep | Train | Profile | Plot | Compare | Paper | List:
    """tyro's answer, with its boxed complaint folded into one line.

    Raises:
        ValueError: a flag or a value is wrong.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Command, args=arguments, prog="run_bench.py")
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_unboxed(complaint.getvalue(), arguments[0])) from None


def _unboxed(complaint: str, command: str) -> str:
    """The message of tyro's box in one line: what was given, and what is allowed."""
    lines = [line.strip(" ╭╮╰╯│─") for line in complaint.splitlines()]
    _title, *message = [line for line in lines if line.strip("-")]
    text = " ".join(message)
    if found := WRONG_VALUE.match(text):
        return f"{found['flag']} is {found['given']!r}; it takes {KINDS[found['kind']]}"
    if found := WRONG_COMMAND.match(text):
        return f"{found['given']!r} is no command; it takes {found['allowed']}"
    if found := WRONG_OPTION.match(text):
        meant = f"; perhaps {found['meant']}" if found["meant"] else ""
        return f"{found['given']} is no option of {command}{meant}; {command} --help has them all"
    if found := NO_VALUE.match(text):
        return f"{found['option']} needs a value; {command} --help says what it takes"
    if found := MISSING.match(text):
        return f"{command} needs {found['what']}; {command} --help says what that is"
    return re.split(r"\s*(?:Argument helptext:|For full helptext)", text)[0]


def _plot(command: Plot, console: Console) -> int:
    if is_profile(command.csv):
        print_profile(read_profile(command.csv), console)
        return 0
    rows = read_rows(command.csv)
    folder = command.output or _plots_of(command.csv.resolve())
    report.print_report(rows, console)
    print_training(rows, console)
    trained = {_cell_of_run(row) for row in rows if row.phase == STEP}
    swept = [row for row in rows if _cell_of_run(row) not in trained]  # no step's own call
    drawn = figures.draw_all(swept, folder) + draw_backends(swept, folder)
    drawn += draw_training(rows, folder)
    console.print(drawn_into(folder, len(drawn)), highlight=False, markup=False)
    return 0


def _cell_of_run(row: Row) -> tuple:
    return row.run, row.problem, row.method, row.params, row.backend


def _plots_of(path: Path) -> Path:
    """plots/NAME for results/NAME.csv, however deep; else a folder beside the file."""
    parts = list(path.with_suffix("").parts)
    if "results" not in parts:
        return Path(*parts)
    parts[len(parts) - 1 - parts[::-1].index("results")] = "plots"
    return Path(*parts)


def _list(console: Console) -> int:
    for name, method in METHODS.items():
        about = (type(method).__doc__ or "").splitlines()[0]
        console.print(f"[bold]{name}[/]  {parameters_text(method) or ''}\n    {about}")
        console.print(f"    {method.paper}", highlight=False)
    device = named_device(None)
    console.print(f"\nbackends on {device}:")
    for name, backend in BACKENDS.items():
        missing = backend.missing(device)
        absent = f"; not here: {missing}" if missing else ""
        console.print(f"[bold]{name}[/]  {backend.about}{absent}")
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    raise SystemExit(main())
