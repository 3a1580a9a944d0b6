"""Hub data sets by name, with a local stand-in for the hub that checks what it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from evo_hpo.errors import TextError
from evo_hpo.models.corpora import read_documents
from evo_hpo.models.text import load_tokens
from tests.models.test_text import Characters


class Hub:
    """Answers `datasets.load_dataset` from memory and remembers the calls."""

    def __init__(self, column: str = "text", rows: int = 300) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.read = 0
        self._column, self._rows = column, rows

    def load_dataset(self, path: str, name: str | None = None, *, split: str, streaming: bool) -> Any:
        self.calls.append((path, name, split, streaming))
        rows = [{"id": i, self._column: f"{split} text {i % 290} of {path} " * 8} for i in range(self._rows)]
        if not streaming:
            return datasets.Dataset.from_list(rows)

        def stream() -> Iterator[dict[str, Any]]:
            for row in rows:
                self.read += 1
                yield row

        return datasets.IterableDataset.from_generator(stream)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = Hub()
    monkeypatch.setattr(datasets, "load_dataset", found.load_dataset)
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize(
    ("name", "calibration", "held_out"),
    [
        (
            "wikitext2",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        ),
        ("c4", ("allenai/c4", "en", "train", True), ("allenai/c4", "en", "validation", True)),
        (
            "fineweb_edu",
            ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True),
            ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True),
        ),
    ],
)
def test_names_stand_for_repositories_and_splits_share_no_document(
    hub: Hub, name: str, calibration: tuple[Any, ...], held_out: tuple[Any, ...]
) -> None:
    first, second = read_documents(name, "calibration"), read_documents(name, "held_out")
    assert hub.calls == [calibration, held_out]
    assert not set(first) & set(second)
    tokens = load_tokens(name, Characters(), 64, 640)
    assert tokens.shape == (10, 64)
    assert tokens.equal(load_tokens(name, Characters(), 64, 640))


def test_wikitext_is_one_text(hub: Hub) -> None:
    documents = read_documents("wikitext2", "held_out")
    assert len(documents) == 1
    assert documents[0].startswith("test text 0 of Salesforce/wikitext")
    assert documents[0].count("\n\n") == 299


def test_a_large_data_set_is_read_only_as_far_as_needed(hub: Hub) -> None:
    load_tokens("c4", Characters(), 16, 32)
    assert 0 < hub.read < 50


def test_any_other_data_set_is_named_with_its_column(hub: Hub) -> None:
    hub._column = "body"
    documents = read_documents("someone/texts:small:body", "calibration")
    assert hub.calls == [("someone/texts", "small", "train", True)]
    assert len(documents) == 290 - 290 // 3
    with pytest.raises(TextError, match="KeyError"):
        read_documents("someone/texts", "calibration")


def test_what_cannot_be_reached_is_refused_with_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(TextError, match=r"'wikitext2'.*ConnectionError"):
        read_documents("my_texts", "calibration")
    with pytest.raises(TextError, match="hub's data set 'HuggingFaceFW/fineweb-edu' cannot be read"):
        read_documents("fineweb_edu", "calibration")


@pytest.mark.parametrize(("slip", "meant"), [("pydocs", "pydoc"), ("wikitext", "wikitext2"), ("slef", "self")])
def test_a_slip_in_a_name_is_told_and_not_asked_of_the_hub(hub: Hub, slip: str, meant: str) -> None:
    with pytest.raises(TextError, match=rf"no text '{slip}': did you mean '{meant}'\?"):
        read_documents(slip, "calibration")
    assert not hub.calls
    assert list(read_documents("someone/pydoc", "calibration"))
    assert [call[0] for call in hub.calls] == ["someone/pydoc"]


@pytest.mark.parametrize("name", ["./mine", "/nowhere/mine", "~/nowhere", "nowhere.jsonl", "whole:../nowhere"])
def test_a_file_that_is_missing_is_not_asked_of_the_hub(hub: Hub, name: str) -> None:
    with pytest.raises(TextError, match="there is no such file or folder"):
        read_documents(name, "calibration")
    assert not hub.calls


def test_held_out_text_is_kept_apart_from_all_that_was_drawn_of_a_large_data_set(hub: Hub, tmp_path: Path) -> None:
    late = [f"train text {i} of allenai/c4 " * 8 for i in range(200, 290)]
    (tmp_path / "late.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in late))
    name, where = str(tmp_path / "late.jsonl"), ["c4"]
    some = load_tokens(name, Characters(), 50, 1000, split="held_out", apart_from=where)
    assert some.shape == (20, 50)
    with pytest.raises(TextError, match="beside 121 that stand in the calibration text"):
        load_tokens(name, Characters(), 50, 1000, split="held_out", apart_from=where, drawn=2000)
