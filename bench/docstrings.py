"""A text to train on that every installation has: the docstrings of packages that it needs.

`python -m bench.docstrings FILE` writes it, and prints each package with version and licence.
"""

from __future__ import annotations

import argparse
import ast
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path

PACKAGES = ("torch", "numpy", "pandas", "transformers")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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
        for package in PACKAGES:
            length = sum(out.write(f"{text}\n\n") for text in docstrings(package))
            version = distribution(package).version
            print(f"{package} {version} ({licence(package)}): {length:,} characters")


if __name__ == "__main__":
    main()
