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
