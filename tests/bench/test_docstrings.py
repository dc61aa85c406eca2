"""The text to train on that comes with the installation."""

from importlib.metadata import distribution

import pytest

from bench import docstrings
from bench.tables import read_table
from bench.text import text_name


def test_docstrings_of_a_package_come_once_and_without_its_code():
    found = list(docstrings.docstrings("tyro"))
    assert len(found) == len(set(found)) > 50
    from tyro import cli

    assert any(text.startswith(cli.__doc__.strip().splitlines()[0]) for text in found)


def test_a_file_for_another_python_is_passed_over(tmp_path):
    (tmp_path / "new.py").write_text('"""Text."""\nbroken (')
    (tmp_path / "old.py").write_text('"""Text \\d."""\n')
    assert docstrings._parsed(tmp_path / "new.py").body == []
    assert len(docstrings._parsed(tmp_path / "old.py").body) == 1


def test_the_file_and_whose_words_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docstrings, "PACKAGES", ("tyro",))
    monkeypatch.setattr("sys.argv", ["docstrings", str(tmp_path / "text.txt")])
    docstrings.main()
    size = len((tmp_path / "text.txt").read_text(encoding="utf-8"))
    version = distribution("tyro").version
    (source,) = read_table(tmp_path / "text.sources.csv", docstrings.Source)
    assert source == docstrings.Source(
        text=text_name(tmp_path / "text.txt"), package="tyro", version=version,
        licence=docstrings.licence("tyro"), characters=size,
    )  # fmt: skip
    assert capsys.readouterr().out.startswith(f"tyro {version} (")
    assert size > 10_000


@pytest.mark.parametrize("package", docstrings.PACKAGES)
def test_licences_are_named(package):
    assert 3 < len(docstrings.licence(package)) < 200
