"""The CSV store: what was written is read back, a torn line is cut, damage is named."""

from pathlib import Path

import pytest

from bench.record import COLUMNS, Store, code_hash, read_rows
from tests.bench.rows import make_row


def test_rows_survive_the_file(tmp_path):
    rows = [
        make_row(samples_us="1.5;2.25", rounds="0;1", causal=False, params="window=3,x=(1, 2)"),
        make_row(status="oom", reason='needs "more", than there is', median_us=None),
    ]
    path = tmp_path / "results" / "a.csv"
    with Store(path) as store:
        store.append(rows[:1])
        store.append(rows[1:])
    assert read_rows(path) == rows
    assert read_rows(path)[0].samples == [1.5, 2.25]
    assert read_rows(path)[1].median_us is None


def test_a_row_is_one_line(tmp_path):
    path = tmp_path / "a.csv"
    with Store(path) as store:
        store.append([make_row(reason="two\nlines")])
    assert len(path.read_text().splitlines()) == 2
    assert read_rows(path)[0].reason == "two lines"


def test_a_torn_last_line_is_cut_and_written_again(tmp_path):
    path = tmp_path / "a.csv"
    first, second = make_row(seq_len=512), make_row(seq_len=1024)
    with Store(path) as store:
        store.append([first, second])
    whole = path.read_bytes()
    for cut in range(whole.rstrip().rfind(b"\n") + 2, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_rows(path) == [first]
        with Store(path) as store:
            store.append([second])
        assert path.read_bytes() == whole


def test_an_empty_file_becomes_a_results_file(tmp_path):
    path = tmp_path / "a.csv"
    path.touch()
    with Store(path):
        pass
    assert path.read_text() == ",".join(COLUMNS) + "\n"


def test_two_writers_exclude_each_other(tmp_path):
    path = tmp_path / "a.csv"
    with Store(path), pytest.raises(BlockingIOError), Store(path):
        pass


def test_replace_leaves_only_the_given_rows_and_keeps_the_lock(tmp_path):
    path = tmp_path / "a.csv"
    kept = make_row(seq_len=2048)
    with Store(path) as store:
        store.append([make_row(seq_len=512), kept])
        store.replace([kept])
        store.append([make_row(seq_len=4096)])
        with pytest.raises(BlockingIOError), Store(path):
            pass
    assert [row.seq_len for row in read_rows(path)] == [2048, 4096]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "a,b\n" + text, "not a results file"),
        (lambda text: text.replace("bfloat16,True", "bfloat16,maybe"), "line 2: damaged"),
        (lambda text: text + "short,line\n", "line 3: damaged"),
        (lambda text: "", "not a results file"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    path = tmp_path / "a.csv"
    with Store(path) as store:
        store.append([make_row(dtype="bfloat16", causal=True)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_a_file_that_is_no_results_file_is_not_written_to(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("my,own,notes\n")
    with pytest.raises(ValueError, match="not a results file"), Store(path):
        pass
    assert path.read_text() == "my,own,notes\n"


def test_the_code_hash_covers_a_users_file(tmp_path):
    file = Path(tmp_path / "mine.py")
    file.write_text("a = 1\n")
    first = code_hash([file])
    file.write_text("a = 2\n")
    assert len({first, code_hash([file]), code_hash()}) == 3
