"""The README's tables of training, from rows with made-up figures."""

import re
from dataclasses import replace

import pytest

from bench.docstrings import Source
from bench.paper_speeds import EAGER, UNCOMPILED_MODEL
from bench.readme_aims import PROTOTYPE, aims, as_released
from bench.readme_steps import step_kernels
from bench.readme_training import latest, model_table, training, training_summary
from bench.tables import write_table
from bench.train_figures import draw_training
from bench.trainings import trainings
from tests.bench.rows import make_row
from tests.bench.training import table2_step as step

LATER = "sliding_window", "gapped_bands", "local_only", "longformer"
TWO, LONG = {"world_size": 2}, {"batch": 1, "seq_len": 4096}


def lines(markdown):
    """Name and backend (or name alone) of a line -> its cells by heading."""
    heads, _, *rest = (
        [x.strip() for x in line.strip("|").split("|")]
        for line in markdown.split("\n")
        if line.startswith("|")
    )
    assert all(len(line) == len(heads) for line in rest)
    found = {tuple(line[:2]): dict(zip(heads, line, strict=True)) for line in rest}
    assert len(found) == len(rest)
    return found


def tabled(rows, **options):
    return model_table(latest(trainings(rows)), rows, **options)


def test_training_is_over_the_fastest_dense_step_of_its_column():
    text = tabled([
        step(us=800.0, **TWO), step("spattention", us=200.0, **TWO),
        step(us=200.0, **LONG),
        step("spattention", us=None, status="oom", reason="[/full]", **LONG),
        step("mine", us=400.0, **LONG),
        step(us=400.0), step(backend="sdpa-cudnn"), step("identity", "identity", 50.0),
        step("spattention", us=80.0), step("longformer", us=125.0),
    ])  # fmt: skip
    found = lines(text)
    columns = ["N = 1024", "N = 4096", "N = 1024, 2 processes", "N = 1024, 2 processes: scaling"]
    cells = {name: [line[head] for head in columns] for name, line in found.items()}
    assert list(cells.items()) == [
        (
            ("`standard`", "flex"),
            ["10.2 M (0.25x)", "20.5 M (1.00x)", "10.2 M (1.00x)", "50%, 49% to 51%"],
        ),
        (("`standard`", "sdpa-cudnn"), ["41.0 M (1.00x)", "-", "-", "-"]),
        (
            ("`spattention`", "flex"),
            ["51.2 M (1.25x)", "oom", "41.0 M (4.00x)", "40%, 39% to 41%"],
        ),
        (("`longformer`", "flex"), ["32.8 M (0.80x)", "-", "-", "-"]),
        (("`mine`", "flex"), ["-", "10.2 M (0.50x)", "-", "-"]),
        (("`identity`", "identity"), ["81.9 M (2.00x)", "-", "-", "-"]),
    ]
    assert list(found["`standard`", "flex"])[2:] == columns
    assert text.endswith(
        "Scaling: tokens/s over those of one process, of the same code, times processes, "
        "likewise. "
        "table2 · 4096 tokens a step · bfloat16 · Chip X; "
        "table2 · 8192 tokens a step · 2 processes · bfloat16 · Chip X. "
        "Without a figure: `spattention` on flex, N = 4096 (oom: [/full])."
    )


def test_a_speed_up_that_may_be_none_has_its_interval():
    def spread(us, share):
        return {"us": us, "samples_us": ";".join(f"{us * (1 + share * k):.6g}"
                                                 for k in range(-6, 7))}  # fmt: skip

    rows = [
        step(**spread(100.0, 0.001)), step(backend="fa4", **spread(101.0, 0.002)),
        step("spattention", **spread(50.0, 0.001)), step("longformer", **spread(50.0, 0.02)),
    ]  # fmt: skip
    found = [line["N = 1024"] for line in lines(tabled(rows)).values()]
    assert found[0] == "41.0 M (1.00x)" and found[2] == "81.9 M (2.00x)"
    assert re.fullmatch(r"40\.6 M \(0\.99x, 0\.9\d to 1\.00\)", found[1])
    assert re.fullmatch(r"81\.9 M \(2\.00x, 1\.\d\d to 2\.\d\d\)", found[3])
    for text in (tabled(rows), training_summary(rows)):
        assert "with its 99 % interval where that is wider than 4% or holds 1" in text


def test_two_processes_without_one_have_no_column_of_scaling():
    text = tabled([step(us=800.0, **TWO)])
    assert "caling" not in text and "10.2 M (1.00x)" in text


def test_a_training_without_a_dense_step_has_rates_alone_and_memory_where_it_is_asked_for():
    rows = [step("spattention", peak_bytes=3 << 29)]
    name = "`spattention`", "flex"
    assert lines(tabled(rows))[name]["N = 1024"] == "41.0 M"
    assert lines(tabled(rows, memory=True))[name]["N = 1024"] == "41.0 M, 1.5 GiB"


def test_trainings_that_a_column_cannot_tell_apart_are_refused():
    with pytest.raises(ValueError, match="two trainings have one column: N = 1024; N = 1024"):
        tabled([step(), step(dtype="float32")])


def test_columns_of_one_length_name_their_tokens():
    (line,) = lines(tabled([step(), step(us=50.0, batch=8), step(**LONG)])).values()
    assert list(line)[2:] == ["N = 1024, 4096 tokens", "N = 1024, 8192 tokens", "N = 4096"]


def test_a_step_above_amdahls_figure_is_said_with_what_else_is_shorter():
    def rows(us, other_us):
        samples = ";".join(f"{us * (1 + k / 1e4):.6g}" for k in range(-6, 7))
        return [
            *with_call(100_000.0, 60.0, attention_us=60_000.0, other_us=40_000.0, **LONG,
                       samples_us=";".join(str(1e5 + k) for k in range(-6, 7))),
            *with_call(us, 30.0, method="spattention", other_us=other_us,
                       attention_us=other_us and 30_000.0, samples_us=samples, **LONG),
        ]  # fmt: skip

    text = tabled(rows(60_000.0, 30_000.0))
    assert lines(text)["`spattention`", "flex"]["N = 4096"] == "68.3 k (1.67x; 1.43x)"
    assert "as does `spattention` on flex, N = 4096 (30.0 ms, not 40.0)." in text
    assert "as does `spattention` on flex, N = 4096." in tabled(rows(60_000.0, None))
    assert "can lie above" not in tabled(rows(70_000.0, 40_000.0))


def test_a_step_that_its_parts_miss_is_said_under_the_table():
    row = step("spattention", "varlen", attention_us=40.0, other_us=50.0)
    assert tabled([step(), row]).endswith(
        " 1 of 1 steps that CUPTI split into attention and the rest took more than 3% more or "
        "less time than unobserved: -10.0% `spattention` on varlen, N = 1024."
    )
    more = [step(name, attention_us=40.0, other_us=61.0 + k) for k, name in enumerate(LATER, 3)]
    assert tabled([step(), row, *more]).endswith(
        "unobserved: -10.0% `spattention` on varlen, N = 1024; +7.0% `longformer` on flex, "
        "N = 1024; +6.0% `local_only` on flex, N = 1024; and 2 more by less."
    )
    assert "unobserved" not in tabled([step(), replace(row, other_us=58.0)])
    assert training_summary([step(us=200.0), row]).endswith(
        "unobserved: -10.0% `spattention` on varlen, N = 1024."
    )


def test_of_two_recipes_the_last_measured_counts():
    later = {"time_utc": "2026-02-01T00:00:00Z"}
    rows = [step(us=50.0, recipe="steps=30", **later), step(recipe="steps=9")]
    assert "81.9 M" in tabled(rows) and "41.0 M" not in tabled(rows)


def page(rows, folder):
    (folder / "plots" / "h200").mkdir(parents=True, exist_ok=True)
    (folder / "results").mkdir(exist_ok=True)
    return training(rows, folder / "results", folder / "plots" / "h200")


def test_every_model_has_its_table_and_the_papers_comes_first(tmp_path):
    olmoe = {"model": "olmoe-1b-7b recomputing", "peak_bytes": 60 << 30}
    text = page([step(**olmoe), step("spattention", us=50.0, **olmoe), step()], tmp_path)
    first, second = text.split("#### `olmoe-1b-7b recomputing`")
    assert "| `standard` | flex | 41.0 M (1.00x) |" in first and "olmoe" not in first
    assert "| `spattention` | flex | 81.9 M (2.00x), 60.0 GiB |" in second
    assert "####" not in page([step()], tmp_path) and "![" not in text


def test_pictures_stand_there_once_they_are_drawn(tmp_path):
    rows = [step(**size) for size in ({}, LONG)]
    draw_training(rows, tmp_path / "plots" / "h200" / "test")
    (link,) = re.findall(r"!\[.*\]\((.*)\)", page(rows, tmp_path))
    assert link == "h200/test/training_speedup_table2_1_4096.png"
    assert (tmp_path / "plots" / link).exists()


def test_the_papers_setting_is_beside_its_rates(tmp_path):
    released = {"model": "table2 uncompiled"}
    text = page([
        step(backend="eager", us=400.0, **released), step(us=200.0, **released),
        step("spattention_released", "eager", us=800.0, **released),
        step("spattention_released", us=100.0, attention_us=60.0, other_us=71.5, **released),
        step("identity", "identity", us=50.0, **released), step(us=80.0),
        step("spattention", us=64.0), step("sliding_window", us=64.0),
        step(us=1.0, batch=32), step("spattention", us=1.0, batch=32),
    ], tmp_path)  # fmt: skip
    _, text = text.split("#### The paper's setting")
    table = lines(text)
    heads = ["`eager`", "`flex`", "`flex`, the model compiled", "the paper, 4 x A100"]
    cells = {name: [line[head] for head in heads] for (name, _), line in table.items()}
    assert cells == {
        "`standard`": ["10.2 M (1.00x)", "20.5 M (1.00x)", "51.2 M (1.00x)", "3214 (1.00x)"],
        "`spattention`": ["-", "-", "64.0 M (1.25x)", "6167 (1.92x)"],
        "`spattention_released`": ["5.12 M (0.50x)", "41.0 M (2.00x)", "-", "6167 (1.92x)"],
        "`identity`": ["81.9 M (8.00x)", "81.9 M (4.00x)", "-", "-"],
    }
    caption, aimed = text.split("\n\n")[-2:]
    assert "table2 uncompiled" in caption and aimed.startswith("Aimed at, as above, were 39.8 k")
    assert caption.endswith(
        "unobserved: +31.5% `spattention_released` on flex, N = 1024, table2 uncompiled."
    )
    assert "paper" not in page([step()], tmp_path)
    alone = [step(backend="eager", us=400.0, **released), step(us=70.0, batch=32)]
    _, text = page(alone, tmp_path).split("#### The paper's setting")
    assert lines(text)["`standard`", "10.2 M (1.00x)"]["`flex`, the model compiled"].startswith(
        "468 M"
    )


def test_a_summary_has_each_method_on_its_fastest_backend(tmp_path):
    rows = [
        step(us=100.0), step(backend="fa4", us=80.0), step("spattention", us=64.0),
        step("spattention", "varlen", us=40.0), step("identity", "identity", us=32.0),
        step(us=300.0, **LONG), step("spattention", us=1.0, world_size=2),
        step("spattention", us=1.0, data="book.txt@0"),
    ]  # fmt: skip
    table, caption = training_summary(rows).split("\n\n")
    assert table.splitlines()[2:] == [
        "| `standard` | 51.2 M (1.00x), fa4 | 13.7 M (1.00x), flex |",
        "| `spattention` | 102 M (2.00x), varlen | - |",
        "| `identity` | 128 M (2.50x) | - |",
    ]
    assert "2 processes" not in caption


def test_what_was_aimed_at_as_released_is_said_with_what_was_reached():
    size = {"model": UNCOMPILED_MODEL, "backend": EAGER, "batch": 4, "seq_len": 1024}
    loose = {"ci_low_us": 300_000.0, "ci_high_us": 500_000.0}
    rows = [step(us=100_000.0, **size), step("spattention_released", us=390_000.0, **size)]
    (found,) = trainings(rows)
    assert as_released(found) == (
        "Aimed at, as above, were 39.8 k with `standard` on `eager` (102%: reached) and 13.0 k "
        "with `spattention_released` on `eager` (80%: missed)."
    )
    (found,) = trainings([replace(rows[1], **loose)])
    assert "(80%: neither reached nor missed for certain)" in as_released(found)
    (found,) = trainings([step(**size | {"backend": "flex"})])
    assert as_released(found) is None


def test_where_steps_spend_their_time():
    """Products' rate is that of the model without attention; nothing is told of other steps."""
    kernels = "20000 product a;6000 attention b;3000 product c;2000 generated d;500 other e"
    seen = {"attention_us": 6000.0, "other_us": 26000.0, "matmul_tflop_s": 800.0}
    rows = [
        step(us=31000.0, sm_mhz=900, step_kernels=kernels, model_flops=9e12, **seen),
        step("spattention", us=30000.0),
        step("identity", "identity", 25000.0, model_flops=9.2e12, **seen,
             step_kernels="28750 product a;1e3 generated d;1 other e"),
    ]  # fmt: skip
    table, caption = step_kernels(rows).split("\n\n")
    assert table.splitlines()[2:] == [
        "| 1024 | `standard` | flex | 32.0 | 6.0 | 23.0 | 50% | 2.0 | 0.0 | 0.5 | 0.5 | 900 MHz |",
        "| 1024 | `identity` | identity | 32.0 | 0.0 | 28.8 | 40% | 1.0 | 0.0 | 0.0 | 2.2 | - |",
    ]
    assert "by the same process, 800 TFLOP/s at most" in caption
    assert "table2" in caption and "4096 tokens a step" in caption
    with pytest.raises(ValueError, match="no row has kernels of a step"):
        step_kernels([step()])


def test_what_was_aimed_at_is_said_with_what_was_reached():
    size = {"batch": 32, "seq_len": 1024}
    long = {"batch": 1, "seq_len": 32768}
    rows = [
        step(backend="sdpa-cudnn", us=62000.0, **size), step(us=70000.0, **size),
        step("spattention", us=62500.0, **size), step("spattention", "varlen", 60000.0, **size),
        *with_call(200_000.0, 60.0, attention_us=120_000.0, other_us=80_000.0, **long),
        *with_call(100_000.0, 10.0, method="spattention", **long),
    ]  # fmt: skip
    table, said, text = aims(trainings(rows))
    _, *found = table.splitlines()[1:]
    assert found[:4] == [
        "| `standard` | 1024 | 526 k, sdpa | "
        + " | ".join(2 * ["529 k, sdpa-cudnn (100%)"])
        + " |",
        "| `standard` | 1024 | 505 k, flex | 468 k, flex (92%) | 529 k, sdpa-cudnn (104%) |",
        "| `spattention` | 1024 | 554 k, flex | 524 k, flex (94%) | 546 k, varlen (98%) |",
        "| `spattention_released` | 1024 | 523 k, flex | - | - |",
    ]
    assert len(found) == sum(n in (1024, 32768) for *_, n in PROTOTYPE) and "prototype" in said
    missed = "`spattention` at N = 1024, `standard` at N = 32768, `spattention` at N = 32768"
    assert said.endswith(f"Missed on every backend: {missed}.")
    loose = {"samples_us": ";".join(f"{x}000" for x in range(55, 68)), **size}
    _, said, _ = aims(trainings([*rows, step("spattention", "flash", 59_500.0, **loose)]))
    unsure = re.search("Neither reached nor missed for certain on any backend: (.*?)[.]", said)[1]
    assert "`spattention` at N = 1024" in unsure and "`spattention` at N = 32768" not in unsure
    assert text == (
        "At N = 32768 a step with `spattention` (flex) is 2.00 times as fast as the fastest dense "
        "one; the aim, 2.2, is missed. The step is 1.00 times as fast as the speed-up of its "
        "attention call allows by Amdahl's law; the aim, 0.95, is reached."
    )
    assert list(aims(trainings([step(us=1.0, **TWO), step(**LONG)]))) == []
    slowed = [replace(row, other_us=100_000.0) if row.other_us else row for row in rows]
    *_, text = aims(trainings(slowed))
    assert text.endswith(
        "By Amdahl's law it has no figure: CUPTI made the dense step 10.0% longer."
    )


def test_the_law_is_held_beside_what_a_sweep_found_of_the_same_calls():
    long = {"batch": 1, "seq_len": 32768}
    split = {"attention_us": 120_000.0, "other_us": 80_000.0}
    rows = [*with_call(200_000.0, 60.0, **split, **long),
            *with_call(100_000.0, 10.0, method="spattention", **long)]  # fmt: skip
    swept = [replace(rows[0], median_us=60.0), replace(rows[2], median_us=20.0)]
    swept = [replace(row, phase="fwd_bwd", clock="device", status="ok") for row in swept]
    *_, text = aims(trainings(rows), swept)
    assert text.endswith(
        " is reached. Its call is 6.00 times as fast as the dense one where the steps were timed, "
        "3.00 in a sweep: by that, the law allows 1.67, not 2.00."
    )
    for other in (swept[:1], [replace(row, seq_len=1024) for row in swept]):
        *_, text = aims(trainings(rows), other)
        assert text.endswith(" is reached.")


def test_where_another_backend_leaves_less_to_the_rest_of_a_step_it_is_said():
    long = {"batch": 1, "seq_len": 32768}
    dense = step(us=150_000.0, **long)
    steps = [
        step("spattention", backend, us, attention_us=us - rest, other_us=rest, **long)
        for backend, us, rest in (("varlen", 74_000.0, 59_000.0), ("flex", 80_000.0, 55_000.0))
    ]
    told = " All but attention takes 59.0 ms of it, and 55.0 of a step on flex."
    assert told in list(aims(trainings([dense, *steps])))[-1]
    alike = replace(steps[1], other_us=58_000.0)
    assert "All but attention" not in list(aims(trainings([dense, steps[0], alike])))[-1]


@pytest.mark.parametrize(
    ("us", "verdict"),
    [
        (120_000.0, "missed"), (92_000.0, "neither reached nor missed for certain"),
        (70_000.0, "reached"),
    ],
)  # fmt: skip
def test_an_aim_is_judged_by_the_interval(us, verdict):
    def samples(median):
        return ";".join(f"{median * (1 + k / 100):.6g}" for k in range(-6, 7))

    long = {"batch": 1, "seq_len": 32768}
    rows = [step(us=200_000.0, samples_us=samples(200_000.0), **long),
            step("spattention", us=us, samples_us=samples(us), **long)]  # fmt: skip
    *_, text = aims(trainings(rows))
    low, high = re.search(r"dense one \((.*) to (.*)\); the aim, 2.2, is", text).groups()
    assert float(low) < 200_000 / us < float(high)
    assert f"the aim, 2.2, is {verdict}." in text


def with_call(us, call_us, method="standard", **changes):
    """A step after the row of its attention call."""
    shape = {name: changes[name] for name in ("batch", "seq_len")}
    return make_row(method=method, median_us=call_us, **shape), step(method, us=us, **changes)


def learned(method, losses, **changes):
    samples = ";".join("100" for _ in losses)
    told = {"data": "docstrings.txt@0badcafe", "samples_us": samples}
    return step(method, losses=";".join(map(str, losses)), **told | changes)


def test_losses_on_a_text_are_judged_and_its_words_have_owners(tmp_path):
    rows = [
        learned("standard", [5 - 0.1 * k for k in range(30)], attention_us=40.0, other_us=65.0),
        learned("spattention", [5 + 0.1 * (k % 2) for k in range(30)]),
        step("longformer", us=None, status="mismatch", reason="the loss of step 7 is no number",
             losses=None, data="docstrings.txt@0badcafe"),
        learned("identity", [5 - 0.1 * k for k in range(30)]),
    ]  # fmt: skip
    rows[-1] = replace(rows[-1], backend="identity")
    with pytest.raises(ValueError, match=r"not say what docstrings\.txt@0badcafe is"):
        page(rows, tmp_path)
    book = [replace(row, data="book.txt@0badcafe") for row in rows]
    heading, table, told = page(book, tmp_path).split("\n\n")
    assert heading == "#### A text"
    assert table.splitlines()[2:] == [
        "| `standard` | flex | 4.900 | 2.200 | 5.000 | yes |",
        "| `spattention` | flex | 5.033 | 5.067 | 5.100 | **no** |",
        "| `longformer` | flex | - | - | - | mismatch: the loss of step 7 is no number |",
    ]
    assert "the first and the last 3 steps" in told and "packages" not in told
    amiss = "unobserved: +5.0% `standard` on flex, N = 1024."
    assert told.endswith(amiss)
    source = Source(text="docstrings.txt@0badcafe", package="torch", version="9", licence="BSD-3",
                    characters=1)  # fmt: skip
    path = tmp_path / "results" / "docstrings.sources.csv"
    write_table(path, [source, replace(source, package="numpy")], Source)
    assert "docstrings of torch 9 (BSD-3), numpy 9 (BSD-3). 1 of 1 steps" in page(rows, tmp_path)
    draw_training(rows, tmp_path / "plots" / "h200" / "test")
    (link,) = re.findall(r"!\[.*\]\((.*)\)", page(rows, tmp_path))
    assert (tmp_path / "plots" / link).exists()
    assert "training_loss_table2_1_4096_docstrings_1024" in link
