"""Text: fixed length, seeded, nested, disjoint, cached, from every kind of place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from evo_hpo.errors import TextError
from evo_hpo.models.corpora import read_documents
from evo_hpo.models.text import load_tokens, sample_from_model, token_stream
from tests.tiny import tiny_model


class Characters:
    """A tokenizer of single characters."""

    eos_token_id = 0
    bos_token_id = 0

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        ids = [[1 + ord(c) % 96 for c in each] for each in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def __len__(self) -> int:
        return 97


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pydoc_needs_no_network_and_its_splits_share_no_document() -> None:
    calibration, held_out = read_documents("pydoc", "calibration"), read_documents("pydoc", "held_out")
    assert len(calibration) > len(held_out) > 10
    assert not set(calibration) & set(held_out)


def test_sequences_have_the_asked_shape_and_more_tokens_are_a_superset() -> None:
    few = load_tokens("pydoc", Characters(), 50, 990, seed=3)
    many = load_tokens("pydoc", Characters(), 50, 5000, seed=3)
    assert few.shape == (20, 50)
    assert few.dtype == torch.int64
    assert torch.equal(many[:20], few)
    assert len({tuple(row) for row in many.tolist()}) > 95  # drawn without replacement


def test_seeds_decide() -> None:
    first, again, other = (load_tokens("pydoc", Characters(), 50, 1000, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_are_cached(cache: Path) -> None:
    stream = token_stream("pydoc", Characters(), "held_out")
    files = list((cache / "tokens").iterdir())
    assert len(files) == 1
    assert np.array_equal(token_stream("pydoc", Characters(), "held_out"), stream)
    assert list((cache / "tokens").iterdir()) == files


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_cache_is_written_anew(cache: Path, left: int) -> None:
    tokens = load_tokens("pydoc", Characters(), 16, 160)
    (path,) = (cache / "tokens").glob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert torch.equal(load_tokens("pydoc", Characters(), 16, 160), tokens)
    assert path.read_bytes() == whole


def test_local_files_of_every_kind(tmp_path: Path) -> None:
    documents = [f"document {i} " * 20 for i in range(30)]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": d, "id": 1}) for d in documents))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "table.parquet")
    for name in ("lines.jsonl", "table.parquet"):
        splits = [read_documents(str(tmp_path / name), split) for split in ("calibration", "held_out")]
        assert sorted(splits[0] + splits[1]) == sorted(documents)
        assert len(splits[1]) == 10
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(9000)))
    book = [read_documents(str(tmp_path / "book.txt"), split) for split in ("calibration", "held_out")]
    assert not set(book[0]) & set(book[1])
    assert sum(map(len, book[0] + book[1])) == (tmp_path / "book.txt").stat().st_size
    assert load_tokens(str(tmp_path), Characters(), 64, 640, split="held_out").shape == (10, 64)


def test_too_little_text_is_refused_with_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("word " * 5000)
    with pytest.raises(TextError, match="at most"):
        load_tokens(str(tmp_path / "short.txt"), Characters(), 100, 1_000_000)
    with pytest.raises(TextError, match="at least 1"):
        load_tokens("pydoc", Characters(), 0, 10)


def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(TextError, match="must end in"):
        read_documents(str(tmp_path / "data.csv"), "calibration")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": "x", "b": "y"}))
    with pytest.raises(TextError, match="column"):
        read_documents(str(tmp_path / "rows.jsonl"), "calibration")
    with pytest.raises(TextError, match="split"):
        read_documents("pydoc", "train")  # type: ignore[arg-type]


def test_text_sampled_from_the_model_follows_its_distribution() -> None:
    model: Any = tiny_model("llama")
    found = sample_from_model(model, 400, 2, seed=0, batch=100, start=5)
    assert found.shape == (400, 2)
    assert torch.equal(found, sample_from_model(model, 400, 2, seed=0, batch=100, start=5))
    with torch.inference_mode():
        expected = torch.softmax(model(input_ids=torch.tensor([[5]])).logits[0, -1], 0)
    frequency = torch.bincount(found[:, 0], minlength=97) / 400
    likely = int(expected.argmax())
    assert abs(float(frequency[likely] - expected[likely])) < 0.1
    assert float((frequency - expected).abs().sum()) < 0.6
    splits = [load_tokens("self", Characters(), 8, 64, split=s, model=model) for s in ("calibration", "held_out")]
    assert not torch.equal(*splits)
    with pytest.raises(TextError, match="model="):
        load_tokens("self", Characters(), 8, 64)


def test_a_text_is_the_same_by_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"document {i} " * 200}) for i in range(600)))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = (str(tmp_path / "x.jsonl"), "~/x.jsonl", "x.jsonl")
    found = [load_tokens(name, Characters(), 50, 1000) for name in names]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def book(seed: int, lines: int = 1500) -> str:
    letters = np.random.default_rng(seed).integers(97, 123, size=(lines, 40)).astype(np.uint8)
    return "".join(bytes(row).decode() + "\n" for row in letters)


def runs(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + 40]) for row in tokens.tolist() for i in range(len(row) - 39)}


def test_held_out_text_that_stands_in_the_calibration_text_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(13):  # enough that files are documents
        (folder / f"{i:02}.txt").write_text(book(i))
    copy = tmp_path / "another name.md"
    copy.write_text("something before it\n" + (folder / "03.txt").read_text())
    for held_out in (folder / "03.txt", copy):  # 03 calibrates
        with pytest.raises(TextError, match=r"holds 0 sequences .* beside \d+ that stand in the calibration text"):
            load_tokens(str(held_out), Characters(), 64, 640, split="held_out", apart_from=[str(folder)])
    both = tmp_path / "both.txt"
    both.write_text((folder / "03.txt").read_text() + book(99))
    found = load_tokens(str(both), Characters(), 64, 640, split="held_out", apart_from=[str(folder)])
    assert "left out" in caplog.records[-1].getMessage()
    calibration = torch.from_numpy(np.array(token_stream(str(folder), Characters(), "calibration")[None]))
    assert not runs(found) & runs(calibration)


def test_a_mix_holds_its_texts_in_their_shares_and_order_and_more_tokens_are_a_superset(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for seed, name in enumerate(names):
        Path(name).write_text(book(seed, 9000))
    alone = [load_tokens(name, Characters(), 64, 64 * 64, seed=5).tolist() for name in names]
    mixed = load_tokens({names[0]: 3, names[1]: 1}, Characters(), 64, 64 * 64, seed=5).tolist()
    assert [[row for row in mixed if row in each] for each in alone] == [alone[0][:48], alone[1][:16]]
    for count in range(1, 64):
        assert abs(sum(row in alone[0] for row in mixed[:count]) - 0.75 * count) <= 1
    assert load_tokens({names[0]: 0.75, names[1]: 0.25}, Characters(), 64, 10 * 64, seed=5).tolist() == mixed[:10]
    assert load_tokens({names[0]: 3, names[1]: 1}, Characters(), 64, 64 * 64, seed=6).tolist() != mixed
    assert load_tokens({names[0]: 2}, Characters(), 64, 64 * 64, seed=5).tolist() == alone[0]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "names with shares above 0"),
        ({"pydoc": 0, "self": 1}, "names with shares above 0"),
        ({"pydoc": -1.0}, "names with shares above 0"),
        ({"pydoc": True}, "names with shares above 0"),
        ({"pydoc": "much"}, "names with shares above 0"),
        ({"pydoc": float("inf")}, "names with shares above 0"),
        (["pydoc", "self"], "names with shares above 0"),
        ({"pydoc": 99, "nowhere": 1}, "a share of 0.01 gives 'nowhere' none of 20 sequences"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line(mix: Any, message: str) -> None:
    with pytest.raises(TextError) as caught:
        load_tokens(mix, Characters(), 50, 1000)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("twin", ["{folder}/./a.txt", "whole:{folder}/a.txt", "{folder}/link.txt"])
def test_a_mix_does_not_hold_one_text_twice(twin: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(book(0))
    (tmp_path / "b.txt").write_text(book(1))
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    names = [f"{tmp_path}/a.txt", twin.format(folder=tmp_path), f"{tmp_path}/b.txt"]
    with pytest.raises(TextError, match="texts .*a.txt' and .* of a mix are the same: name it once"):
        load_tokens(dict.fromkeys(names, 1.0), Characters(), 64, 64 * 8)
    assert len(load_tokens(dict.fromkeys(names[::2], 1.0), Characters(), 64, 64 * 8)) == 8


def test_what_stands_in_any_part_of_a_mix_is_not_held_out(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "both.txt")]
    texts = [book(1, 3000), book(2, 3000)]
    for name, text in zip(names, [*texts, texts[0] + texts[1] + book(3, 9000)], strict=True):
        Path(name).write_text(text)
    found = load_tokens(names[2], Characters(), 64, 640, split="held_out", apart_from={names[0]: 1, names[1]: 1})
    for name in names[:2]:
        calibration = torch.from_numpy(np.array(token_stream(name, Characters(), "calibration")[None]))
        assert not runs(found) & runs(calibration)


def test_a_whole_text_is_not_divided_and_is_kept_apart_from_itself(tmp_path: Path) -> None:
    name = str(tmp_path / "a.txt")
    Path(name).write_text(book(1))
    assert read_documents(f"whole:{name}", "held_out") == read_documents(f"whole:{name}", "calibration") == [book(1)]
    divided = torch.from_numpy(np.array(token_stream(name, Characters(), "calibration")[None]))
    found = load_tokens(f"whole:{name}", Characters(), 64, 640, split="held_out", apart_from=[name])
    assert not runs(found) & runs(divided)
    with pytest.raises(TextError, match="holds 0 sequences"):
        load_tokens(f"whole:{name}", Characters(), 64, 640, split="held_out", apart_from=[f"whole:{name}"])
    with pytest.raises(TextError, match="no text 'whole:/nowhere'"):
        read_documents("whole:/nowhere", "held_out")


def test_text_of_its_own_is_held_out_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(book(1, 9000))
    (tmp_path / "b.txt").write_text(book(2, 9000))
    name = str(tmp_path / "a.txt")
    plain = load_tokens(name, Characters(), 64, 640, split="held_out")
    for others in ([name], [str(tmp_path / "b.txt"), "self", "pydoc"]):
        assert torch.equal(load_tokens(name, Characters(), 64, 640, split="held_out", apart_from=others), plain)


def test_documents_of_one_text_that_are_all_but_equal_are_not_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [book(i, 12) for i in range(40)]
    documents = [d for i, t in enumerate(texts) for d in (f"{i} " * 300, t, t.replace("\n", "\n\n", 1) + "x")]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    held_out = read_documents(str(path), "held_out")
    assert all(any(d[50:300] in c for c in read_documents(str(path), "calibration")) for d in held_out)
    with pytest.raises(TextError, match=r"holds \d+ sequences .* beside \d{3} that stand in the calibration text"):
        load_tokens(str(path), Characters(), 64, 64 * 40, split="held_out", apart_from=[str(path)])
    path.write_text(path.read_text() + "\n" + "\n".join(json.dumps({"text": book(99 + i, 12)}) for i in range(60)))
    found = load_tokens(str(path), Characters(), 64, 640, split="held_out", apart_from=[str(path)])
    more = load_tokens(str(path), Characters(), 64, 1280, split="held_out", apart_from=[str(path)])
    calibration = torch.from_numpy(np.array(token_stream(str(path), Characters(), "calibration")[None]))
    assert not runs(found) & runs(calibration)
    assert torch.equal(more[:10], found)
    assert "that stand in the calibration text" in caplog.records[-1].getMessage()


def test_what_a_full_disk_cuts_off_is_not_left_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(file: Any, _: object) -> None:
        file.write(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(np, "save", cut)
    with pytest.raises(OSError, match="No space left"):
        token_stream("pydoc", Characters(), "calibration")
    assert not list((tmp_path / "cache" / "tokens").iterdir())
