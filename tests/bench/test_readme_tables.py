"""Tables of the README that wait for results of a GPU, from rows with made-up figures."""

import csv
import re
import shutil
from dataclasses import replace

import pytest

from bench import readme
from bench.profile import BETWEEN, Line
from bench.readme import RESULTS, _references, _with_rivals, sections
from bench.readme_proofs import kill_proofs, proofs
from bench.readme_speeds import TARGETS, WIDTH, by_heads, fastest, profiles, targets, waited
from bench.record import Store
from tests.bench.rows import make_row
from tests.bench.training import table2_step as step

LSH = "chunk=128,n_rounds=4,mode='transformers',before=1"


def both_clocks(device_us, host_us, seq_len=4096, clocks=("device", "host"), **changes):
    """Rows of a call as a sweep on a GPU writes them, forward too."""
    cell = {"seq_len": seq_len, "causal": False, "dtype": "float32"} | changes
    for clock, us in zip(clocks, (device_us, host_us), strict=True):
        samples = us and ";".join(9 * [f"{us}"])
        yield make_row(clock=clock, median_us=us, samples_us=samples, **cell)
        yield make_row(clock=clock, median_us=us and us / 3, **cell | {"phase": "fwd"})


def failed(status, **changes):
    return both_clocks(None, None, status=status, **changes)


def table(markdown):
    """Cells by line and column, and what is below the table."""
    lines, _, below = markdown.partition("\n\n")
    heads, _, *rest = (
        [x.strip() for x in line.strip("|").split("|")] for line in lines.split("\n")
    )
    heads = [name.partition(":")[0] for name in heads]
    names = [name for name in heads if not name.startswith("N = ")]
    assert all(len(line) == len(heads) for line in rest)
    found = {tuple(line[: len(names)]): dict(zip(heads, line, strict=True)) for line in rest}
    assert len(found) == len(rest)
    return found, below


def references(*cells):
    return table(_references([row for cell in cells for row in cell]))


def window(backend, *times, **changes):
    return both_clocks(*times, method="sliding_window", backend=backend, **changes)


def test_a_reference_is_over_ours_by_the_clock_that_both_have():
    lsh = {"method": "reformer", "params": LSH}
    found, below = references(
        both_clocks(4000, 9000, backend="flex", **lsh),
        both_clocks(99, 36000, clocks=("kernels", "host"), backend="hf", **lsh),
        window("flex", 2080, 5000), window("xformers", 6280, 7000),
        window("flex", 310, 5000, seq_len=16384), window("xformers", 125_000, 7000, seq_len=16384),
        window("flex", 50, 80, dtype="bfloat16"), window("xformers", 100, 80, dtype="bfloat16"),
    )  # fmt: skip
    assert list(found) == [
        ("`sliding_window`", "xformers", "float32"),
        ("`sliding_window`", "xformers", "bfloat16"),
        ("`reformer:mode='transformers'`", "hf", "float32"),
    ]
    first, second, third = found.values()
    assert first["N = 4096"] == "6.3 ms, 2.1 ms: 3.02x"
    assert first["N = 16384"] == "125 ms, 0.31 ms: 403.23x"
    assert (second["N = 4096"], second["N = 16384"]) == ("0.10 ms, 0.050 ms: 2.00x", "-")
    assert third["N = 4096"] == "36 ms, 9.0 ms: 4.00x, host"
    assert below.endswith("batch 1 · 8 heads · head_dim 128 · not causal · Chip X.")


def test_the_blocks_count_that_are_fastest_for_ours_of_those_that_both_have():
    small, smallest = ({"q_block": n, "kv_block": n} for n in (64, 32))
    found, _ = references(
        window("flex", 3000, 5000), window("flex", 2000, 4500, **small),
        window("flex", 1000, 4000, **smallest),
        window("xformers", 9000, 9000), window("xformers", 8000, 9900, **small),
        failed("unsupported", method="sliding_window", backend="xformers", **smallest),
        window("eager", 99, 11_000, clocks=("kernels", "host")),
        window("flex", 10, 20, seq_len=16384), window("flex", 11, 5, seq_len=16384, **small),
        window("eager", 40, 50, seq_len=16384),
    )  # fmt: skip
    cells = {name[1]: (line["N = 4096"], line["N = 16384"]) for name, line in found.items()}
    assert cells["xformers"][0] == "8.0 ms, 2.0 ms (blocks 64x64): 4.00x"
    assert cells["eager"] == (
        "11 ms, 5.0 ms: 2.20x, host", "0.040 ms, 0.010 ms: 4.00x",
    )  # fmt: skip


def test_a_wide_ratio_has_its_interval():
    def spread(us, share):
        return ";".join(f"{us * (1 + share * k):.6g}" for k in range(-6, 7))

    ours = make_row(method="sliding_window", median_us=2000, samples_us=spread(2000, 1e-4))
    for share, told in ((1e-4, r"4\.00x"), (0.02, r"4\.00x, 3\.\d\d to 4\.\d\d")):
        eager = replace(ours, backend="eager", median_us=8000, samples_us=spread(8000, share))
        (line,) = references([ours, eager])[0].values()
        assert re.fullmatch(rf"8\.0 ms, 2\.0 ms: {told}", line[f"N = {ours.seq_len}"])


def test_no_number_is_a_status_and_what_is_never_supported_is_no_line():
    wide = {"seq_len": 16384}
    found, _ = references(
        window("flex", 2000, 5000), window("flex", 9000, 9900, **wide),
        window("eager", 6000, 9000), window("eager", None, None, status="oom", **wide),
        failed("mismatch", method="longformer", backend="flex"),
        both_clocks(4000, 5000, method="longformer", backend="flex", **wide),
        both_clocks(5000, 5000, method="longformer", backend="hf"),
        failed("unsupported", method="longformer", backend="hf", **wide),
        failed("timeout", method="longformer", backend="eager"),
        failed("unsupported", method="longformer", backend="xformers"),
        failed("unsupported", method="longformer", backend="xformers", **wide),
    )  # fmt: skip
    cells = {name[:2]: (line["N = 4096"], line["N = 16384"]) for name, line in found.items()}
    assert cells == {
        ("`sliding_window`", "eager"): ("6.0 ms, 2.0 ms: 3.00x", "oom"),
        ("`longformer`", "hf"): ("ok : mismatch", "unsupported"),
        ("`longformer`", "eager"): ("timeout : mismatch", "-"),
    }


def test_a_clock_that_one_of_the_two_lost_is_not_used():
    slowed, timed = (
        [row for row in rows if row.phase == "fwd_bwd"]
        for rows in (failed("timeout", method="sliding_window"), window("flex", 1, 3000))
    )
    for ours in ([slowed[0], timed[1]], timed[1:]):
        found, _ = references(ours, window("eager", 6000, 9000))
        (line,) = found.values()
        assert line["N = 4096"] == "9.0 ms, 3.0 ms: 3.00x, host"
    found, _ = references([timed[0], slowed[1]], window("eager", 6000, 9000))
    assert found["`sliding_window`", "eager", "float32"]["N = 4096"].endswith(": 6000.00x")
    graphless = {"clocks": ("kernels", "host")}
    found, _ = references(window("flex", 1, 10, **graphless), window("eager", 1, 20, **graphless))
    assert found["`sliding_window`", "eager", "float32"]["N = 4096"].endswith(": 2.00x, host")


def test_an_eager_caller_is_over_dense_attention_only_in_runs_that_had_its_own_kernels():
    point = {
        "batch": 1, "q_heads": 8, "kv_heads": 8, "seq_len": 4096, "head_dim": 128,
        "dtype": "bfloat16", "causal": True, "clock": "host", "phase": "fwd_bwd",
    }  # fmt: skip
    runs = {"a": {"flex": 800, "eager": 20000}, "b": {"flex": 900, "sdpa-cudnn": 450}}
    rows = [
        make_row(run=run, method="standard", backend=backend, median_us=us, **point)
        for run, times in runs.items()
        for backend, us in times.items()
    ] + [
        make_row(run=run, method="spattention", backend="flex", median_us=600, **point)
        for run in runs
    ]
    assert waited(rows) == ([800 / 600, 900 / 600], [450 / 600])


def test_references_of_two_problems_are_no_table():
    with pytest.raises(ValueError, match=r"more than N and dtype: .*16 heads"):
        references(window("flex", 1, 1), window("eager", 1, 1, q_heads=16))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "h200").mkdir()

    def write(name, *rows):
        with Store(tmp_path / "h200" / f"{name}.csv") as store:
            store.append(rows)

    return write


def test_a_section_is_there_once_its_results_are(results, tmp_path):
    waiting = {"references", "train", "train-summary"}
    (tmp_path / "h200" / "references.time.csv").write_text("time_utc,spent_on,seconds\n")
    results("train_other", make_row())
    assert not waiting & set(sections())
    later, early = ({"time_utc": f"2026-01-0{day}T00:00:00Z"} for day in (2, 1))
    results("train", step(us=100.0, **later), make_row())
    results("train_again", step(us=200.0, **early), step("spattention", us=50.0))
    results("references_bf16", *window("flex", 2000, 1, dtype="bfloat16"))
    assert waiting & set(sections()) == waiting
    results("references", *window("flex", 2000, 1), *window("eager", 1000, 1))
    bodies = {name: sections()[name]() for name in waiting}
    assert "| `sliding_window` | eager | float32 | 1.0 ms, 2.0 ms: 0.50x" in bodies["references"]
    assert "| `standard` | flex | 41.0 M (1.00x) |" in bodies["train"]
    assert "| `spattention` | flex | 81.9 M (2.00x) |" in bodies["train"]


def test_a_section_stands_on_one_page(results, monkeypatch, tmp_path):
    results("train", step())
    made = {"train": sections()["train"]}
    monkeypatch.setattr(readme, "sections", lambda: made)
    pages = [tmp_path / name for name in ("a.md", "b.md")]
    text = "<!-- begin train -->\nold\n<!-- end train -->"
    for path, content in zip(pages, ("no marks", text), strict=True):
        path.write_text(content)
    readme.main(pages)
    assert pages[0].read_text() == "no marks"
    assert "| `standard` | flex | 41.0 M (1.00x) |" in pages[1].read_text()
    for content in ("no marks", text):
        pages[0].write_text(content)
        pages[1].write_text(content)
        with pytest.raises(ValueError, match=r"'train' is marked on [02] pages"):
            readme.main(pages)


def test_kills_on_a_gpu_are_counted_beside_those_on_a_cpu(tmp_path):
    cpu, gpu = kill_proofs(RESULTS)
    assert cpu[0].endswith("(CPU)") and gpu[0].endswith("(on the GPU)")
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "cpu" / "kills.csv"
    with path.open(newline="") as file:
        whole, *_ = lines = list(csv.DictReader(file))
    skipped = whole | {"passed": "False", "note": "skipped: needs two disks"}
    with (tmp_path / "h200" / "kills.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, whole)
        writer.writeheader()
        writer.writerows([whole, whole | {"passed": "False", "note": "message"}, whole, skipped])
    assert len(lines) > 4
    what = "sweeps killed, starved or damaged, then resumed"
    assert list(kill_proofs(tmp_path)) == [
        cpu, (f"{what} (on the GPU)", "2 of 3 ended with every row once", "`make kills`")
    ]  # fmt: skip
    assert f"| {what} (on the GPU) | 2 of 3 ended" in proofs(tmp_path)


def sampled(method, backend, samples, **changes):
    middle = sorted(samples)[len(samples) // 2]
    return make_row(
        method=method, backend=backend, median_us=middle, seq_len=1024, **changes,
        samples_us=";".join(map(str, samples)), rounds=";".join(map(str, range(len(samples)))),
    )  # fmt: skip


def test_speed_ups_by_heads_and_head_dim():
    rows = []
    for heads, dim, dense, own in (
        (16, 64, 500.0, 100.0),
        (8, 128, 400.0, None),
        (8, 64, 300.0, 75.0),
    ):
        shape = {"q_heads": heads, "head_dim": dim, "seq_len": 4096}
        rows += both_clocks(dense, 900.0, method="standard", **shape)
        rows += both_clocks(own, 900.0, status="ok" if own else "oom", **shape)
    lines = by_heads(rows).splitlines()
    order = "D = 64, N = 4096, H = 8 | D = 64, N = 4096, H = 16 | D = 128, N = 4096, H = 8"
    assert lines[0] == f"| method | {order} |"
    assert lines[2:] == [
        "| `standard` | 0.30 ms | 0.50 ms | 0.40 ms |", "| `spattention` | 4.00x | 5.00x | - |"
    ]  # fmt: skip


def test_backends_that_samples_do_not_tell_apart_share_the_first_place():
    noisy = [100.0, 80.0, 120.0, 90.0, 110.0, 100.0, 95.0, 105.0]
    rows = [
        sampled("standard", "flex", [400.0] * 8), sampled("standard", "fa4", [300.0] * 8),
        sampled("spattention", "flex", [101.0, 110.0] * 4),
        sampled("spattention", "varlen", noisy), sampled("spattention", "flash", [150.0] * 8),
        sampled("longformer", "flex", [600.0] * 8), sampled("longformer", "flash", [200.0] * 8),
    ]  # fmt: skip
    dense, ours, narrow = fastest(rows).splitlines()[2:]
    assert dense == "| `standard` | 300 us, fa4 |"
    assert ours.startswith("| `spattention` | 100 us, varlen or flex (3.00x, 2.")
    assert narrow == "| `longformer` | 200 us, flash (1.50x) |"


def test_dense_attention_of_another_run_is_added_where_a_run_lacks_its_backend():
    own = [make_row(method="standard"), make_row()]
    others = [make_row(method="standard", backend=x, run="other") for x in ("flex", "fa4")]
    found = _with_rivals(own, [*others, make_row(backend="fa4", run="other")])
    assert found == [*own, others[1]]


def test_targets_are_by_the_fastest_backend_of_each_clock():
    rows = []
    for heads, n in TARGETS:
        size = {"q_heads": heads, "seq_len": n, "causal": True, "dtype": "bfloat16"}
        for method, backend, device, host in (
            ("standard", "fa4", 400, 900), ("standard", "flex", 500, 800),
            ("spattention", "varlen", 100, 1800), ("spattention", "flex", 110, 100),
        ):  # fmt: skip
            for clock, us in (("device", device), ("host", host)):
                rows.append(
                    make_row(method=method, backend=backend, clock=clock, median_us=us,
                             samples_us=f"{us};{us}", rounds="0;1", **size)
                )  # fmt: skip
    device, host, *rest = targets(rows).splitlines()[2:]
    assert device == (
        "| H = 8, N = 4096 | device | 400 us, fa4 | 100 us, varlen | 4.00x (4.00 to 4.00) | 4.2x |"
    )
    assert host == (
        "| H = 8, N = 4096 | host | 800 us, flex | 100 us, flex | 8.00x (8.00 to 8.00) |  |"
    )
    assert [line.split(" | ")[-1] for line in rest[::2]] == ["5.8x |", "13x |"]


def test_a_profile_has_a_column_a_call_and_the_longest_kernel_first():
    spent = {1024: {"short": 10.0, "k" * 99: 70.0, "tiny": 1.0, BETWEEN: 19.0},
             2048: {"short": 150.0, "other": 48.0, BETWEEN: 2.0}}  # fmt: skip
    lines = [
        Line(
            seq_len=n, q_block=128, kv_block=128, device_name="chip", torch="2", code="abc",
            method="standard", params=None, backend="flex", phase="fwd", clock="device",
            kernel=kernel, launches=1.0, us=us, call_us=sum(parts.values()),
        )
        for n, parts in spent.items()
        for kernel, us in parts.items()
    ]  # fmt: skip
    assert profiles(lines).splitlines() == [
        "| kernel | N = 1024, fwd: 100 us | N = 2048, fwd: 200 us |",
        "| --- | ---: | ---: |",
        "| short | 10 us, 10% | 150 us, 75% |",
        f"| {'k' * WIDTH}... | 70 us, 70% | - |",
        "| other | - | 48 us, 24% |",
        "| others | 1 us, 1% | - |",
        f"| {BETWEEN} | 19 us, 19% | 2 us, 1% |",
    ]
    narrow = [replace(line, q_block=64, kv_block=64, method="bigbird") for line in lines[:4]]
    assert profiles([*lines[4:], *narrow]).splitlines()[0] == (
        "| kernel | `standard`, N = 2048, blocks of 128, fwd: 200 us "
        "| `bigbird`, N = 1024, blocks of 64, fwd: 100 us |"
    )
