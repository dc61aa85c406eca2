"""The CSV store: what was written is read back, a torn line is cut, damage is named."""

import fcntl
import math
import resource
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


@pytest.mark.parametrize("end", ["\n", "\r", "\v", "\x85", "\u2028", "\0"])
def test_a_row_is_one_line(tmp_path, end):
    path = tmp_path / "a.csv"
    with Store(path) as store:
        store.append([make_row(reason=f"two{end}lines")])
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
        (lambda text: text + "short,line\n", f"line 3: damaged .2 fields of {len(COLUMNS)}"),
        (lambda text: text + "\n", "line 3: damaged"),
        (lambda text: text.replace("spattention", 'spatt"ention,"'), "line 2: damaged"),
        (lambda text: text[:-1] + '"open\n', "line 2: damaged .unexpected end"),
        (lambda text: text.replace("bfloat16", "bfloat"), "line 2: damaged .dtype"),
        (lambda text: text.replace("fwd_bwd", "fwd_bw"), "line 2: damaged .phase is 'fwd_bw'"),
        (lambda text: text.replace("bwd,device", "bwd,devices"), "line 2: damaged .clock"),
        (lambda text: text.replace(",ok,", ",okay,"), "line 2: damaged .status"),
        (lambda text: text.replace(",ok,,", ",ok,,nan"), "line 2: damaged .compile_s is 'nan'"),
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


@pytest.mark.parametrize("notes", ["my,own,notes\n", "my,own,notes", "run,mine"])
def test_a_file_that_is_no_results_file_is_not_written_to(tmp_path, notes):
    path = tmp_path / "notes.csv"
    path.write_text(notes)
    with pytest.raises(ValueError, match="not a results file"), Store(path):
        pass
    assert path.read_text() == notes


DAMAGE = [b"garbage", bytes(range(128, 256)), b'a,"quote,that is not closed', b""]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_set_aside_and_the_others_stay(tmp_path, damage):
    path = tmp_path / "a.csv"
    rows = [make_row(seq_len=n) for n in (512, 1024, 2048)]
    with Store(path) as store:
        store.append(rows)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[2:4], b"torn"]))
    with Store(path) as store:
        assert (store.rows, store.damaged) == (rows, 1)
        assert store.aside.read_bytes() == damage + b"\n"
        store.append([])
    assert path.read_bytes() == whole
    with Store(path) as store:
        assert (store.rows, store.damaged) == (rows, 0)


def test_text_that_looks_like_code_is_text(tmp_path):
    path = tmp_path / "a.csv"
    row = make_row(
        params=f"=open('{tmp_path / 'trap'}','w')", method="evil.py:METHOD", reason="=1"
    )
    with Store(path) as store:
        store.append([row])
    assert read_rows(path) == [row]
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def limit_file_size():
    """A limit on the size of files, as a full disk is one; the test says how many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [Store.append, Store.replace])
def test_a_write_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, write, limit_file_size):
    path = tmp_path / "a.csv"
    first = make_row(seq_len=512)
    with Store(path) as store:
        store.append([first])
        size = path.stat().st_size
        limit_file_size(size + 100)
        with pytest.raises(OSError, match="File too large") as caught:
            write(store, [make_row(seq_len=n) for n in (1024, 2048)])
        assert caught.value.filename == str(path)
        assert path.stat().st_size == size
        limit_file_size(resource.RLIM_INFINITY)
        store.append([first])
    assert read_rows(path) == [first, first]
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_that_a_dead_process_left_is_removed(tmp_path):
    (tmp_path / "a.csv.new").write_text("half")
    with Store(tmp_path / "a.csv"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_file_that_was_replaced_meanwhile_is_not_written_to(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    with Store(path):
        pass
    lock = fcntl.flock

    def late(file, how):
        (tmp_path / "other").write_bytes(path.read_bytes())
        (tmp_path / "other").rename(path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError), Store(path):
        pass


def test_the_code_hash_covers_a_users_file(tmp_path):
    file = Path(tmp_path / "mine.py")
    file.write_text("a = 1\n")
    first = code_hash([file])
    file.write_text("a = 2\n")
    assert len({first, code_hash([file]), code_hash()}) == 3


@pytest.mark.parametrize("first", ["model", "recipe", "heads", "step_kernels"])
def test_a_file_from_before_the_columns_of_training_is_read_and_gone_on_with(tmp_path, first):
    path, row = tmp_path / "a.csv", make_row(reason="one, two")
    with Store(path) as store:
        store.append([row])
    older = COLUMNS.index(first)
    header, line = path.read_text().splitlines()
    fewer = len(COLUMNS) - older
    path.write_text(f"{','.join(COLUMNS[:older])}\n{line[:-fewer]}\n")
    assert read_rows(path) == [row]
    trained = make_row(phase="step", model="table2", world_size=2, losses="2.5;2.25")
    with Store(path) as store:
        assert store.rows == [row]
        store.append([trained])
    assert path.read_text().splitlines()[:2] == [header, line]
    assert read_rows(path) == [row, trained]


def test_a_row_of_very_many_samples_is_read_again(tmp_path):
    times = ";".join(["1.5"] * 50_000)
    with Store(tmp_path / "a.csv") as store:
        store.append([make_row(samples_us=times, reason="\ud800")])
    (row,) = read_rows(tmp_path / "a.csv")
    assert len(row.samples) == 50_000 and row.reason == "\\ud800"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"median_us": -1.0}, "positive number"), ({"median_us": math.inf}, "positive number"),
        ({"median_us": 0.0}, "positive number"), ({"samples_us": "1;-2"}, "positive number"),
        ({"samples_us": "1;2;3", "rounds": "1;2"}, "go together"),
        ({"samples_us": "1;2;3", "rounds": "1;2;2"}, "go together"),
        ({"samples_us": "1;2", "rounds": "1;x"}, "invalid literal"),
        ({"samples_us": "1;2;3", "median_us": 3.0}, "median_us is 3; that of the samples is 2"),
        ({"samples_us": "1;2;3", "median_us": 2.0, "ci_low_us": 2.5}, "outside its interval"),
        ({"samples_us": "1;2;3", "median_us": 2.0, "ci_high_us": 1.5}, "outside its interval"),
    ],
)  # fmt: skip
def test_times_and_rounds_that_cannot_be_are_damage(tmp_path, change, complaint):
    with Store(tmp_path / "a.csv") as store:
        store.append([make_row(**change)])
    with pytest.raises(ValueError, match=f"line 2: damaged .*{complaint}"):
        read_rows(tmp_path / "a.csv")
