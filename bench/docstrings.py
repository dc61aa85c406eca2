"""A text to train on that every installation has: the docstrings of packages that it needs.

`python -m bench.docstrings FILE` writes it, and beside it a table of the packages that it is made
of, with versions and licences: docstrings.sources.csv for docstrings.txt.
"""

from __future__ import annotations

import argparse
import ast
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from bench.tables import write_table
from bench.text import text_name

PACKAGES = ("torch", "numpy", "pandas", "transformers")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a text is made of.

    Attributes:
        text: as rows of training name it in `data`.
    """

    text: str
    package: str
    version: str
    licence: str
    characters: int


def docstrings(package: str) -> Iterator[str]:
    """Every docstring of a package once, file by file; no code of it is run."""
    seen = set()
    for file in sorted(distribution(package).files):
        if file.suffix != ".py" or file.parts[0] != package:
            continue
        for node in ast.walk(_parsed(Path(file.locate()))):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and text not in seen:
                seen.add(text)
                yield text


def _parsed(path: Path) -> ast.Module:
    """A file's tree; an empty one where it is written for another Python."""
    with warnings.catch_warnings(), suppress(SyntaxError):
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes())
    return ast.Module([], [])


def licence(package: str) -> str:
    about = distribution(package).metadata
    named = about["License-Expression"] or about["License"] or "see its metadata"
    return named.strip().splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    with file.open("w", encoding="utf-8") as out:
        lengths = {
            package: sum(out.write(f"{text}\n\n") for text in docstrings(package))
            for package in PACKAGES
        }
    name = text_name(file)
    sources = [
        Source(text=name, package=package, version=distribution(package).version,
               licence=licence(package), characters=length)
        for package, length in lengths.items()
    ]  # fmt: skip
    for x in sources:
        print(f"{x.package} {x.version} ({x.licence}): {x.characters:,} characters")
    write_table(file.with_suffix(".sources.csv"), sources, Source)


if __name__ == "__main__":
    main()
