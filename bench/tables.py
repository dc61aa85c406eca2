"""Small tables: as CSV, a frozen dataclass a line, None as an empty field; and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

from bench.record import decode, encode

Line = TypeVar("Line")


def write_table(path: Path, lines: Iterable[Line], kind: type[Line]) -> None:
    """Writes lines of one dataclass over whatever the file held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: encode(v) for k, v in asdict(line).items()} for line in lines)


def read_table(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a file that `write_table` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: its columns are not those of `kind`, or a field is damaged; names the file.
    """
    hints = get_type_hints(kind)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [f.name for f in fields(kind)]:
            raise ValueError(f"{path}: not a table of this version (its first line differs)")
        try:
            return [kind(**{k: decode(k, v, hints) for k, v in line.items()}) for line in reader]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: damaged ({error})") from None


def markdown(
    heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: Iterable[int] | None = None
) -> Iterator[str]:
    """A Markdown table; `numbers` are the right-aligned columns, by default all but the first."""
    numbers = set(range(1, len(heads)) if numbers is None else numbers)
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---:' if i in numbers else '---' for i in range(len(heads)))} |"
    for line in lines:
        yield f"| {' | '.join(line)} |"
