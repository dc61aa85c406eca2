import pytest

from bench.derived import METHOD_ORDER, Board, Cell, Gain, boards, compare, in_order
from methods import METHODS
from tests.bench.rows import make_row

# N = 4096, 8 heads: 8 * 4096 * 4097 / 2 pairs, of which spattention takes an eighth.
DENSE_PAIRS, SPARSE_PAIRS = 67_125_248, 8_390_656
DENSE = {"method": "standard", "allowed_pairs": DENSE_PAIRS, "computed_pairs": 1000 * 128 * 128}
SPARSE = {"allowed_pairs": SPARSE_PAIRS, "computed_pairs": 250 * 128 * 128}
FLEX = Cell("spattention", None, "flex")


def one_board(*rows):
    (board,) = boards(rows)
    return board


@pytest.fixture
def board() -> Board:
    return one_board(
        make_row(**DENSE, batch=2, phase="fwd", median_us=90.0),
        make_row(**DENSE, batch=2, median_us=400.0),
        make_row(**SPARSE, batch=2, phase="fwd", median_us=40.0),
        make_row(**SPARSE, batch=2, phase="bwd", median_us=80.0),
        make_row(**SPARSE, batch=2, median_us=125.0, peak_bytes=5 << 20),
        make_row(
            method="standard", batch=2, backend="sdpa-cudnn", allowed_pairs=DENSE_PAIRS,
            median_us=300.0,
        ),
    )  # fmt: skip


def test_speedups_divide_medians(board):
    assert board.over_same_backend(FLEX) == Gain(400 / 125, "fwd_bwd")
    assert board.over_fastest_dense(FLEX) == Gain(300 / 125, "fwd_bwd")
    assert board.over_same_backend(FLEX, "fwd") == Gain(90 / 40, "fwd")
    assert board.over_same_backend(FLEX, "bwd") is None  # the baseline has no such row
    assert board.over_fastest_dense(FLEX, "fwd") == Gain(90 / 40, "fwd")


def test_ideal_and_efficiency(board):
    assert board.ideal_by_elements(FLEX) == pytest.approx(8.0)
    assert board.ideal_by_blocks(FLEX) == pytest.approx(4.0)
    assert board.efficiency(FLEX) == (pytest.approx(0.8), "fwd_bwd")


def test_rates(board):
    assert board.tokens_per_s(FLEX) == pytest.approx(2 * 4096 / 125e-6)
    # 14 * 128 flops a pair, 8 390 656 pairs, batch 2, in 125 us.
    assert board.tflop_per_s(FLEX) == (pytest.approx(240.576889), "fwd_bwd")
    assert board.peak_bytes(FLEX) == 5 << 20


def test_forward_alone_is_4_d():
    board = one_board(make_row(**SPARSE, phase="fwd", median_us=100.0))
    assert board.tflop_per_s(FLEX) == (pytest.approx(4 * 128 * 8_390_656 / 1e8), "fwd")
    assert board.tokens_per_s(FLEX) is None


def test_forward_is_compared_where_one_side_lacks_the_backward():
    board = one_board(
        make_row(**DENSE, phase="fwd", median_us=90.0),
        make_row(**DENSE, status="unsupported", reason="no backward"),
        make_row(**SPARSE, phase="fwd", median_us=30.0),
        make_row(**SPARSE, median_us=100.0),
    )
    assert board.over_same_backend(FLEX) == Gain(3.0, "fwd")
    assert board.efficiency(FLEX) == Gain(0.75, "fwd")


def test_efficiency_is_by_elements_without_block_lists():
    board = one_board(
        make_row(method="standard", backend="varlen", allowed_pairs=800, median_us=40.0),
        make_row(backend="varlen", allowed_pairs=100, median_us=10.0),
    )
    cell = Cell("spattention", None, "varlen")
    assert board.ideal_by_blocks(cell) is None
    assert board.efficiency(cell) == Gain(0.5, "fwd_bwd")


def test_blocks_are_compared_on_one_backend_only():
    board = one_board(
        make_row(**DENSE, backend="eager", median_us=40.0), make_row(**SPARSE, median_us=10.0)
    )
    assert board.ideal_by_blocks(FLEX) is None
    assert board.efficiency(FLEX) is None
    assert board.over_same_backend(FLEX) is None
    assert board.over_fastest_dense(FLEX) == Gain(4.0, "fwd_bwd")


def test_clocks_and_problems_are_never_mixed():
    rows = [
        make_row(method="standard", clock="host", median_us=900.0),
        make_row(median_us=100.0),
        make_row(method="standard", q_block=64, median_us=800.0),
        make_row(method="standard", device="Chip Y", median_us=700.0),
    ]
    found = boards(rows)
    assert [len(board.cells) for board in found] == [1, 1, 1, 1]
    assert [board.head.clock for board in found] == ["device", "host", "device", "device"]
    assert all(board.over_fastest_dense(FLEX) is None for board in found)


def test_a_row_that_is_not_ok_has_no_time():
    board = one_board(
        make_row(**DENSE, median_us=400.0),
        make_row(**SPARSE, status="mismatch", reason="dq", median_us=100.0),
    )
    assert board.us(FLEX, "fwd_bwd") is None
    assert board.over_same_backend(FLEX) is None
    assert board.tflop_per_s(FLEX) is None
    assert board.ideal_by_blocks(FLEX) == 4.0


def test_the_later_of_two_rows_counts():
    board = one_board(make_row(status="oom", reason="full"), make_row(median_us=7.0))
    assert board.us(FLEX, "fwd_bwd") == 7.0
    assert board.cells == [FLEX]


def test_order_is_that_of_the_presets():
    assert [name for name in METHOD_ORDER if name in METHODS] == list(METHODS)
    assert in_order(["mine", "gapped_bands", "yours", "standard"]) == [
        "standard", "gapped_bands", "mine", "yours",
    ]  # fmt: skip
    board = one_board(
        *(make_row(method=m, backend=b) for b in ("b", "a") for m in ("mine", "standard"))
    )
    assert [(c.backend, c.method) for c in board.cells] == [
        ("b", "standard"), ("b", "mine"), ("a", "standard"), ("a", "mine"),
    ]  # fmt: skip


def test_layout_is_no_phase_of_a_board():
    assert boards([make_row(phase="layout", median_us=5.0)]) == []


def test_rounds_pair_within_one_run():
    rounds = ";".join(map(str, range(8)))
    a = {"samples_us": "2;4;6;8;10;12;14;16", "rounds": rounds}
    b = {"samples_us": "1;2;3;4;5;6;7;8", "rounds": rounds}
    paired = compare(make_row(**a), make_row(**b))
    assert paired == (pytest.approx(2), pytest.approx(2), pytest.approx(2), True, 8)
    assert compare(make_row(**a), make_row(**b | {"code": "1" * 12})).paired  # a file of one's own
    gone_on = b | {"time_utc": "2026-01-01T00:00:38Z"}
    for other in (b | {"run": "later"}, b | {"rounds": None}, b | {"host": "another"}, gone_on):
        unpaired = compare(make_row(**a), make_row(**other))
        assert not unpaired.paired
        assert unpaired.low < 1 < 4 < unpaired.high
