"""Plans, profiles and texts as nobody should write them: each must end in exit code 0, or 2 and one line.

    python -m benchmarks.measurements.fuzz [--cases 10000] [--seed 0]

A plan goes through ``evo-hpo compare`` up to where its searches would start; some go through their searches too, on a
synthetic problem or on a tiny model whose levels are built. A profile goes through ``evo-hpo export`` and onto a space,
a text through the reader of calibration texts; commands are sizes, memory, evaluations and exports with odd options and
plans. Hypothesis draws them: valid ones with values replaced, keys dropped and
added, text cut and spoilt, or plain bytes.

Needs the extra `measurements`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tomlkit
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.measurements.fuzzed_commands import exit_code, search_case
from benchmarks.measurements.fuzzed_models import SIZED, command_case, option_words
from evo_hpo import CompressionSpace, Unit
from evo_hpo.errors import EvoHpoError
from evo_hpo.models.corpora import read_documents
from evo_hpo.record.profiles import open_profile

SPACE = CompressionSpace([Unit(f"layers.{i}.q_proj", (2, 3, 4), levels=("2", "3", "4")) for i in range(4)], 12)

PLAN: dict[str, Any] = {
    "name": "tiny",
    "description": "a plan",
    "seeds": [0, 1],
    "budget": {"evaluations": 40},
    "checkpoints": [0.5, 1.0],
    "workers": 1,
    "problems": [{"name": "additive", "label": "a", "settings": {"units": 6, "levels": 3}}],
    "searchers": [
        {"name": "evopress", "settings": {"offspring": 4, "survivors": [2, 1]}},
        {"name": "random", "label": "draws", "seeds": [3]},
        {"name": "greedy", "each": {"batch": [2, 4]}},
    ],
    "ablation": {"searcher": "evopress", "vary": {"offspring": [2, 8]}, "grid": False},
}
SEARCHED: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0],
    "budget": {"evaluations": 20},
    "checkpoints": [0.5, 1.0],
    "problems": [{"name": "noisy", "settings": {"units": 4, "levels": 3, "tokens": 256, "noise": 0.3}}],
    "searchers": [
        {"name": "evopress", "settings": {"offspring": 4, "survivors": [2, 1], "tokens": [256, 512]}},
        {"name": "local_search", "settings": {"batch": 2}},
        {"name": "trust_region", "settings": {}},
        {"name": "optuna:tpe", "settings": {"encoding": "keys", "sampler": {"n_startup_trials": 4}}},
        {"name": "nevergrad:DiscreteOnePlusOne", "settings": {"horizon": 20}},
    ],
}
MODEL: dict[str, Any] = {
    "name": "tiny",
    "budget": {"tokens": 256},
    "checkpoints": [1.0],
    "problems": [
        {
            "name": "language_model",
            "settings": {
                "model": "model",
                "method": "rtn",
                "levels": [2, 3, 4],
                "average": 3.0,
                "build": {"group_size": 16},
                "sequence_length": 16,
                "calibration_tokens": 128,
                "held_out_tokens": 32,
                "tokens": 32,
                "dtype": "float32",
                "fitness": "kl",
                "tie": [["gate_proj", "up_proj"]],
            },
        }
    ],
    "searchers": [{"name": "evopress", "settings": {"offspring": 2}}],
}
PROFILE: dict[str, Any] = {
    "search": "evopress-s0",
    "searcher": "evopress",
    "seed": 0,
    "problem": {"name": "additive", "settings": {"units": 4}},
    "fingerprint": {"identity": {"model": "0"}},
    "held_out": {"loss": 0.5},
    "cost": 12,
    "average": 3.0,
    "levels": [1, 1, 1, 1],
    "units": {u.name: "3" for u in SPACE.units},
}

WORDS = st.sampled_from(
    ["", "x", "evopress", "additive", "nevergrad:CMA", "\x00", "é", "a/b", "..", "9" * 300, "2:1", "\u2028"]
)
SCALARS = st.one_of(
    WORDS,
    st.text(max_size=8),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLAIN = st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=40).map(
    lambda text: json.dumps({"text": text}).encode()
)
LINES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")),
    VALUES.map(lambda v: json.dumps({"text": v}).encode()),
    VALUES.map(lambda v: json.dumps(v).encode()),
    st.text(max_size=40).map(lambda t: json.dumps({"text": t}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in nested data with each of its keys or positions."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((value, key), *_places(child))]


@st.composite
def spoilt(draw: st.DrawFn, valid: dict[str, Any]) -> dict[str, Any]:
    """Valid data with up to three faults: a value replaced, a key dropped, a key added."""
    data: dict[str, Any] = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        places = _places(data)
        container, key = draw(st.sampled_from(places)) if places else (data, "name")
        match draw(st.sampled_from(["replace", "replace", "drop", "add"])):
            case "replace":
                container[key] = draw(VALUES)
            case "drop":
                container.pop(key, None) if isinstance(container, dict) else container.pop(key)
            case _ if isinstance(container, dict):
                container[draw(WORDS)] = draw(VALUES)
            case _:
                container.append(draw(VALUES))
    return data


@st.composite
def files(draw: st.DrawFn, valid: dict[str, Any], written: Callable[[Any], str]) -> bytes:
    """A file of spoilt data, now and then cut or with bytes put in between, or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    try:
        text = written(draw(spoilt(valid))).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError):  # what the format cannot hold
        text = written(valid).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.binary(max_size=4)) + draw(st.sampled_from([b"", text[at:]]))
    return text


@st.composite
def set_otherwise(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """A plan with up to two settings, or parts of them, of other values: most of it goes on to its searches."""
    data: dict[str, Any] = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 2))):
        entry = draw(st.sampled_from([e for e in [*data["problems"], *data["searchers"]] if "settings" in e]))
        container, key = draw(st.sampled_from(_places(entry["settings"]) or [(entry["settings"], "batch")]))
        container[key] = draw(SCALARS)
    return tomlkit.dumps(data).encode("utf-8", "surrogatepass")


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, bytes]:
    """Suffix and bytes of a text."""
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"PAR1"]))
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
    suffix = draw(st.sampled_from([".txt", ".md", ".jsonl", ".parquet"]))
    return suffix, mark + end.join(draw(st.lists(draw(st.sampled_from([LINES, PLAIN])), max_size=8)))


def _refused(doing: Callable[[], object]) -> int:
    """0, or 2 where it is refused in one line."""
    try:
        doing()
    except EvoHpoError as error:
        if not str(error) or "\n" in str(error):
            raise AssertionError(f"not one line: {str(error)!r}") from error
        return 2
    return 0


def plan_case(folder: Path, data: bytes) -> int:
    """A plan, up to where its searches would start."""
    path = folder / "plan.toml"
    path.write_bytes(data)
    with patch("evo_hpo.cli.comparing.compare"), patch("evo_hpo.cli.comparing.show_report"):
        return exit_code("compare", path, "--no-track", "--root", folder / "comparisons")


def profile_case(folder: Path, data: bytes) -> int:
    """A profile, exported (no problem here has a model) and put onto a space."""
    path = folder / "profile.json"
    path.write_bytes(data)
    if not exit_code("export", path, folder / "model"):
        raise AssertionError("exported, though no problem here has a model")
    return _refused(lambda: open_profile(path, SPACE))


def text_case(folder: Path, text: tuple[str, bytes]) -> int:
    """A text, read."""
    path = folder / f"text{text[0]}"
    path.write_bytes(text[1])
    return _refused(lambda: (read_documents(str(path), "calibration"), read_documents(str(path), "held_out")))


KINDS: dict[str, tuple[Callable[[Path, Any], int], st.SearchStrategy[Any]]] = {
    "plans": (plan_case, files(PLAN, tomlkit.dumps)),
    "profiles": (profile_case, files(PROFILE, json.dumps)),
    "texts": (text_case, texts()),
    "searches": (search_case, st.one_of(set_otherwise(SEARCHED), files(SEARCHED, tomlkit.dumps))),
    "models": (search_case, st.one_of(set_otherwise(MODEL), files(MODEL, tomlkit.dumps))),
    "commands": (command_case, option_words(SCALARS, st.one_of(set_otherwise(SIZED), files(SIZED, tomlkit.dumps)))),
}
"""What is fuzzed: what tries a case and gives its exit code, and the strategy that draws cases."""
SHARES = {"plans": 0.3, "profiles": 0.3, "texts": 0.25, "searches": 0.08, "models": 0.02, "commands": 0.05}
"""Of all cases: a search takes a hundred times as long as a text."""


def fuzz(kind: str, cases: int, first_seed: int = 0) -> Counter[int]:
    """How many cases ended in which exit code.

    Raises:
        Exception: the first case that ends in any other way, made small by Hypothesis.
    """
    tried, strategy = KINDS[kind]
    codes: Counter[int] = Counter()
    with _folder() as folder:

        @seed(first_seed)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def every(case: Any) -> None:
            codes[tried(folder, case)] += 1

        every()
    return codes


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Fuzzes every kind and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS))
    arguments = parser.parse_args()
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    for kind in kinds:
        share = 1.0 if arguments.kind else SHARES[kind]
        codes = fuzz(kind, math.ceil(share * arguments.cases), arguments.seed)
        told = ", ".join(f"{count} with exit code {code}" for code, count in sorted(codes.items()))
        print(f"{kind}: {sum(codes.values())} cases, {told}")


if __name__ == "__main__":
    main()
