import dataclasses

import numpy as np
import pytest
from matplotlib.image import imread

from bench.masks import draw_masks, mask_figure, mask_grid
from methods import METHODS, Problem
from tests.bench.rows import FAMILY, make_row

SMALL = Problem(seq_len=64, q_heads=4, head_dim=16, dtype="float32")


def test_grid_is_the_definition():
    grid = mask_grid(METHODS["sliding_window"], dataclasses.replace(SMALL, seq_len=600))
    i, j = np.mgrid[:600, :600]
    assert grid.shape == (4, 600, 600) and grid.dtype == bool
    assert (grid == ((i - j >= 0) & (i - j < 512))).all()


def test_heads_of_spattention_share_out_the_causal_pairs():
    grid = mask_grid(METHODS["spattention"], SMALL)
    assert (grid.sum(0) == np.tri(64)).all()
    assert grid[1, 20, 4] and not grid[0, 20, 4]


@pytest.mark.parametrize("name", METHODS)
def test_grid_has_the_pairs_that_the_method_counts(name):
    method = METHODS[name]
    if not method.static:
        pytest.skip("its pairs depend on the inputs")
    p = Problem(seq_len=1024, q_heads=8, head_dim=16, dtype="float32")
    assert mask_grid(method, p).sum() == method.allowed_pairs(p)


@pytest.mark.parametrize("name", FAMILY)
def test_grid_without_causality(name):
    p = dataclasses.replace(SMALL, causal=False)
    grid = mask_grid(METHODS[name], p)
    assert (grid == grid.swapaxes(1, 2)).all()
    assert grid.sum() == METHODS[name].allowed_pairs(p)


def test_a_changed_preset_changes_grid_and_picture(tmp_path):
    before = METHODS["sliding_window"]
    after = dataclasses.replace(before, window=7)
    grids = [mask_grid(method, SMALL) for method in (before, after)]
    assert [int(grid[0, 63].sum()) for grid in grids] == [64, 7]
    pictures = [
        imread(mask_figure(method, SMALL, tmp_path / str(k))[0])
        for k, method in enumerate((before, after))
    ]
    assert (pictures[0] != pictures[1]).any()


def test_picture_shows_the_mask(tmp_path):
    one_head = dataclasses.replace(SMALL, q_heads=1, kv_heads=1)
    png, svg = mask_figure(METHODS["standard"], one_head, tmp_path / "m")
    assert (png.name, svg.name) == ("m.png", "m.svg")
    picture = imread(png)[..., :3]
    dark = np.abs(picture - np.array([0x12, 0x40, 0x6F]) / 255).max(-1) < 0.02
    light = np.abs(picture - 0xEB / 255).max(-1) < 0.02
    assert dark.sum() == pytest.approx(light.sum(), rel=0.1)
    rows, columns = np.nonzero(dark)
    assert rows.mean() > np.nonzero(light)[0].mean()  # allowed pairs lie below the diagonal
    assert columns.mean() < np.nonzero(light)[1].mean()


def test_every_measured_preset_gets_a_picture(tmp_path):
    rows = [
        make_row(method="sliding_window", params="window=512"),
        make_row(method="sliding_window", params="window=64"),
        make_row(method="local_only"),
        make_row(method="local_only", causal=False),
    ]
    names = [path.name for path in draw_masks(rows, tmp_path) if path.suffix == ".png"]
    assert names == [
        "mask_sliding_window_window=512.png", "mask_sliding_window_window=64.png",
        "mask_local_only.png", "mask_local_only_not_causal.png",
    ]  # fmt: skip


@pytest.mark.parametrize("params", ["{file}:METHOD", "window=print(1)", "width=3", "window=-1"])
def test_a_results_file_is_data(tmp_path, params):
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')\n")
    text = params.format(file=tmp_path / "evil.py")
    assert draw_masks([make_row(method="sliding_window", params=text)], tmp_path) == []
    assert draw_masks([make_row(method=str(tmp_path / "evil.py:METHOD"))], tmp_path) == []


def test_what_could_not_be_measured_is_not_tried_again(tmp_path):
    assert draw_masks([make_row(method="spattention", status="oom")], tmp_path) == []
