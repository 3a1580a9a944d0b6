"""One case of the fuzzer: a command in this process, and a plan whose searches run in this process too.

Needs the extra `dev` for a tokenizer.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from evo_hpo.cli.commands import main as evo_hpo
from evo_hpo.record.comparison import PlannedSearch
from evo_hpo.run.events import Event
from evo_hpo.run.plan import Plan
from evo_hpo.run.schedule import compare
from evo_hpo.run.search_process import run_searches

LARGEST = 64
"""Trials, and searches of a plan, up to which a plan goes through its searches."""


def exit_code(*arguments: object) -> int:
    """Exit code of a command, which must say one line where it is not 0."""
    shown, said = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        try:
            evo_hpo([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    lines = said.getvalue().strip("\n").split("\n")
    if code not in (0, 2) or (code == 2 and len(lines) != 1):
        raise AssertionError(f"exit code {code}: {said.getvalue()[:2000]}")
    return code


def search_case(folder: Path, data: bytes) -> int:
    """A plan, through its searches where they are few and short."""
    path = folder / "plan.toml"
    path.write_bytes(data)
    if not (folder / "model").exists():
        write_model(folder / "model")
    with (
        patch("evo_hpo.cli.comparing.compare", _compared),
        patch("evo_hpo.cli.comparing.show_report"),
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        patch.dict(os.environ, {"EVO_HPO_CACHE": str(folder / "cache"), "EVO_HPO_THREADS": "1"}),
        contextlib.chdir(folder),
    ):
        return exit_code("compare", path, "--no-track", "--root", folder / "comparisons")


def _compared(plan: Plan, **settings: Any) -> Path:
    """The searches of a plan in this process, if that is short."""
    tokens, trials = plan.budget.tokens or 0, plan.budget.evaluations or 0
    searches = list(itertools.islice(plan.planned(), LARGEST + 1))
    if plan.budget.seconds or tokens > 16 * LARGEST or trials > LARGEST or len(searches) > LARGEST:
        return Path(settings["folder"])
    with patch("evo_hpo.run.schedule._processes", _here):
        return compare(plan, **settings)


@contextlib.contextmanager
def _here(plan: Plan, folder: Path, resume: bool, tasks: list[PlannedSearch], *_: object) -> Iterator[Iterator[Event]]:
    def events() -> Iterator[Event]:
        waiting, heard = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
        for task in tasks:
            waiting.put(task)
        waiting.put(None)
        with patch("evo_hpo.run.search_process.follow_parent"):
            run_searches(plan, folder, resume, 1, waiting, heard)
        while (event := heard.get()) is not None:
            yield event

    yield events()


def write_model(folder: Path) -> None:
    """A tiny Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.measurements.tiny_architectures import VOCABULARY, tiny_architecture

    model: Any = tiny_architecture("llama")
    model.save_pretrained(folder)
    words = {letter: i % VOCABULARY for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(folder)
