import math
import random
import re
import statistics
from dataclasses import replace

import pytest
from rich.console import Console

from bench.chip import SHARED_CORES
from bench.readme import update_marked
from bench.readme_speeds import headline_markdown
from bench.record import Store, read_rows
from bench.report import print_report, quantity, tables
from tests.bench.rows import make_row, sweep_rows

DENSE = {"method": "standard", "allowed_pairs": 800, "computed_pairs": 1000}
SPARSE = {"allowed_pairs": 100, "computed_pairs": 250}
PEAK = 3 << 30


def printed(rows, width: int = 160) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        print_report(list(rows), console)
    return capture.get()


def line_of(text: str, *words: str) -> list[str]:
    """Words of the one line that begins with these."""
    found = [line.split() for line in text.splitlines() if line.split()[: len(words)] == [*words]]
    assert len(found) == 1, text
    return found[0]


def test_figures_of_a_row():
    rows = [
        make_row(**DENSE, phase="fwd", median_us=100.0),
        make_row(**DENSE, phase="bwd", median_us=300.0),
        make_row(**DENSE, median_us=400.0, peak_bytes=PEAK),
        make_row(**SPARSE, phase="fwd", median_us=40.0, ci_low_us=39.9, ci_high_us=40.8),
        make_row(**SPARSE, phase="bwd", median_us=80.0),
        make_row(**SPARSE, median_us=125.0, peak_bytes=PEAK // 2048),
        make_row(method="standard", backend="sdpa", allowed_pairs=800, median_us=300.0),
    ]
    text = printed(rows)
    assert line_of(text, "spattention") == [
        "spattention", "flex", "40.0", "±2.0%", "80.0", "±1.0%", "125", "±1.0%", "32.8", "M",
        "3.20", "2.40", "8.00", "4.00", "0.80", "0.001", "1.5", "MiB",
    ]  # fmt: skip
    assert line_of(text, "standard", "sdpa") == [
        "standard", "sdpa", "-", "-", "300", "±1.0%", "13.7", "M", "1.00", "1.00", "1.00", "-",
        "1.00", "0.005", "-",
    ]  # fmt: skip
    assert "3.00 GiB" in text
    title = "N 4096 · batch 1 · 8 heads · head_dim 128 · bfloat16 · causal · blocks 128x128"
    assert text.startswith(title + "\ndevice clock · Chip X\n")


def test_share_of_the_chips_matmul_rate():
    us = 14 * 128 * 100 / 50.0 * 1e-6  # at 50 TFLOP/s
    text = printed([make_row(**SPARSE, median_us=us, matmul_tflop_s=800.0)], width=200)
    assert "% of" in text
    assert {"50.0", "6.2"} <= set(line_of(text, "spattention"))


def test_rates_of_a_cpu_are_not_rounded_away():
    rows = [make_row(**SPARSE, median_us=14 * 128 * 100 / 0.05 * 1e-6)]
    assert "0.050" in line_of(printed(rows, width=200), "spattention")


def test_what_disturbed_a_measurement_comes_with_a_remedy():
    quiet = printed([make_row(median_us=100.0)])
    assert "warning" not in quiet
    text = printed(
        [
            make_row(median_us=100.0, ci_high_us=120.0, discarded=3, throttled="thermal 3/9"),
            make_row(phase="fwd", median_us=100.0, throttled="power cap 2/9"),
            make_row(phase="bwd", median_us=100.0, throttled=f"{SHARED_CORES} 1/9"),
        ]
    )
    assert "1 rows were sampled while others were at work on the same cores" in text
    assert "3 samples were discarded" in text
    assert "let it cool" in text
    assert "1 medians are known to worse than 5%" in text
    assert "--seconds" in text
    assert "1 rows met the chip's power cap, which is normal" in text


def test_of_few_samples_and_of_several_runs_it_is_said_what_they_are_not():
    few = {"samples_us": "90;100;110", "rounds": "0;1;2", "time_utc": "2026-01-01T00:00:00Z"}
    rows = [make_row(**DENSE, median_us=100.0, **few), make_row(**SPARSE, median_us=100.0, **few)]
    text = printed(rows)
    assert "warning: 2 medians are of fewer than 8 samples" in text and "runs are in" not in text
    later = replace(rows[1], time_utc="2026-01-01T00:00:01Z")
    assert "warning: 2 runs are in this table" in printed([rows[0], later])
    single = [replace(row, samples_us="100", rounds="0") for row in rows]
    assert "warning: 2 medians are of fewer than 8 samples" in printed(single)
    alone = replace(later, rounds=None)
    assert "runs are in this table" not in printed([rows[0], alone])


def test_the_fastest_backend_of_each_method_is_named():
    rows = [
        make_row(method=method, backend=backend, median_us=us)
        for method, times in (("standard", (4.0, 3.0)), ("spattention", (1.0, 2.0)))
        for backend, us in zip(("flex", "fa4"), times, strict=True)
    ]
    alone = make_row(method="bigbird", backend="flex", median_us=9.0)
    text = printed([*rows, alone])
    assert "fastest fwd+bwd: spattention on flex; standard on fa4" in text.splitlines()
    assert "fastest fwd" not in printed([rows[0], alone])
    assert "fastest fwd" not in printed([*rows[:2], alone])  # of dense attention the table tells


def test_backends_that_samples_cannot_tell_apart_are_fastest_together():
    noise = random.Random(0)
    rows = []
    for backend, us in {"flex": 1.0, "fa4": 1.01, "varlen": 2.0}.items():
        samples = [us * noise.uniform(0.9, 1.1) for _ in range(31)]
        rows.append(
            make_row(method="spattention", backend=backend, median_us=statistics.median(samples),
                     samples_us=";".join(map(str, samples)))
        )  # fmt: skip
    assert "fastest fwd+bwd: spattention on flex or fa4" in printed(rows).splitlines()


@pytest.mark.parametrize(("spread", "warned"), [(0.001, True), (0.3, False)])
def test_an_efficiency_that_noise_can_explain_is_no_warning(spread, warned):
    def timed(us):
        samples = [us * (1 + spread * math.sin(k)) for k in range(16)]
        return {"median_us": us, "samples_us": ";".join(map(str, samples)),
                "rounds": None}  # fmt: skip

    rows = [make_row(**DENSE, **timed(400.0)), make_row(**SPARSE, **timed(90.0))]
    assert ("efficiency above 1 on flex" in printed(rows)) == warned


def test_a_legend_is_of_columns_that_there_are():
    rows = [make_row(**DENSE, median_us=400.0), make_row(**SPARSE, median_us=100.0)]
    assert "% of matmul" not in printed(rows)
    rows = [make_row(**DENSE, median_us=400.0, matmul_tflop_s=700.0)]
    assert "% of matmul: of the rate" in " ".join(printed(rows).split())


def test_forward_stands_in_and_says_so():
    rows = [
        make_row(**DENSE, phase="fwd", median_us=100.0),
        make_row(**SPARSE, phase="fwd", median_us=40.0),
        make_row(**SPARSE, status="unsupported", reason="no backward on a CPU"),
    ]
    text = printed(rows)
    assert line_of(text, "spattention")[4:8] == ["unsupported", "2.50f", "2.50f", "8.00"]
    assert line_of(text, "spattention")[9] == "0.62f"
    assert "f: of fwd, where fwd+bwd was not measured for both" in " ".join(text.split())


@pytest.mark.parametrize(
    "status", ["oom", "unsupported", "mismatch", "crash", "timeout"], ids=lambda s: s
)
def test_what_could_not_be_measured_says_why(status):
    rows = [
        make_row(**DENSE, median_us=400.0),
        make_row(**SPARSE, status=status, reason="because of this"),
    ]
    text = printed(rows)
    assert status in line_of(text, "spattention")
    assert f"{status}: spattention on flex (fwd+bwd): because of this" in text


def test_one_reason_is_given_once():
    cells = [("standard", p) for p in ("bwd", "fwd_bwd")] + [("spattention", "fwd_bwd")]
    rows = [make_row(method=m, phase=p, status="unsupported", reason="why") for m, p in cells]
    rows.append(make_row(backend="blockwise", median_us=4.0))
    text = printed(rows)
    assert text.count("why") == 1
    assert "unsupported: all methods on flex (bwd, fwd+bwd): why" in text


def test_nothing_is_printed_as_nan_or_none():
    rows = [
        make_row(method="standard", median_us=400.0, ci_low_us=None, ci_high_us=None),
        make_row(phase="fwd", status="crash"),
        make_row(method="mine", params="a=1", backend="other"),
    ]
    for width in (60, 100, 160):
        assert not re.search(r"\b(nan|none|inf)\b", printed(rows, width), re.IGNORECASE)
    assert "no reason recorded" in printed(rows)


@pytest.mark.parametrize("width", [100, 160])
def test_no_cell_is_cut_or_wrapped(width):
    rows = list(
        sweep_rows((4096,), backends=("flex", "sdpa-efficient"), clocks=("device", "host"))
    )
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for method in ("standard", "spattention_released"):
        found = [line for line in text.splitlines() if re.match(rf"{method} +(flex|sdpa)", line)]
        assert len(found) == 4
        assert all(len(re.findall(r" \d+\.?\d* ±1\.0% ", line)) >= 2 for line in found)
    assert ("peak" in text.split("─")[0]) == (width == 160)
    hidden = "not shown at this width: bwd us, ideal elements, ideal blocks, TFLOP/s, peak memory"
    assert (hidden in text) == (width == 100)


def test_a_very_narrow_terminal_keeps_the_figures_that_matter():
    text = printed(sweep_rows((4096,)), 72)
    assert max(map(len, text.splitlines())) <= 72
    assert "…" not in text
    assert len(re.findall(r"spattention +flex +23\.4 ±1\.0% +57\.0 ±1\.0%", text)) == 1


def test_one_unit_and_one_number_of_digits_a_column():
    rows = [make_row(median_us=12_345.6), make_row(method="standard", median_us=98_765.4)]
    text = printed(rows)
    assert line_of(text, "spattention")[2] == "12.3"
    assert line_of(text, "standard")[2] == "98.8"
    assert "ms" in text.split("─")[0]


def test_clocks_have_tables_of_their_own():
    rows = [
        make_row(**DENSE, median_us=400.0),
        make_row(**DENSE, clock="host", median_us=450.0),
        make_row(**SPARSE, clock="host", median_us=90.0),
        make_row(**SPARSE, median_us=50.0),
    ]
    device, host = (printed([*rows])[:-1].split("host clock"))[:2]
    assert "8.00" in line_of(device, "spattention")
    assert "5.00" in line_of(host, "spattention")
    assert "tokens/s" in device.split("─")[0]
    assert "tokens/s" not in host.split("─")[0]  # one clock gives them: the device's


def test_host_clock_gives_tokens_where_there_is_no_other_and_says_so():
    text = printed([make_row(clock="host", median_us=1000.0)])
    assert "host clock, tokens/s by the host clock" in text
    assert line_of(text, "spattention")[4:6] == ["4.10", "M"]


def test_efficiency_above_one_warns_with_a_remedy():
    rows = [make_row(**DENSE, median_us=400.0), make_row(**SPARSE, median_us=80.0)]
    text = " ".join(printed(rows).split())
    assert "warning: efficiency above 1 on flex" in text
    assert "spattention 1.25 (fwd+bwd)" in text
    assert "measure another dense backend too" in text
    rows.append(make_row(method="standard", backend="sdpa-cudnn", median_us=200.0))
    assert "compare with sdpa-cudnn" in " ".join(printed(rows).split())


def test_efficiency_of_one_does_not_warn():
    rows = [make_row(**DENSE, median_us=400.0), make_row(**SPARSE, median_us=99.8)]
    assert "warning" not in printed(rows)


def test_parameters_are_in_a_note_or_tell_variants_apart():
    wide = make_row(method="longformer", params="window=512,n_global=64", median_us=5.0)
    narrow = make_row(method="longformer", params="window=64,n_global=64", median_us=3.0)
    text = printed([wide])
    assert line_of(text, "longformer", "flex")
    assert "parameters: longformer window=512, n_global=64" in text
    text = printed([wide, narrow])
    assert "longformer:window=512,n_global=64 " in text
    assert "longformer:window=64,n_global=64 " in text
    assert "parameters" not in text


def test_tables_come_from_the_file_alone(tmp_path):
    rows = [*sweep_rows((4096,)), make_row(backend="eager", status="oom", reason="a, b; c")]
    with Store(tmp_path / "a.csv") as store:
        store.append(rows)
    assert printed(read_rows(tmp_path / "a.csv")) == printed(rows)


def test_no_rows_no_tables():
    assert printed([]).strip() == "No measurement to show."
    assert len(tables([make_row(median_us=1.0), make_row(seq_len=64, median_us=1.0)])) == 3


def test_nothing_to_show_has_its_reasons():
    row = make_row(phase="prepare", status="unsupported", reason="nothing follows", median_us=None)
    assert printed([row, replace(row, clock="host")]).strip().splitlines() == [
        "No measurement to show.",
        f"{row.method} on {row.backend}, prepare: unsupported: nothing follows",
    ]
    assert "measured; it is shown as a part of fwd" in printed([make_row(phase="prepare")])
    assert printed([make_row(phase="step", clock="host")]) == ""


def test_block_lists_are_a_table_of_all_lengths():
    layout = {"phase": "layout", "clock": "host"}
    rows = [
        make_row(method="bigbird", median_us=500.4, **layout),
        make_row(method="bigbird", seq_len=8192, median_us=900.0, **layout),
        make_row(method="longformer", seq_len=8192, status="oom", median_us=None, **layout),
        make_row(method="standard", seq_len=8192, median_us=7.0, **layout),
    ]
    text = printed(rows)
    assert "block lists, built once a problem, us by the host clock" in text
    assert line_of(text, "bigbird") == ["bigbird", "500", "±1.0%", "900", "±1.0%"]
    assert line_of(text, "standard")[:3] == ["standard", "-", "7"]
    assert "longformer" not in text and "No measurement" not in text
    many = [make_row(method="bigbird", seq_len=1 << n, **layout) for n in range(9, 16)]
    assert "±" not in printed(many, width=80) and line_of(printed(many, width=80), "bigbird")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (37_612_000, "37.6 M"), (512_400, "512 k"), (7.25, "7.25"), (1e9, "1.00 G"),
     (0.5, "0.500"), (999.6, "1000")],
)  # fmt: skip
def test_quantity(value, text):
    assert quantity(value) == text


def headline_rows():
    yield make_row(**DENSE, seq_len=1024, median_us=100.0)
    yield make_row(**SPARSE, seq_len=1024, median_us=50.0)
    yield make_row(**DENSE, status="oom", reason="full")
    yield make_row(**SPARSE, median_us=80.0)
    yield make_row(method="standard", backend="sdpa-cudnn", median_us=200.0)
    yield make_row(**SPARSE, clock="host", median_us=500.0)


def test_headline():
    assert headline_markdown(headline_rows(), backend="flex").splitlines() == [
        "| method | N = 1024 | N = 4096 |",
        "| --- | ---: | ---: |",
        "| `standard` | 10.2 M | oom |",
        "| `spattention` | 20.5 M (2.00x) | 51.2 M |",
        "| fastest dense | 10.2 M (flex) | 20.5 M (sdpa-cudnn) |",
        "",
        "Tokens/s, forward + backward, on `flex` by the device clock; in brackets the speed-up "
        "over `standard` on the same backend. Dense backends: flex, sdpa-cudnn. "
        "batch 1 · 8 heads · head_dim 128 · bfloat16 · causal · blocks 128x128 · Chip X "
        "· torch 2.13.0.",
    ]


def test_headline_names_what_another_run_measured():
    rows = [*headline_rows(), make_row(method="standard", backend="fa4", run="other")]
    assert "Dense backends: flex, sdpa-cudnn; of another run fa4." in headline_markdown(
        rows, backend="flex"
    )


def test_headline_of_a_chosen_clock():
    text = headline_markdown(headline_rows(), backend="flex", clock="host")
    assert "| `spattention` | 8.19 M |" in text
    assert "by the host clock" in text


def test_headline_wants_one_problem_a_length():
    rows = list(sweep_rows((1024, 2048), heads=(8, 16)))
    with pytest.raises(ValueError, match=r"differ in more than N: .*16 heads.*; .*8 heads"):
        headline_markdown(rows, backend="flex")
    text = headline_markdown(rows, backend="flex", q_heads=16)
    assert "16 heads" in text and "| method | N = 1024 | N = 2048 |" in text
    with pytest.raises(ValueError, match="no fwd_bwd row of backend 'sdpa'"):
        headline_markdown(rows, backend="sdpa")


def test_marked_text_is_replaced():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb <!-- begin y -->1<!-- end y -->\n"
    assert update_marked(text, "x", "\nnew\nlines\n") == text.replace("old", "new\nlines")
    assert update_marked(update_marked(text, "x", "1"), "x", "old") == text


@pytest.mark.parametrize(
    "text",
    ["", "<!-- begin x -->", "<!-- end x --><!-- begin x -->",
     "<!-- begin x --><!-- end x --><!-- begin x --><!-- end x -->"],
)  # fmt: skip
def test_missing_or_doubled_marks_are_refused(text):
    with pytest.raises(ValueError, match="begin x"):
        update_marked(text, "x", "new")
