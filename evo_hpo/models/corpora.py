"""Where text comes from: Python's own help, local files, hub data sets; each divided into two disjoint sets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from evo_hpo.errors import TextError

Split = Literal["calibration", "held_out"]

HELD_OUT_EVERY = 3  # of a text without its own test split, every 3rd document is held out
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_HUB = {
    # name: (data set, configuration, text column, calibration split, held-out split)
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "c4": ("allenai/c4", "en", "text", "train", "validation"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", "train", None),
}


def read_documents(spec: str, split: Split, characters: int | None = None) -> list[str]:
    """Documents of one split of the text named by `spec`, in a fixed order, without empty ones.

    Args:
        characters: stop once this many were read; None reads everything.

    Raises:
        TextError: no such text, or the split is unknown.
    """
    if split not in ("calibration", "held_out"):
        raise TextError(f"split is {split!r}: use 'calibration' or 'held_out'")
    if spec == "pydoc":
        documents: Iterable[str] = _pydoc(split)
    elif Path(spec).expanduser().exists():
        documents = _divided(dict.fromkeys(_in_pieces(_local(Path(spec).expanduser()))), split)  # no text in both
    else:
        documents = _hub(spec, split)
    chosen = list(_up_to(documents, characters))
    if not chosen:
        raise TextError(f"{spec!r} has no {split} text: name a text with at least {HELD_OUT_EVERY} documents")
    return chosen


def _pydoc(split: Split) -> list[str]:
    """Topics of Python's help. A text that stands under two names is never held out: it may calibrate."""
    from pydoc_data.topics import topics

    named = [topics[name] for name in sorted(topics)]
    calibration = list(_divided(named, "calibration"))
    if split == "calibration":
        return calibration
    return [text for text in _divided(named, "held_out") if text not in calibration]


def _local(path: Path) -> list[str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
    if not files:
        raise TextError(f"no text in {str(path)!r}: files must end in {', '.join(_SUFFIXES)}")
    return [document for file in files for document in _documents(file)]


def _documents(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [row if isinstance(row, str) else _text_of(row, path) for row in rows]
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return [_text_of(row, path) for row in parquet.read_table(path).to_pylist()]
    if path.suffix not in _SUFFIXES:
        raise TextError(f"cannot read {str(path)!r}: files must end in {', '.join(_SUFFIXES)}")
    return [path.read_text(encoding="utf-8")]


def _text_of(row: dict[str, Any], path: Path) -> str:
    if "text" in row:
        return str(row["text"])
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise TextError(f"{str(path)!r} has no column 'text' (columns: {', '.join(row)}): rename one")
    return str(row[strings[0]])


def _in_pieces(documents: list[str], size: int = 4000) -> list[str]:
    """Cut a few long documents into pieces of about `size` characters, so that a single file can be divided."""
    if len(documents) >= 4 * HELD_OUT_EVERY:
        return documents
    pieces: list[str] = []
    for document in documents:
        lines: list[str] = []
        for line in document.splitlines(keepends=True):
            lines.append(line)
            if sum(map(len, lines)) >= size:
                pieces.append("".join(lines))
                lines = []
        pieces.append("".join(lines))
    return pieces


def _divided(documents: Iterable[str], split: Split) -> Iterator[str]:
    full = (document for document in documents if document.strip())
    for index, document in enumerate(full):
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "held_out"):
            yield document


def _hub(spec: str, split: Split) -> Iterator[str]:
    name, configuration, column, calibration, held_out = _hub_entry(spec)
    import datasets

    try:
        rows = datasets.load_dataset(
            name,
            configuration,
            split=held_out if split == "held_out" and held_out else calibration,
            streaming=name != "Salesforce/wikitext",
        )
        texts: Iterator[str] = (str(row[column]) for row in rows)
        first = next(texts)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise TextError(
            f"no text {spec!r}: give 'pydoc', 'self', an existing file or folder, {', '.join(map(repr, _HUB))}"
            f" or a reachable hub data set as name:config:column ({type(error).__name__})"
        ) from error
    texts = itertools.chain([first], texts)
    if name == "Salesforce/wikitext":
        texts = _joined(texts)
    return texts if held_out else _divided(_unique(texts), split)


def _unique(texts: Iterable[str]) -> Iterator[str]:
    """Each text once, so that no text is in both splits."""
    seen: set[int] = set()
    for text in texts:
        if (key := hash(text)) not in seen:
            seen.add(key)
            yield text


def _hub_entry(spec: str) -> tuple[str, str | None, str, str, str | None]:
    if spec in _HUB:
        return _HUB[spec]
    name, _, rest = spec.partition(":")
    configuration, _, column = rest.partition(":")
    return name, configuration or None, column or "text", "train", None


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """WikiText rows are single lines: the whole split is one text, as perplexity on it is usually measured."""
    yield "\n\n".join(lines)


def _up_to(documents: Iterable[str], characters: int | None) -> Iterator[str]:
    read = 0
    for document in documents:
        if document.strip():
            yield document
            read += len(document)
        if characters is not None and read >= characters:
            return
