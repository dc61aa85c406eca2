"""What earlier runs on this machine saw of cells; it lies in torch's folder of compiled kernels.

With that folder it comes and goes: the kernels of a cell that is known are compiled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

from bench.cells import Cell, Group
from bench.kernels import Ran
from bench.record import Environment, code_hash
from bench.specs import source_file

NAME = "sparse_attention_cells.jsonl"
Seen = dict[str, Ran | None]  # the kernels of a cell, by phase


class Memory:
    """The cells that were seen in one environment, from which their kernels follow."""

    def __init__(self, env: Environment) -> None:
        self.env, self.path = replace(env, git_sha=None, host=""), Path(cache_dir()) / NAME
        self.lines: dict[str, list] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with suppress(ValueError):  # a line that was cut off is nothing that was seen
                key, seen = json.loads(line)
                self.lines[key] = seen

    def recall(self, group: Group, cell: Cell) -> Seen | None:
        """What was seen of a cell, or None where nothing was, or not all."""
        seen = self.lines.get(self._key(group, cell))
        if seen is None:
            return None
        return {phase: ran and Ran(*ran) for phase, ran in seen.items()}

    def add(self, found: Iterable[tuple[Group, Cell, Seen]]) -> None:
        """Has later runs know of cells whose kernels are all compiled."""
        lines = [json.dumps([self._key(group, cell), seen]) for group, cell, seen in found]
        with suppress(OSError), self.path.open("a") as file:  # then they are compiled again
            file.write("".join(f"{line}\n" for line in lines))

    def _key(self, group: Group, cell: Cell) -> str:
        path = source_file(cell.method)
        env = replace(self.env, code=code_hash([path])) if path else self.env
        about = env, group.problem, group.block_size, group.phases, cell
        return hashlib.sha256(repr(about).encode()).hexdigest()
