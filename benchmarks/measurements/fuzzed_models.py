"""Commands on models for the fuzzer: sizes, evaluations and exports with options that nobody should give.

Needs the extra `measurements`.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from benchmarks.measurements.fuzzed_commands import exit_code, write_model

Command = tuple[list[str], bytes]

SETTINGS: dict[str, Any] = {
    "model": "model",
    "method": "rtn",
    "levels": [2, 3, 4],
    "build": {"group_size": 16},
    "serve": "transformers",
    "tensor_parallel": 1,
    "sequence_length": 16,
    "calibration_tokens": 64,
    "held_out_tokens": 32,
    "tokens": 32,
    "dtype": "float32",
}
SIZED: dict[str, Any] = {
    "name": "sized",
    "budget": {"tokens": 256},
    "problems": [{"name": "language_model", "settings": {**SETTINGS, "size": "40 kB"}}],
    "searchers": [{"name": "uniform"}],
}
"""A plan whose budget is a file's size."""

OPTIONS: dict[str, dict[str, str]] = {
    "sizes plan.toml": {"--context": "64", "--sequences": "2"},
    "sizes profile.json": {"--context": "64", "--sequences": "2"},
    "plan-memory model": {
        "--levels": "2,3",
        "--method": "gptq",
        "--device": "80 GB",
        "--context": "64",
        "--sequence-length": "16",
        "--calibration-tokens": "64",
        "--held-out-tokens": "64",
        "--group-size": "16",
    },
    "evaluate model profile.json --no-track": {
        "--text": "text.jsonl",
        "--original": "model",
        "--sequence-length": "16",
        "--tokens": "64",
        "--stride": "4",
        "--dtype": "float32",
        "--tasks": "",
        "--output": "table",
    },
    "export profile.json out": {"--dtype": "bfloat16", "--format": "compressed-tensors", "--template": "x.gguf"},
}
"""Commands and their options with values that are right."""


@st.composite
def option_words(draw: st.DrawFn, scalars: st.SearchStrategy[Any], plans: st.SearchStrategy[bytes]) -> Command:
    """The words of a command, up to two of whose options have other values, and a plan's file."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words, options = command.split(), dict(OPTIONS[command])
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=2)):
        options[name] = str(draw(scalars)).replace("\x00", "")
    if words[0] != "export":
        given = sorted(options)
    else:  # its options exclude each other
        given = draw(st.lists(st.sampled_from(sorted(options)), max_size=2, unique=True))
    return [*words, *(f"{name}={options[name]}" for name in given)], draw(plans)


def command_case(folder: Path, case: Command) -> int:
    """A command on a tiny model, a profile found on it, and a plan."""
    words, plan = case
    with (
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        patch.dict(os.environ, {"EVO_HPO_CACHE": str(folder / "cache"), "EVO_HPO_THREADS": "1"}),
        patch("evo_hpo.report.size_plot.size_figure"),
        contextlib.chdir(folder),
    ):
        if not Path("profile.json").exists():
            write_model(folder / "model")
            _write_profile()
        Path("plan.toml").write_bytes(plan)
        number = len(list(Path().glob("out*")))  # an export is never written over
        return exit_code(*(f"out{number}" if word == "out" else word for word in words))


def _write_profile() -> None:
    """A profile of the model, as a comparison writes it, and a text."""
    from evo_hpo.search.registry import make_problem, prepare_problem

    prepare_problem("language_model", SETTINGS, lambda *_: None)
    made: Any = make_problem("language_model", **SETTINGS)
    levels = made.space.uniform()
    profile = {
        "search": "uniform-s0",
        "searcher": "uniform",
        "problem": {"name": "language_model", "settings": SETTINGS},
        "fingerprint": made.fingerprint(),
        "held_out": made.validate(levels),
        "average": made.space.average(levels),
        "levels": list(levels),
        "units": made.space.labels(levels),
    }
    made.evaluator.close()
    Path("profile.json").write_text(json.dumps(profile), encoding="utf-8")
    lines = [json.dumps({"text": f"document {i} of a few words"}) for i in range(30)]
    Path("text.jsonl").write_text("\n".join(lines), encoding="utf-8")
