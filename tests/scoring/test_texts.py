"""Texts of several kinds: each held-out text has its own figures, and calibration may mix texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evo_hpo.errors import EvoHpoError
from evo_hpo.levels.build import default_folder
from evo_hpo.models.identity import tokens_identity
from evo_hpo.models.loading import load_tokenizer
from evo_hpo.models.text import load_tokens
from evo_hpo.record.comparison import Comparison
from evo_hpo.run.plan import make_plan
from evo_hpo.run.plan_file import PlanFile
from evo_hpo.run.schedule import compare
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_problem
from tests.scoring.test_identity import text
from tests.scoring.test_offered_levels import rounded
from tests.scoring.test_task import model_folder, plan_of, rehearse_and_prepare

__all__ = ["model_folder", "rounded"]

PLANS = Path(__file__).parents[2] / "benchmarks" / "plans"


@pytest.fixture
def prose(tmp_path: Path) -> str:
    """A text of another kind than Python's help."""
    return str(text(tmp_path / "prose.jsonl", "somebody"))


def test_each_text_has_the_figures_that_it_has_alone_and_the_first_is_the_loss(
    rounded: dict[str, Any], prose: str
) -> None:
    both = make_problem("language_model", **rounded | {"held_out": {"docs": "pydoc", "prose": prose}})
    docs = make_problem("language_model", **rounded)
    other = make_problem("language_model", **rounded | {"held_out": prose})
    assert both.texts == ("docs", "prose")
    assert not docs.texts
    lowest = (0,) * len(both.space.units)
    for assignment in (both.space.uniform(), lowest):
        found, first, second = (problem.validate(assignment) for problem in (both, docs, other))
        assert {k: v for k, v in found.items() if "/" not in k} == first
        assert {k: found.pop(f"prose/{k}") for k in second} == second
        assert found.pop("prose/gap") == second["loss"] - first["loss"]
        assert found == first
    assert both.score([lowest], Minibatch(0, 64)) == docs.score([lowest], Minibatch(0, 64))
    reference = both.reference()
    assert {k for k, v in reference.items() if v == pytest.approx(0, abs=1e-6)} == {"loss", "prose/loss", "prose/gap"}
    assert reference["prose/perplexity"] == other.reference()["perplexity"]


def test_the_order_and_content_of_every_text_are_part_of_the_identity(rounded: dict[str, Any], prose: str) -> None:
    def identity(held_out: Any) -> dict[str, str]:
        made = make_problem("language_model", **rounded | {"held_out": held_out})
        return {k: v for k, v in made.fingerprint()["identity"].items() if k.startswith("held-out")}

    docs, alone = identity("pydoc"), identity(prose)
    assert identity({"docs": "pydoc"}) == docs
    assert identity({"docs": "pydoc", "prose": prose}) == docs | {"held-out text prose": alone["held-out text"]}
    assert identity({"prose": prose, "docs": "pydoc"}) == alone | {"held-out text docs": docs["held-out text"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": {}}, "must be a text, or name = text for several"),
        ({"held_out": {"docs": 3}}, "must be a text, or name = text for several"),
        ({"held_out": {"a b": "pydoc"}}, "'a b' must be 1 to 40 letters"),
        ({"held_out": {"a/b": "pydoc"}}, "'a/b' must be 1 to 40 letters"),
        ({"held_out": {"": "pydoc"}}, "'' must be 1 to 40 letters"),
        ({"held_out": {"docs": "pydoc", "loss": "self"}}, "'loss' must be 1 to 40 letters"),
        ({"calibration": {}}, "names with shares above 0"),
        ({"calibration": {"pydoc": -1}}, "names with shares above 0"),
    ],
)
def test_names_and_shares_are_checked_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvoHpoError) as caught:
        LanguageModelTask(model="/nowhere", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_held_out_text_is_kept_apart_from_every_calibration_text(
    rounded: dict[str, Any], prose: str, tmp_path: Path
) -> None:
    copy = tmp_path / "another name.jsonl"
    copy.write_text(Path(prose).read_text().partition("\n")[2])  # one document further: what calibrates is held out
    for calibration in (prose, {"pydoc": 1, prose: 1}):
        changes = {"calibration": calibration, "held_out": {"docs": "pydoc", "copy": str(copy)}}
        with pytest.raises(EvoHpoError, match=r"another name.*stand in the calibration text"):
            make_problem("language_model", **rounded | changes)


def test_a_mix_calibrates_and_names_the_store_by_its_texts_and_shares(
    rounded: dict[str, Any], prose: str, tmp_path: Path
) -> None:
    mix = {"pydoc": 3, prose: 1}
    made: Any = make_problem("language_model", **rounded | {"calibration": mix})
    tokenizer = load_tokenizer(rounded["model"])
    assert torch.equal(made.evaluator.tokens, load_tokens(mix, tokenizer, 16, 512))
    (tmp_path / "copy.jsonl").write_text(Path(prose).read_text())
    other = text(tmp_path / "other.jsonl", "nobody")
    texts: list[Any] = ["pydoc", mix, {"pydoc": 6, str(tmp_path / "copy.jsonl"): 2}, {"pydoc": 1, prose: 1}]
    texts += [{"pydoc": 3, str(other): 1}, {"pydoc": 1}]
    plain, first, same, *others, single = (
        default_folder(rounded["model"], "gptq", [2, 3], {"calibration": each}) for each in texts
    )
    assert first == same
    assert single == plain
    assert len({plain, first, *others}) == 4


def test_a_comparison_keeps_the_figures_of_each_text_and_the_first_names_the_winner(
    rounded: dict[str, Any], prose: str, tmp_path: Path
) -> None:
    plan = plan_of(rounded | {"held_out": {"docs": "pydoc", "prose": prose}})
    comparison = Comparison.read(compare(plan, root=tmp_path / "runs"))
    assert comparison.problems["tiny"].texts == ("docs", "prose")
    losses = {}
    for record in comparison.records():
        figures = record.checkpoints[-1].held_out
        assert figures["prose/gap"] == figures["prose/loss"] - figures["loss"]
        losses[record.search] = figures["loss"]
    profile = json.loads((comparison.folder / "profiles" / "winner.json").read_text())
    assert profile["search"] == min(losses, key=losses.__getitem__)
    assert profile["held_out"].keys() >= {"loss", "perplexity", "prose/loss", "prose/perplexity", "prose/gap"}


def test_the_papers_protocol_runs_on_files_of_the_users(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan that ships, on a tiny model: its texts are read whole, each from the file that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    data = dict(PlanFile.read(PLANS / "paper-protocol.toml").data)
    (problem,) = data["problems"]
    paths = [problem["settings"]["calibration"], *problem["settings"]["held_out"].values()]
    files = [Path(path.removeprefix("whole:")) for path in paths]
    files[0].parent.mkdir()
    for path, word in zip(files, ("fine", "wiki", "crawl"), strict=True):
        text(path, word)
    small = {"model": str(model_folder), "device": "cpu", "sequence_length": 16, "calibration_tokens": 256}
    small |= {"held_out_tokens": 64, "tokens": 32, "levels": [2, 3, 4], "dtype": "float32", "method": "rtn"}
    problem["settings"] |= small | {"build": {"group_size": 16}, "store": str(tmp_path / "store")}
    data |= {"budget": {"tokens": 512}, "seeds": [0], "searchers": [{"name": "uniform"}]}
    plan = make_plan(data)
    rehearse_and_prepare(problem["settings"], plan)
    comparison = Comparison.read(compare(plan, root=tmp_path / "runs"))
    (record,) = comparison.records()
    tokenizer = load_tokenizer(str(model_folder))
    named = {"held-out text": f"whole:{files[1]}", "held-out text c4": f"whole:{files[2]}"}
    for what, spec in named.items():
        drawn = load_tokens(spec, tokenizer, 16, 64, split="held_out")
        assert record.header["fingerprint"]["identity"][what] == tokens_identity(drawn)
    assert comparison.problems["3 bit"].texts == ("wikitext2", "c4")
    assert {"loss", "perplexity", "c4/loss", "c4/perplexity", "c4/gap"} <= set(record.checkpoints[-1].held_out)


def test_stores_may_be_calibrated_on_one_text_under_several_names(model_folder: Path, prose: str) -> None:
    """They are no mix: nothing is drawn of them, they are only kept out of what is held out."""
    other = str(Path(prose).parent / ".." / Path(prose).parent.name / Path(prose).name)
    join = [{"method": "wanda", "levels": [0.5], "build": {"calibration": other}}]
    join.append({"method": "magnitude", "levels": [0.3], "build": {"calibration": f"whole:{prose}"}})
    task = LanguageModelTask(
        model=str(model_folder), calibration=prose, held_out="pydoc", join=tuple(join),
        sequence_length=16, calibration_tokens=64, held_out_tokens=64, tokens=16,
    )  # fmt: skip
    task.texts.check(load_tokenizer(str(model_folder)))
