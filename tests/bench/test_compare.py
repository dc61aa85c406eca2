import math

import numpy as np
import pytest

import run_bench
from bench.chip import SHARED_CORES
from bench.compare import could_show, verdict
from bench.stats import Ratio, ratio_interval
from tests.bench.comparing import printed, timed, words
from tests.bench.rows import make_row
from tests.bench.test_stats import ar1


@pytest.fixture
def verdict_of(write):
    def told(b, a=None):
        _, text = printed(write("a.csv", a or timed()), write("b.csv", b), None, None)
        line = words(text, "spattention", "flex")
        return next(word for word in line if word in ("faster", "slower", "same", "unclear"))

    return told


def test_verdicts(verdict_of):
    assert verdict_of(timed()) == "same"
    assert verdict_of(timed(seed=2)) == "same"
    assert verdict_of(timed(103.0, seed=2)) == "slower"
    assert verdict_of(timed(97.0, seed=2)) == "faster"
    assert verdict_of(timed(100.5, seed=2)) == "same"
    assert verdict_of(timed(103.0, noise=0.1, seed=2)) == "unclear"
    assert verdict_of(timed(101.0, noise=0.003, seed=2)) == "unclear"


STEP = {"phase": "step", "attention_us": 25.0, "other_us": 77.0}


@pytest.mark.parametrize(
    ("us", "changes", "expected"),
    [
        (100.0, {}, "unclear"), (240.0, {}, "unclear"), (42.0, {}, "unclear"),
        (260.0, {}, "slower"), (39.0, {}, "faster"),
        (103.0, STEP, "slower"),
        (103.0, {"phase": "step", "attention_us": 25.0, "other_us": 95.0}, "unclear"),
        (103.0, {"phase": "step", "world_size": 2}, "unclear"),
    ],
)  # fmt: skip
def test_two_files_by_the_host_clock_need_a_large_factor(write, us, changes, expected):
    """But for a GPU's training steps that wait for no launch, which CUPTI would make longer."""
    changes = {"clock": "host", "cuda": "13.0"} | changes
    a, b = (write(f"{name}.csv", timed(x, **changes)) for name, x in (("a", 100.0), ("b", us)))
    status, text = printed(a, b, None, None, fail_slower=150)
    assert words(text, "spattention", "flex")[-3] == expected
    assert status == (expected == "slower" and us > 250)
    large = expected != "slower" or us > 250
    assert ("take a factor of 2.5 by the host clock" in " ".join(text.split())) == large
    if not large:
        assert printed(a, b, None, None, fail_slower=2)[0] == 1
        return
    with pytest.raises(ValueError, match=r"--fail-slower is 149; .* tell 150 at least"):
        printed(a, b, None, None, fail_slower=149)


def test_two_files_need_more_at_the_power_cap(write):
    """But two methods whose samples are of the same rounds do not."""
    capped = {"throttled": "power cap 20/30", "cuda": "13.0"}
    a = write("a.csv", timed(**capped), timed(110.0, method="bigbird", **capped))
    for us, expected in ((110.0, "unclear"), (130.0, "slower")):
        _, text = printed(a, write(f"{us}.csv", timed(us)), None, None)
        assert words(text, "spattention", "flex")[-3] == expected
        assert "1.15 at the chip's power cap" in " ".join(text.split())
    _, text = printed(a, None, "bigbird", "spattention")
    assert words(text, "flex")[-3] == "slower" and "power cap" not in text
    # Steps of two methods are of one run, one after the other; of one method, of two.
    steps = capped | STEP | {"clock": "host"}
    c = write("c.csv", timed(100.0, **steps), timed(103.0, method="bigbird", **steps))
    assert words(printed(c, None, "bigbird", "spattention")[1], "flex")[-3] == "slower"
    d = write("d.csv", timed(103.0, **steps))
    assert words(printed(c, d, None, None)[1], "spattention", "flex")[-3] == "unclear"


def test_what_was_sampled_beside_other_work_tells_nothing_of_two_runs(write):
    busy = {"throttled": f"{SHARED_CORES} 9/30"}
    host = {"clock": "host", "cuda": None}
    a, b = (write(f"{x}.csv", timed(**host), timed(us, method="bigbird", **busy, **host))
            for x, us in (("a", 100.0), ("b", 900.0)))  # fmt: skip
    _, text = printed(a, b, None, None)
    assert "unclear" in words(text, "bigbird", "flex")
    assert "warning: 1 of the cells were sampled while others were at work" in text
    only = write("c.csv", timed(900.0, method="bigbird", **busy, **host))
    with pytest.raises(ValueError, match="tell nothing: others were at work"):
        printed(a, only, None, None, fail_slower=5)
    # Samples of the same rounds had the same neighbours.
    d = write("d.csv", timed(**host), timed(900.0, method="bigbird", **busy, **host))
    _, text = printed(d, None, "bigbird", "spattention")
    assert words(text, "flex")[-3] == "slower" and "warning" not in text
    # One sound cell beside it does not make it sound, and a look or two of thirty are nothing.
    assert printed(a, b, None, None, fail_slower=900)[0] == 1
    few = busy | {"throttled": f"{SHARED_CORES} 2/30"}
    c = write("e.csv", timed(**host), timed(900.0, method="bigbird", **few, **host))
    status, text = printed(write("f.csv", timed(**host), timed(method="bigbird", **host)), c, None,
                           None, fail_slower=150)  # fmt: skip
    assert status == 1 and words(text, "bigbird", "flex")[-3] == "slower"


def test_a_method_from_a_file_of_its_own_pairs_with_the_suites(write):
    own = timed(90.0, method="mine", code="1" * 12)
    _, text = printed(write("a.csv", timed(), own), None, "mine", "spattention")
    assert "environment: the same" in text and "Samples of one round are divided" in text
    assert words(text, "flex")[-3] == "faster"
    other = timed(90.0, method="mine", torch="3.0")
    _, text = printed(write("b.csv", timed(), other), None, "mine", "spattention")
    assert "environment: the same" in text  # of one run of one moment


def test_what_only_one_side_has_is_told_in_a_few_lines(write):
    sizes = [timed(q_heads=1 << n, kv_heads=1 << n, method=f"m{n}") for n in range(9)]
    _, text = printed(write("a.csv", timed(), *sizes), write("b.csv", timed()), None, None)
    assert text.count("only in A: ") == 7 and "only in A: 3 more lines of such cells" in text


def test_steps_of_another_text_or_recipe_are_other_cells(write):
    step = {"phase": "step", "clock": "host", "cuda": "13.0", "model": "m", "world_size": 2,
            "batch": 2, "seq_len": 512, "attention_us": 25.0, "other_us": 75.0}  # fmt: skip
    a = write("a.csv", timed(data="random", recipe="steps=3", **step))
    b = write("b.csv", timed(data="random", recipe="steps=3", **step),
              timed(130.0, data="text@1", recipe="steps=3", **step),
              timed(130.0, data="random", recipe="steps=9", **step))  # fmt: skip
    status, text = printed(a, b, None, None, fail_slower=5)
    assert status == 0 and "only in B" in text and "text@1" in text
    assert words(text, "spattention", "flex")[-3] == "same"
    assert "m in 2 processes · random · steps=3" in text
    assert "20.5 M" in text  # 2 x 2 x 512 in 100 us
    call = {"phase": "fwd_bwd", "model": "m", "world_size": 1}
    a, b = (write(f"{x}.csv", timed(recipe=f"steps={x}", **call)) for x in "cd")
    assert words(printed(a, b, None, None)[1], "spattention", "flex")[-3] == "same"


def test_few_samples_are_unclear_however_far_apart(verdict_of):
    assert verdict_of(timed(300.0, n=7)) == "unclear"
    assert verdict_of(timed(300.0, n=8)) == "slower"
    assert verdict_of(timed(300.0, n=1), timed(n=1)) == "unclear"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0101, 1.2, "faster"), (1.0099, 1.2, "unclear"), (0.8, 0.9900, "slower"),
        (0.8, 0.9902, "unclear"), (0.9902, 1.0099, "same"), (0.9900, 1.0099, "unclear"),
        (0.9902, 1.0101, "unclear"),
    ],
)  # fmt: skip
def test_where_the_limits_lie(low, high, expected):
    assert verdict(Ratio(math.sqrt(low * high), low, high, True, 30)) == expected


def test_what_the_data_could_have_shown_is_where_the_verdict_turns():
    half = 1.02  # an interval from ratio / 1.02 to ratio * 1.02
    smallest = could_show(Ratio(1.0, 1 / half, half, True, 30))
    assert smallest == pytest.approx(1.01 * 1.02 - 1)
    for factor, expected in ((1.0001, "faster"), (0.9999, "unclear")):
        ratio = (1 + smallest) * factor
        assert verdict(Ratio(ratio, ratio / half, ratio * half, True, 30)) == expected
    assert could_show(Ratio(1.0, 0.9, 1.1, False, 7)) is None


def verdicts(slower: float, phi: float, shared: float, paired: bool, seed: int, n: int = 200):
    """Of n comparisons under 1 % noise, of which a share of the variance is common to a round."""
    ours, theirs, common = ar1(3 * n, 30, phi, seed).reshape(3, n, 30)
    a, b = (
        factor * np.exp(0.01 * (math.sqrt(1 - shared) * own + math.sqrt(shared) * common))
        for factor, own in ((1.0, ours), (slower, theirs))
    )
    start = 0 if paired else 1000
    rounds = ((dict(enumerate(x)), dict(enumerate(y, start))) for x, y in zip(a, b, strict=True))
    return [verdict(ratio_interval(*both)) for both in rounds]


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("paired", [True, False])
def test_a_against_a_under_correlated_noise(phi, paired):
    found = verdicts(1.0, phi, 0.5 * paired, paired, seed=11)
    assert sum(word in ("faster", "slower") for word in found) <= 2
    assert "same" in found


@pytest.mark.parametrize(
    ("phi", "shared", "paired", "share"),
    [
        (0.3, 0.5, True, 0.95),  # interleaved: half of the noise befalls both sides of a round
        (0.0, 0.0, False, 0.95),
        (0.3, 0.0, False, 0.90),  # nothing cancels, and neighbours correlate: a few are missed
    ],
)
def test_three_percent_is_found(phi, shared, paired, share):
    found = verdicts(1.03, phi, shared, paired, seed=12)
    assert found.count("slower") >= share * len(found)
    assert set(found) <= {"slower", "unclear"}


def test_a_table_and_its_ratio(write):
    a = write("a.csv", timed(200.0, noise=0.0001), timed(50.0, noise=0.0001, phase="fwd"))
    b = write("b.csv", timed(100.0, noise=0.0001), timed(50.0, noise=0.0001, phase="fwd"))
    status, text = printed(a, b, None, None)
    assert status == 0
    assert text.startswith(f"A: {a}\nB: {b}\nenvironment: the same, Chip X\n\n")
    assert "N 4096 · batch 1 · 8 heads · head_dim 128 · bfloat16 · causal · blocks 128x128" in text
    whole = words(text, "spattention", "flex", "fwd+bwd")
    assert whole[3:10] == ["200.0", "100.0", "20.5", "M", "41.0", "M", "2.000"]
    assert whole[13:] == ["faster", "1.0", "%"]
    low, high = float(whole[10]), float(whole[12])
    assert 1.99 < low <= 2.0 <= high < 2.01
    forward = words(text, "spattention", "flex", "fwd")
    assert forward[3:8] == ["50.0", "50.0", "-", "-", "1.000"]
    assert "B against A, 2 compared: 1 faster, 0 slower, 1 same, 0 unclear\n" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 2}, {"q_heads": 16}, {"kv_heads": 4}, {"seq_len": 512}, {"head_dim": 64},
        {"dtype": "float32"}, {"causal": False}, {"q_block": 64}, {"kv_block": 64},
        {"method": "local_only"}, {"params": "window=4"}, {"backend": "flash"}, {"phase": "bwd"},
        {"clock": "host"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_rows_match_by_every_key(write, changes):
    a = write("a.csv", timed())
    with pytest.raises(ValueError, match="nothing matches"):
        printed(a, write("b.csv", timed(**changes)), None, None)
    _, text = printed(a, write("c.csv", timed(**changes), timed()), None, None)
    assert text.count("only in") == text.count("only in B") == 1
    assert "1 compared" in text


def test_the_last_of_two_rows_counts(write):
    a = write("a.csv", timed(), timed(50.0), timed(100.0))
    _, text = printed(a, write("b.csv", timed(900.0), timed(100.0)), None, None)
    assert "1 compared: 0 faster, 0 slower, 1 same" in text


def test_unmatched_rows_are_listed_by_cell(write):
    window = {"method": "sliding_window", "params": "window=4"}
    more = [timed(**window, phase=p, clock=c) for c in ("device", "host") for p in ("fwd", "bwd")]
    elsewhere = [timed(seq_len=n, phase=p) for n in (512, 1024) for p in ("fwd", "bwd")]
    _, text = printed(
        write("a.csv", timed(), *more), write("b.csv", timed(), *elsewhere), None, None
    )
    title = "batch 1 · 8 heads · head_dim 128 · bfloat16 · causal · blocks 128x128"
    text = " ".join(text.split())
    cell = "sliding_window:window=4 on flex (fwd, bwd by device; fwd, bwd by host)"
    assert f"only in A: {cell}: N 4096 · {title}" in text
    cell = f"spattention on flex (fwd, bwd by device): N 512 · {title}; N 1024 · {title}"
    assert f"only in B: {cell}" in text


def test_rows_without_a_time_are_listed_with_their_status(write):
    bare = make_row(median_us=1.0, phase="bwd")
    a = write("a.csv", timed(), timed(phase="fwd"), bare)
    b = write("b.csv", make_row(status="oom"), timed(phase="fwd"), timed(phase="bwd"))
    _, text = printed(a, b, None, None)
    assert "ok in A, oom in B: spattention on flex (fwd+bwd by device): N 4096" in text
    assert "no samples in A, ok in B: spattention on flex (bwd by device): N 4096" in text
    assert "1 compared" in text


def test_different_environments_are_one_line(write):
    there = {"device": "Chip Y", "driver": "580", "threads": 4, "code": "1" * 12}
    a = write("a.csv", timed(), timed(phase="fwd"), timed(phase="bwd", torch="1.0"))
    b = write("b.csv", timed(**there), timed(phase="fwd", **there))
    _, text = printed(a, b, None, None)
    assert text.splitlines()[2] == (
        "environments differ (A → B): code 000000000000 → 111111111111; device Chip X → Chip Y; "
        "driver None → 580; threads 2 → 4"
    )
    assert "2 compared" in text


def test_how_alike_two_runs_are(write, capsys):
    lengths = (1024, 2048, 4096, 8192)
    files = [
        write(name, *(make_row(seq_len=n, samples_us=f"{us};{us}", median_us=us)
                      for n, us in zip(lengths, times, strict=True)))
        for name, times in (("a.csv", (20.0, 60.0, 100.0, 200.0)),
                            ("b.csv", (30.0, 61.0, 101.9, 210.0)))
    ]  # fmt: skip
    run_bench.main(["compare", *map(str, files)])
    assert "device clock: 2 of 3 medians of 50 us and more within 2%" in capsys.readouterr().out


def test_rounds_of_one_file_pair_and_those_of_two_do_not(write):
    shared = np.exp(0.05 * ar1(1, 30, 0.3, seed=3)[0])
    fast, slow = (
        {"rounds": ";".join(map(str, range(30))), "median_us": float(np.median(us * shared)),
         "samples_us": ";".join(str(us * x) for x in shared)}
        for us in (100, 103)
    )  # fmt: skip
    both = write("both.csv", make_row(**fast, method="standard"), make_row(**slow))
    _, text = printed(both, None, "spattention", "standard")
    assert words(text, "flex", "fwd+bwd")[-3] == "slower"
    assert "Samples of one round are divided" in " ".join(text.split())
    assert "of each other" not in text
    a, b = write("a.csv", make_row(**fast)), write("b.csv", make_row(**slow))
    _, text = printed(a, b, None, None)
    assert words(text, "spattention", "flex")[-3] == "unclear"
    assert "two runs do not pair" in " ".join(text.split()) and "of each other" in text


def test_two_methods_of_one_file(write):
    window, wide = ({"method": "sliding_window", "params": f"window={n}"} for n in (4, 8))
    path = write(
        "a.csv", timed(), timed(backend="flash"), timed(50.0, **window), timed(90.0, **wide),
        timed(10.0, **wide, device="Chip Y"),
    )  # fmt: skip
    _, text = printed(path, None, "sliding_window:window=8", "spattention")
    assert text.startswith(f"A: spattention in {path}\nB: sliding_window:window=8 in {path}\n")
    assert words(text, "flex", "fwd+bwd")[1:4] == ["fwd+bwd", "100.0", "90.0"]
    assert "only in A: flash (fwd+bwd by device): N 4096" in text
    assert "only in B: flex" in text and "blocks 128x128 · Chip Y" in text
    _, text = printed(path, None, "spattention", "sliding_window:window=4")
    assert words(text, "flex", "fwd+bwd")[-3] == "slower"
