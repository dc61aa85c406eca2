"""What made each file of results/h200: its commands, to be run again on any CUDA device.

`python -m tests.gpu.results NAME ... --output FOLDER` runs those of the named files, one after the
other, and writes FOLDER/results/NAME.csv. What is whole there is not measured again. A name that
others begin with stands for them all: `train` for every training.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.record import ROOT
from tests.gpu.device import the_gpu

DENSE = "sdpa-flash sdpa-cudnn sdpa-efficient"
FAST = "flash varlen fa4"
FIVE = "standard sliding_window spattention spattention_released longformer"
LENGTHS = "1024 2048 4096 8192 16384 32768"
MODES = "reformer:mode='transformers' reformer:mode='reformer_pytorch'"
ASKED = "spattention spattention_released sliding_window local_only gapped_bands"
PEERS = f"standard longformer bigbird {MODES}"

SWEEP, TRAIN, PROFILE = (f"run_bench.py {name}" for name in ("sweep", "train", "profile"))
PAIR = f"torchrun --nproc-per-node 2 -- {TRAIN}"
CELLS = f"{SWEEP} --methods {FIVE} --backends flex --phases fwd_bwd --seconds 0.5"
WHOLE = f"{CELLS} --rounds 8 --seq-len {LENGTHS} --heads 8 16 32 --head-dim 64 128"
ROUNDS = (
    f"{SWEEP} --methods {' '.join(f'reformer:n_rounds={x}' for x in (1, 2, 4, 8))} "
    "--backends flex --phases prepare fwd fwd_bwd"
)
REFERENCES = (
    f"{SWEEP} --methods {PEERS} --causal False --seq-len 4096 16384 --phases fwd_bwd --seconds 3"
)
STEPS = f"{TRAIN} --tokens 32768 --steps 40 --warmup 15"
TABLE_2 = f"{STEPS} --seq-len 1024 8192 32768"
STAND_INS = "mehc_longformer mehc_bigbird mehc_reformer"
BANDED = "sliding_window local_only spattention spattention_released gapped_bands"
OLMOE = "--steps 20 --warmup 10"
SMALL = f"--model olmoe-0.25b-1.75b --tokens 16384 --seq-len 1024 {OLMOE}"
LARGE = f"--model olmoe-1b-7b --checkpointing {OLMOE}"
DENSE_STEP = "--methods standard --backends fa4 sdpa-cudnn"
SPARSE_STEPS = "--no-baseline --methods spattention spattention_released --backends flex"
TEXT = "docstrings.txt"  # of `make docstrings.txt`

# Kernels of flash-attn-4 are in reach of all of them where it is installed, but for `default` and
# `xformers`: the first is what an installation without it measures.
COMMANDS: dict[str, tuple[str, ...]] = {
    "default": (SWEEP,),
    "sweep_cold": (WHOLE,),
    "sweep_warm": (WHOLE,),
    "serial": ("-m tests.gpu.serial --heads 8 16",),  # the cells of sweep_serial
    "sweep_serial": (f"{CELLS} --seq-len {LENGTHS} --heads 8 16 --head-dim 128",),
    "point": (f"{SWEEP} --seq-len 4096 --backends flex {DENSE} --phases fwd bwd fwd_bwd",),
    "lengths": (
        f"{SWEEP} --seq-len {LENGTHS} 65536 --backends flex {DENSE} --phases fwd bwd fwd_bwd "
        "--seconds 2",
    ),
    "heads": (
        f"{SWEEP} --seq-len 4096 16384 --heads 8 16 32 --head-dim 64 128 --backends flex {DENSE} "
        "--phases fwd_bwd --seconds 2",
    ),
    "backends": (
        f"{SWEEP} --methods {FIVE} --seq-len {LENGTHS} 65536 --backends flex {FAST} {DENSE} "
        "--phases fwd_bwd --seconds 2",
        f"{SWEEP} --methods spattention --seq-len 32768 --heads 16 --backends flex {FAST} {DENSE} "
        "--phases fwd_bwd --seconds 2",
    ),
    "shapes": (
        f"{SWEEP} --methods spattention --seq-len 1001 4096 --kv-heads 2 --head-dim 64 "
        f"--backends flex {FAST} --phases fwd_bwd --seconds 2",
    ),
    "rounds": (
        f"{ROUNDS} --seq-len 1024 4096 --seconds 2",
        f"{ROUNDS} --seq-len 16384 65536 --seconds 1",
    ),
    "references_bfloat16": (
        f"{REFERENCES} --dtype bfloat16 --backends flex hf reformer-pytorch eager",
    ),
    "references_float32": (
        f"{REFERENCES} --dtype float32 --backends flex hf reformer-pytorch --block-size 64 32",
        f"{REFERENCES} --dtype float32 --backends flex hf reformer-pytorch eager",
    ),
    "uncompiled": (
        f"{SWEEP} --methods {ASKED} --seq-len 4096 16384 --backends flex eager --phases fwd_bwd "
        "--seconds 3",
    ),
    "xformers": (
        f"{SWEEP} --methods sliding_window --seq-len 1024 4096 16384 "
        "--backends flex xformers sdpa-cudnn --phases fwd_bwd --seconds 2",
    ),
    "profile_varlen": (f"{PROFILE} --methods spattention --backends varlen --seq-len 4096 16384",),
    "profile_varlen_heads": (
        f"{PROFILE} --methods spattention --backends varlen --seq-len 32768 --heads 16",
    ),
    "profile_reformer": (
        f"{PROFILE} --methods reformer --seq-len 16384 --phases prepare fwd bwd",
    ),
    "profile_references": (
        f"{PROFILE} --methods longformer bigbird reformer:mode='transformers' --seq-len 16384 "
        "--dtype float32 --causal False --block-size 32 --backends flex hf",
    ),
    "profile_rivals": (
        f"{PROFILE} --methods standard reformer:mode='reformer_pytorch' --seq-len 16384 "
        "--dtype float32 --causal False --phases fwd_bwd --backends flex eager reformer-pytorch",
    ),
    "profile_xformers": (
        f"{PROFILE} --methods standard sliding_window --seq-len 16384 --phases fwd_bwd "
        "--backends flex xformers",
    ),
    "block_lists": (
        f"{SWEEP} --methods spattention tests/gpu/gridless.py:METHOD --seq-len 32768 "
        "--backends flex --phases layout",
        f"{SWEEP} --no-baseline --methods spattention --seq-len 1048576 --head-dim 64 "
        "--backends flex --phases layout fwd_bwd --seconds 2",
    ),
    "paper_speeds": ("run_bench.py paper",),
    "matrix": ("-m tests.gpu.matrix --resume",),
    "faults": ("-m tests.faults --device cuda --seq-len 8192 32768",),
    "kills": ("-m tests.kills --device cuda --small --kinds device_assert oom_fwd oom_bwd hang",),
    "clocks": ("-m tests.gpu.clocks",),
    "detection": ("-m tests.detection --device cuda",),
    "attend_cost": ("-m tests.gpu.attend_cost",),
    "train_table2": (
        f"{TABLE_2} --methods {BANDED} longformer bigbird --backends flex",
        f"{STEPS} --seq-len 1024 --no-baseline --methods {STAND_INS} --backends flex",
        f"{TABLE_2} {DENSE_STEP}",
        f"{TABLE_2} --no-baseline --methods sliding_window local_only --backends fa4",
        f"{TABLE_2} --no-baseline --methods spattention gapped_bands --backends varlen",
        f"{TABLE_2} --no-baseline --methods spattention_released longformer {STAND_INS} "
        "--backends flash",
        f"{TABLE_2.replace(TRAIN, PAIR)} --methods spattention --backends varlen fa4",
    ),
    "step_kernels": (
        f"{TABLE_2} --methods standard --backends fa4",
        f"{TABLE_2} --no-baseline --methods spattention --backends flex varlen",
        f"{TABLE_2} --no-baseline --methods spattention_released --backends flash",
    ),
    "train_olmoe_small": tuple(
        f"{how} {SMALL} {cells}" for how in (TRAIN, PAIR) for cells in (DENSE_STEP, SPARSE_STEPS)
    ),
    "train_olmoe_large": tuple(
        f"{TRAIN} {LARGE} --seq-len {n} --tokens {tokens} {cells}"
        for n, tokens in ((4096, 8192), (16384, 16384))
        for cells in (DENSE_STEP, SPARSE_STEPS)
    ),
    "train_paper": (
        f"{TRAIN} --tokens 4096 --methods spattention spattention_released {STAND_INS} "
        "--no-compiled --backends flex eager",
    ),
    "train_text": (f"{TRAIN} --text {TEXT} --steps 300 --tokens 8192 --backends flex",),
}
# What starts from empty caches: by name, the folder; the later of two finds what the first left.
CACHES = {"default": "default", "sweep_cold": "sweep", "sweep_warm": "sweep",
          "sweep_serial": "serial"}  # fmt: skip


def arguments(name: str, command: str, folder: Path) -> list[str]:
    """A command of a file, as the system starts it, with where it writes."""
    first, *words = command.split()
    if first == "-m":
        return [sys.executable, first, *words, "--output", str(folder / "results" / f"{name}.csv")]
    run = "paper" if words == ["paper"] else name
    where = ["--run", run, "--output", str(folder)]
    if words[-1] != "paper" and PROFILE not in command:
        where.append("--resume")
    if first == "torchrun":
        return [str(Path(sysconfig.get_path("scripts")) / first), *words, *where]
    return [sys.executable, str(ROOT / first), *words, *where]


def chosen(names: Sequence[str]) -> list[str]:
    """The files that are meant, in the order of COMMANDS.

    Raises:
        ValueError: a name stands for none.
    """
    for name in names:
        if not any(known.startswith(name) for known in COMMANDS):
            raise ValueError(f"{name!r} is no file's name; they are {', '.join(COMMANDS)}")
    return [x for x in COMMANDS if not names or any(x.startswith(name) for name in names)]


def run(name: str, folder: Path, caches: Path) -> bool:
    """Whether every command of a file came to a good end; FOLDER/NAME.log has what they said."""
    environ = dict(os.environ)
    if name in CACHES:
        environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches / CACHES[name])
        environ["TRITON_CACHE_DIR"] = str(caches / CACHES[name] / "triton")
    good = True
    with (folder / f"{name}.log").open("ab") as log:
        for command in COMMANDS[name]:
            if command.startswith("torchrun") and torch.cuda.device_count() < 2:
                print(f"{name}: left out, which needs two GPUs: {command}", flush=True)
                continue
            start = time.perf_counter()
            words = arguments(name, command, folder)
            status = subprocess.call(words, cwd=ROOT, env=environ, stdout=log, stderr=log)
            took = time.perf_counter() - start
            print(f"{name}: status {status}, {took:.0f} s: {command}", flush=True)
            good = good and status == 0
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files; all by default")
    parser.add_argument("--output", type=Path, default=ROOT)
    given = parser.parse_args()
    try:
        names = chosen(given.names)
    except ValueError as error:
        parser.error(str(error))
    the_gpu(parser)
    (given.output / "results").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as caches:
        ends = [run(name, given.output, Path(caches)) for name in names]
    return 0 if all(ends) else 1


if __name__ == "__main__":
    sys.exit(main())
