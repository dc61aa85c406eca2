import dataclasses
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from bench import backend_figures, figures
from bench.derived import METHOD_ORDER, Cell
from bench.figures import draw_all
from bench.style import styles
from tests.bench.rows import make_row, sweep_rows


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws rows; gives the figures by file name, unsaved, and without those of masks."""

    def draw(rows) -> dict[str, Figure]:
        found = {}
        monkeypatch.setattr(figures, "draw_masks", lambda rows, folder: [])
        monkeypatch.setattr(figures, "save", lambda f, stem: [found.setdefault(stem.name, f)])
        draw_all(list(rows), tmp_path)
        return found

    return draw


def lines(figure: Figure, panel: int = 0) -> dict[str, dict[float, float]]:
    """Legend label -> {x: y} of a panel's lines."""
    return {
        line.get_label(): dict(zip(*line.get_data(), strict=True))
        for line in figure.axes[panel].lines
        if not line.get_label().startswith("_")
    }


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_files_are_pictures_and_equal_rows_give_equal_bytes(tmp_path):
    rows = list(sweep_rows((512, 1024), methods=("standard", "spattention")))
    settings = dict(matplotlib.rcParams)
    first, second = (draw_all(rows, tmp_path / name) for name in "ab")
    assert dict(matplotlib.rcParams) == settings
    stems = [f"{kind}_fwd_bwd_device_flex" for kind in ("tokens_per_s", "speedup", "efficiency")]
    stems += ["mask_standard", "mask_spattention"]
    assert [p.name for p in first] == [f"{stem}.{end}" for stem in stems for end in ("png", "svg")]
    assert sorted((tmp_path / "a").iterdir()) == sorted(first)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        if one.suffix == ".png":
            assert imread(one).std() > 0.05
        else:
            assert one.read_text().count("<path") > 20


def test_points_are_the_figures_of_the_rows(drawn):
    rows = [
        make_row(method="standard", seq_len=1024, median_us=64.0, computed_pairs=40),
        make_row(method="standard", seq_len=2048, median_us=256.0, computed_pairs=160),
        make_row(seq_len=1024, median_us=32.0, computed_pairs=10),
        make_row(seq_len=2048, median_us=64.0, computed_pairs=20),
        make_row(seq_len=2048, clock="host", median_us=999.0),
    ]
    found = drawn(rows)
    assert list(found) == [
        "tokens_per_s_fwd_bwd_device_flex", "speedup_fwd_bwd_device_flex",
        "efficiency_fwd_bwd_device_flex",
    ]  # fmt: skip
    tokens, speedup, efficiency = map(lines, found.values())
    assert tokens == {
        "standard": {1024: 16e6, 2048: 8e6},
        "spattention": {1024: 32e6, 2048: 32e6},
    }
    assert speedup["spattention"] == {1024: 2.0, 2048: 4.0}
    assert efficiency["spattention"] == {1024: 0.5, 2048: 0.5}
    dashed = [line for line in found["speedup_fwd_bwd_device_flex"].axes[0].lines
              if line.get_linestyle() == "--"]  # fmt: skip
    assert [list(line.get_ydata()) for line in dashed] == [[4.0, 8.0]]
    colours = {line.get_label(): line.get_color() for line in
               found["speedup_fwd_bwd_device_flex"].axes[0].lines}  # fmt: skip
    assert dashed[0].get_color() == colours["spattention"]


def test_bars_are_the_intervals(drawn):
    rows = [make_row(seq_len=n, median_us=100.0, ci_low_us=80.0, ci_high_us=125.0)
            for n in (1000, 2000)]  # fmt: skip
    (figure,) = drawn(rows).values()
    (bars,) = figure.axes[0].collections
    ends = [sorted(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx([8e6, 12.5e6]), pytest.approx([16e6, 25e6])]


def test_bars_of_a_speedup_are_those_of_paired_rounds(drawn):
    random = np.random.default_rng(0)
    rows = []
    for n in (1024, 2048):
        shared = np.exp(0.2 * random.standard_normal(30))
        for method, us in (("standard", 200), ("spattention", 50)):
            samples = us * shared * np.exp(0.001 * random.standard_normal(30))
            taken = ";".join(map(str, samples)), ";".join(map(str, range(30)))
            row = make_row(method=method, seq_len=n, median_us=float(np.median(samples)))
            rows.append(dataclasses.replace(row, samples_us=taken[0], rounds=taken[1]))
    figure = drawn(rows)["speedup_fwd_bwd_device_flex"]
    for segment in figure.axes[0].collections[0].get_segments():
        low, high = sorted(segment[:, 1])
        assert 3.9 < low < 4 < high < 4.1


def test_clocks_backends_and_phases_have_files_of_their_own(drawn):
    methods, backends = ("standard", "spattention"), ("flex", "blockwise")
    rows = sweep_rows((512, 1024), (8,), methods, backends, ("device", "host"))
    rows = [r for r in rows if r.backend != "flex" or r.phase == "fwd"]
    rows += sweep_rows((512, 1024), methods=("standard",), backends=("sdpa-cudnn",))
    found = drawn(rows)
    assert set(found) == {
        f"{kind}_{rest}"
        for kind in ("tokens_per_s", "speedup", "efficiency")
        for rest in ("fwd_device_flex", "fwd_host_flex", "fwd_bwd_device_blockwise",
                     "fwd_bwd_host_blockwise")
    }  # fmt: skip
    assert "forward + backward · blockwise · host clock" in texts(
        found["speedup_fwd_bwd_host_blockwise"]
    )
    device, host = (found[f"tokens_per_s_fwd_{c}_flex"] for c in ("device", "host"))
    assert lines(device)["spattention"][512] > lines(host)["spattention"][512]


def test_missing_cells_leave_gaps_and_are_named(drawn):
    rows = list(sweep_rows((512, 1024, 2048), methods=("standard", "spattention")))
    rows = [
        dataclasses.replace(row, status="oom", reason="full", median_us=None)
        if (row.method, row.seq_len) == ("spattention", 1024)
        else row
        for row in rows
    ]
    figure = drawn(rows)["tokens_per_s_fwd_bwd_device_flex"]
    line = lines(figure)["spattention"]
    assert np.isnan(line[1024]) and line[512] > 0 and line[2048] > 0
    assert not np.isnan(list(lines(figure)["standard"].values())).any()
    assert "No point: spattention, oom at N = 1k" in texts(figure)


def test_one_point_makes_no_figure(drawn):
    assert drawn(sweep_rows((512,))) == {}
    rows = [make_row(seq_len=512, median_us=1.0), make_row(seq_len=1024, status="oom")]
    assert drawn(rows) == {}
    assert drawn([]) == {}


def test_other_settings_become_panels(drawn):
    found = drawn(sweep_rows((512, 1024), heads=(8, 16), methods=("standard", "spattention")))
    speedup, by_heads = (
        found[f"{kind}_fwd_bwd_device_flex"] for kind in ("speedup", "time_by_heads")
    )
    assert [axes.get_title() for axes in speedup.axes] == ["8 heads", "16 heads"]
    assert [axes.get_title() for axes in by_heads.axes] == ["N 512", "N 1024"]
    assert set(lines(by_heads)["spattention"]) == {8, 16}
    rows = sweep_rows((512,), methods=("spattention",))
    expected = next(row.median_us for row in rows if row.phase == "fwd_bwd")
    assert lines(by_heads)["spattention"][8] == expected
    title = "batch 1 · head_dim 128 · bfloat16 · causal · blocks 128x128 · Chip X"
    assert title in texts(by_heads).replace("\n", " ")
    labels = {axes.get_xlabel() for axes in by_heads.axes}
    assert labels == {"query heads"}


def test_more_than_six_panels_go_on_in_another_file(drawn):
    rows = [make_row(seq_len=n, batch=b, median_us=9.0) for n in (64, 128) for b in range(1, 9)]
    found = drawn(rows)
    assert [len(figure.axes) for figure in found.values()] == [6, 2]
    assert list(found)[1] == "tokens_per_s_fwd_bwd_device_flex_2"


def test_fastest_dense_backend_is_drawn(drawn):
    rows = list(sweep_rows((512, 1024), methods=("standard", "spattention")))
    rows += [make_row(method="standard", backend="sdpa-cudnn", seq_len=n, median_us=8.0)
             for n in (512, 1024)]  # fmt: skip
    found = drawn(rows)
    tokens = lines(found["tokens_per_s_fwd_bwd_device_flex"])["standard on the\nfastest backend"]
    assert tokens == {512: pytest.approx(64e6), 1024: pytest.approx(128e6)}
    assert "standard on the\nfastest backend" not in lines(found["efficiency_fwd_bwd_device_flex"])


def test_styles_are_fixed_and_distinct():
    cells = [Cell(name, None, "flex") for name in METHOD_ORDER]
    looks = styles(cells)
    assert list(looks) == list(METHOD_ORDER)
    assert len(set(looks.values())) == len(METHOD_ORDER)
    assert "--" not in [style.line for style in looks.values()]  # the ideal's
    some = styles([Cell("mine", None, "flex"), cells[3], cells[0]])
    assert list(some) == ["standard", "spattention", "mine"]
    assert some["spattention"] == looks["spattention"]
    assert some["mine"] not in looks.values()


def test_methods_part_in_grey():
    looks = styles(Cell(name, None, "flex") for name in METHOD_ORDER).values()
    for a, b in itertools.combinations(looks, 2):
        greys = [np.dot(to_rgb(style.colour), (0.299, 0.587, 0.114)) for style in (a, b)]
        assert (a.marker, a.fill) != (b.marker, b.fill)
        assert a.line != b.line or abs(greys[0] - greys[1]) > 0.04


def test_variants_of_a_method_share_its_colour_and_differ():
    looks = styles(Cell("longformer", f"window={w}", "flex") for w in (64, 128, 256))
    assert len(set(looks.values())) == 3
    assert len({style.colour for style in looks.values()}) == 1


def test_backends_of_a_method_stand_in_one_picture(monkeypatch, tmp_path):
    """Every backend of the method and of the baseline, by tokens/s; one backend is no picture."""
    found = {}
    monkeypatch.setattr(
        backend_figures, "save", lambda f, stem: [found.setdefault(stem.name, f)]
    )  # fmt: skip
    rows = list(sweep_rows((512, 1024), methods=("standard", "spattention", "bigbird")))
    others = [
        dataclasses.replace(row, backend="varlen", median_us=row.median_us / 2)
        for row in rows
        if row.method == "spattention"
    ]
    backend_figures.draw_backends([*rows, *others], tmp_path)
    clocks = {row.clock for row in rows}
    assert set(found) == {f"backends_fwd_bwd_{clock}_spattention" for clock in clocks}
    drawn = lines(found["backends_fwd_bwd_device_spattention"])
    assert set(drawn) == {"spattention, flex", "spattention, varlen", "standard, flex"}
    for n, rate in drawn["spattention, flex"].items():
        assert drawn["spattention, varlen"][n] == pytest.approx(2 * rate)
