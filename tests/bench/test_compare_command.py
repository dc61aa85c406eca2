"""compare on the command line: exit status, refusals, and what each side must have."""

import pytest

import run_bench
from tests.bench.comparing import printed, timed
from tests.bench.rows import make_row


@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables_fit_the_width(write, width):
    rows = [
        timed(method=m, backend=b, phase=p)
        for m in ("standard", "spattention_released")
        for b in ("flex", "sdpa-efficient")
        for p in ("fwd", "bwd", "fwd_bwd")
    ]
    a, b = write("a", *rows), write("b", *rows)
    _, text = printed(a, b, None, None, width=width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert ("A us" in text) == (width == 160)
    assert ("tokens/s" in text) == (width >= 100)
    table = [line for line in lines if line.startswith(("spattention", "standard"))]
    assert len(table) == 12 and all("same" in line for line in table)  # none is wrapped


def test_text_of_a_file_is_no_markup(write):
    odd = timed(method="[red]x[/]", params="[bold]", device="[/]")
    _, text = printed(write("a.csv", odd), write("b.csv", odd, timed(params="[/x]")), None, None)
    assert "[red]x[/]" in text and "environment: the same, [/]" in text
    assert "spattention:[/x] on flex" in text


def test_exit_status(write, capsys):
    a, slow, noisy = (
        str(write(name, row))
        for name, row in (
            ("a", timed()), ("slow", timed(105.0)), ("noisy", timed(105.0, noise=0.2, seed=3))
        )
    )  # fmt: skip
    assert run_bench.main(["compare", a, slow]) == 0
    assert run_bench.main(["compare", a, slow, "--fail-slower", "6"]) == 0
    assert "slower by more" not in capsys.readouterr().out
    assert run_bench.main(["compare", a, slow, "--fail-slower", "4"]) == 1
    line = "slower by more than 4 %: spattention on flex (fwd+bwd by device): N 4096"
    assert line in capsys.readouterr().out
    assert run_bench.main(["compare", slow, a, "--fail-slower", "4"]) == 0
    assert run_bench.main(["compare", a, noisy, "--fail-slower", "4"]) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{a}"], "two files, or one file with both --method and --against"),
        (["{a}", "--method", "standard"], "two files, or one file with both"),
        (["{a}", "{a}", "--method", "standard", "--against", "standard"], "two files, or one"),
        (["{a}", "missing.csv"], "missing.csv"),
        (["{a}", "{text}"], "not a results file"),
        (["{a}", "{empty}"], "nothing matches"),
        (["{a}", "{damaged}"], "line 2: damaged (a time is no positive number)"),
        (["{a}", "{a}", "--fail-slower", "-1"], "--fail-slower is -1.0; a percentage of 0"),
        (["{a}", "{a}", "--fail-slower", "nan"], "--fail-slower is nan; a percentage of 0"),
        (["{a}", "--method", "reformer", "--against", "spattention"],
         "has no method 'reformer'; allowed: spattention | longformer:a=1 | longformer:a=2"),
        (["{a}", "--method", "longformer", "--against", "spattention"],
         "has several methods 'longformer'; allowed: longformer:a=1 | longformer:a=2"),
        (["{a}", "--method", "longformer:a=2", "--against", "spattention"], "nothing matches"),
    ],
)  # fmt: skip
def test_wrong_requests_are_one_line(write, tmp_path, capsys, arguments, complaint):
    others = [timed(method="longformer", params=f"a={k}", backend="flash") for k in (1, 2)]
    files = {
        "a": write("a.csv", timed(), *others),
        "empty": write("empty.csv"),
        "damaged": write("damaged.csv", make_row(samples_us="-1;1", median_us=1.0)),
        "text": tmp_path / "text.csv",
    }
    files["text"].write_text("a,b\n1,2\n")
    assert run_bench.main(["compare", *(word.format(**files) for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert complaint in captured.err


def test_what_b_lost_fails_where_slower_would(write, capsys):
    a, b = write("a.csv", timed(), timed(backend="flash")), write("b.csv", timed())
    for flags, status in (([], 0), (["--fail-slower", "5"], 1)):
        assert run_bench.main(["compare", str(a), str(b), *flags]) == status
    crashed = write("c.csv", timed(), timed(backend="flash", status="crash"))
    assert run_bench.main(["compare", str(a), str(crashed), "--fail-slower", "5"]) == 1
    capsys.readouterr()
    assert run_bench.main(["compare", str(a), str(b), "--fail-slower", "5"]) == 1
    assert "no time of it in B, which fails: spattention on flash" in capsys.readouterr().out
    assert run_bench.main(["compare", str(b), str(a), "--fail-slower", "5"]) == 0


def test_a_method_need_not_run_where_another_does(write):
    path = str(write("a.csv", timed(), timed(backend="sdpa-flash"), timed(method="bigbird")))
    two = ["--method", "bigbird", "--against", "spattention", "--fail-slower", "5"]
    assert run_bench.main(["compare", path, *two]) == 0


def test_a_file_of_two_devices_is_refused(write, capsys):
    a, b = write("a.csv", timed()), write("b.csv", timed(), timed(device="Chip Y"))
    assert run_bench.main(["compare", str(a), str(b)]) == 2
    assert "has cells of Chip X and Chip Y; compare files of one" in capsys.readouterr().err
