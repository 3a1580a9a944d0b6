"""Plans: what is accepted, and that every fault is one clear line before any work."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from evo_hpo.errors import EvoHpoError, PlanError
from evo_hpo.run.plan import make_plan
from evo_hpo.run.plan_file import PlanFile
from evo_hpo.run.rehearsal import rehearse
from evo_hpo.search.registry import preview_problem

ROOT = Path(__file__).parents[2]
MANY = {setting: list(range(1000)) for setting in "ab"}


def plan_data(**changes: Any) -> dict[str, Any]:
    """A small valid plan."""
    data: dict[str, Any] = {
        "name": "small",
        "seeds": [0, 1],
        "budget": {"evaluations": 40},
        "problems": [{"name": "additive", "settings": {"units": 8}}],
        "searchers": [{"name": "uniform"}, {"name": "evopress", "settings": {"offspring": 4}}],
    }
    return data | changes


def test_the_grid_is_problems_times_searchers_times_seeds_and_uniform_runs_once() -> None:
    assert [t.id for t in make_plan(plan_data()).planned()] == ["uniform-s0", "evopress-s0", "evopress-s1"]


def test_the_final_checkpoint_is_always_there_and_seeds_may_be_a_count() -> None:
    plan = make_plan(plan_data(checkpoints=[0.5], seeds=3))
    assert plan.checkpoints == (0.5, 1.0)
    assert plan.seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgett": {}}, "unknown key 'budgett' (did you mean 'budget'?)"),
        ({"budget": {"token": 5}}, "unknown key 'budget.token'"),
        ({"budget": {}}, "exactly one of tokens, evaluations or seconds"),
        ({"budget": {"tokens": 5, "evaluations": 5}}, "exactly one"),
        ({"budget": {"tokens": -5}}, "must be positive"),
        ({"searchers": [{"name": "evopress"}, {"name": "evopress"}]}, "label of its own"),
        ({"searchers": []}, "searchers"),
        ({"checkpoints": [2.0]}, "fractions of the budget"),
        ({"name": "../up"}, "names a folder"),
        ({"seeds": []}, "at least one"),
        ({"ablation": {"searcher": "nobody", "vary": {"offspring": [1]}}}, "not in the plan"),
        ({"ablation": {"searcher": "evopress"}}, "nothing to vary"),
        ({"budget": {"evaluations": True}}, "budget.evaluations: True must be a number"),
        ({"budget": {"tokens": "40"}}, "budget.tokens: '40' must be a number"),
        ({"budget": {"seconds": math.inf}}, "must be positive, and finite"),
        ({"seeds": ["0"]}, "seeds: '0' must be a number"),
        ({"seeds": [True, False]}, "seeds: True must be a number"),
        ({"searchers": [{"name": "random", "seeds": ["1"]}]}, "searchers.0.seeds: '1' must be a number"),
        ({"checkpoints": ["0.5"]}, "checkpoints: '0.5' must be a number"),
        ({"workers": True}, "workers: True must be a number"),
        ({"searchers": [{"name": "greedy", "each": {"batch": []}}]}, "batch=[] gives no values"),
        (
            {"searchers": [{"name": "greedy", "each": MANY}]},
            "1000000 combinations of a, b",
        ),
        ({"ablation": {"searcher": "evopress", "vary": {"offspring": []}}}, "offspring=[] gives no values"),
        (
            {"ablation": {"searcher": "evopress", "grid": True, "vary": MANY}},
            "1000000 combinations of a, b: give at most 1000",
        ),
        ({"searchers": [{"name": "random", "label": "a\nb"}]}, "'a\\nb' is blank, or has line breaks"),
        ({"searchers": [{"name": "random", "label": "\x1b[31mred"}]}, "control characters"),
        ({"problems": [{"name": "additive", "label": " "}]}, "' ' is blank"),
        ({"problems": {"name": "additive"}}, "problems: Input should be a list"),
    ],
)
def test_malformed_plans_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(plan_data(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"searchers": [{"name": "evopres"}]}, "did you mean 'evopress'"),
        ({"searchers": [{"name": "optuna:tpee"}]}, "did you mean 'optuna:tpe'"),
        ({"searchers": [{"name": "evopress", "settings": {"lambda": 3}}]}, "no setting 'lambda'"),
        ({"searchers": [{"name": "evopress", "settings": {"offspring": "many"}}]}, "offspring='many'"),
        ({"problems": [{"name": "smollm3"}]}, "unknown problem 'smollm3'"),
        ({"problems": [{"name": "additive", "settings": {"unit": 3}}]}, "did you mean 'units'"),
    ],
)
def test_wrong_names_and_settings_are_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvoHpoError) as caught:
        make_plan(plan_data(**changes)).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_said_once_and_a_label_beside_it() -> None:
    with pytest.raises(PlanError, match="^unknown searcher 'evopres'; did you mean"):
        make_plan(plan_data(searchers=[{"name": "evopres"}])).check()
    with pytest.raises(PlanError, match="^searcher 'mine': unknown searcher 'evopres'; did you mean"):
        make_plan(plan_data(searchers=[{"name": "evopres", "label": "mine"}])).check()
    with pytest.raises(PlanError, match="^unknown problem 'additve'; did you mean"):
        make_plan(plan_data(problems=[{"name": "additve"}])).check()


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan at"):
        PlanFile.read(tmp_path / "none.toml").plan()
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ", encoding="utf-8")
    with pytest.raises(PlanError, match="not valid TOML"):
        PlanFile.read(broken).plan()
    with pytest.raises(PlanError, match="is a folder"):
        PlanFile.read(tmp_path).plan()


def test_ablations_vary_one_setting_at_a_time_or_all_combinations() -> None:
    vary = {"offspring": [4, 8], "max_switches": [1, 3]}
    single = make_plan(plan_data(ablation={"searcher": "evopress", "vary": vary}))
    assert [s.key for s in single.searchers][2:] == [
        "evopress offspring=8",
        "evopress max_switches=1",
        "evopress max_switches=3",
    ]
    grid = make_plan(plan_data(ablation={"searcher": "evopress", "vary": vary, "grid": True}))
    assert len(grid.searchers) == 2 + 4


HEAD, TABLES = (
    'name = "p"  # a name\n',
    """
# what it costs
[budget]
evaluations = 9
[[problems]]
name = "additive"
[[searchers]]
name = "evopress"
""",
)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + TABLES + '[ablation]\nsearcher = "evopress"\n[ablation.vary]\noffspring = [\n  2,\n  [4, 8],\n]\n',
        HEAD + 'description = """\n[ablation]\nof size"""\n' + TABLES,
        HEAD + 'ablation.searcher = "evopress"\nablation.vary.offspring = [2]\n' + TABLES,
        HEAD + 'ablation = { searcher = "evopress", vary = { offspring = [2] } }\n' + TABLES,
        HEAD
        + "seeds = [1] # what it costs\n[ablation]\nsearcher = 'e'\n"
        + TABLES
        + "[[ablation.variants]]\nlabel = 'v'\n",
        '"name" = "p"  # a name\nseeds = [\n  0,\n]\n' + TABLES,
        HEAD
        + 'budget.evaluations = 9 # what it costs\nproblems = [{name="additive"}]\nsearchers = [{name="evopress"}]',
    ],
    ids=["multi-line array", "string", "dotted keys", "inline table", "out of order", "quoted key", "no tables"],
)
def test_a_varied_plan_is_the_same_plan_but_for_its_name_and_ablation(text: str) -> None:
    ablation = {"searcher": "evopress", "vary": {"offspring": [2, 4], "tokens": [[1, 2]]}, "grid": False}
    varied = PlanFile(text).varied("p-ablation", ablation)
    assert varied.data == tomllib.loads(text) | {"name": "p-ablation", "ablation": ablation}
    assert "# a name" in varied.text
    assert "# what it costs" in varied.text
    again = varied.varied("again", ablation)
    assert again.data == varied.data | {"name": "again"}


def test_a_plan_of_plain_data_can_be_read_again() -> None:
    data = plan_data(description='quotes " and\nlines', checkpoints=[0.5, 1.0])
    data["searchers"].append({"name": "evopress", "label": "a: b", "settings": {"tokens": [512, 2048], "invert": True}})
    assert PlanFile.of(data, "search").data == data


def test_where_each_seed_has_an_instance_of_its_own_every_searcher_runs_on_each() -> None:
    problem = {"name": "additive", "settings": {"units": 8}, "instance": "seed"}
    plan = make_plan(plan_data(problems=[problem]))
    tasks = list(plan.planned())
    assert [t.id for t in tasks] == ["uniform-s0", "evopress-s0", "uniform-s1", "evopress-s1"]
    assert [plan.problems[0].settings_of(t.seed) for t in tasks] == [{"units": 8, "seed": s} for s in (0, 0, 1, 1)]
    assert not any(t.deterministic for t in tasks)


@pytest.mark.parametrize(
    "problem",
    [{"name": "additive", "settings": {"seed": 3}}, {"name": "tabular", "settings": {"landscape": "pairs-5"}}],
)
def test_an_instance_for_each_seed_is_refused_where_the_seed_is_given_or_none_is_known(problem: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="for problems with a setting 'seed'"):
        make_plan(plan_data(problems=[problem | {"instance": "seed"}])).check()


def test_an_entry_with_each_stands_for_every_combination_of_the_values() -> None:
    entry = {"name": "evopress", "settings": {"offspring": 4}, "each": {"widen_after": [3, 4], "survivors": [[1], [2]]}}
    plan = make_plan(plan_data(searchers=[{"name": "uniform"}, entry]))
    assert [(s.key, s.settings) for s in plan.searchers] == [
        ("uniform", {}),
        *(
            (
                f"evopress widen_after={wide}, survivors={n}",
                {"offspring": 4, "widen_after": wide, "survivors": [n]},
            )
            for wide in (3, 4)
            for n in (1, 2)
        ),
    ]
    assert make_plan(plan.plain()) == plan


SHIPPED = sorted((ROOT / "benchmarks" / "plans").glob("*.toml")) + sorted(ROOT.glob("docs/results/*/plan.toml"))
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


REST = """name = "part"
budget = { tokens = 100_000 }
searchers = [{ name = "uniform" }]
"""
MODEL = """[[problems]]
name = "language_model"
"""


def every_plan() -> dict[str, str]:
    """Name -> text of every plan in the repository: files, fenced blocks of any page, those with settings alone too."""
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SHIPPED}
    for page in PAGES:
        fenced = re.findall(r"^```toml[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for number, text in enumerate(fenced):
            if "[budget]" in text and "[[problems]]" in text:
                found[f"{page.relative_to(ROOT)} {number}"] = text
            elif "[problems.settings]" in text:
                part = REST + text if "[[problems]]" in text else f'{REST}{MODEL}{text}\nmodel = "m"\n'
                found[f"{page.relative_to(ROOT)} {number}, a part"] = part
    return found


@pytest.mark.parametrize("text", every_plan().values(), ids=every_plan())
def test_every_plan_that_ships_is_rehearsed(text: str) -> None:
    """Its searchers are made and asked on what the problem says of itself; no model is loaded."""
    plan = PlanFile(text).plan()
    plan.check()
    assert plan.problems
    rehearse(plan, *(preview_problem(p.name, p.settings_of(plan.seeds[0])) for p in plan.problems))


def test_a_searcher_that_asks_for_what_a_problem_lacks_is_refused_before_any_work() -> None:
    """Also where another problem of the plan, alike in space and tokens, has it."""
    settings = {"units": 8, "seed": 0}
    problems = [{"name": "noisy", "settings": settings}, {"name": "interacting", "settings": settings}]
    plan = make_plan(plan_data(problems=problems, searchers=[{"name": "evopress"}, {"name": "fisher"}]))
    previews = [preview_problem(p.name, p.settings_of(0)) for p in plan.problems]
    rehearse(plan, previews[0])
    with pytest.raises(PlanError, match="searcher 'fisher': Fisher asks for sensitivities, problem 'interacting' has"):
        rehearse(plan, *previews)


@pytest.mark.parametrize("exclude", [r"lm_head|\.gate$", ""])
def test_settings_of_the_build_are_checked_as_the_build_takes_them(exclude: str) -> None:
    settings: dict[str, Any] = {"exclude": exclude, "include": "proj", "calibration_tokens": 4096, "inputs": "3"}
    preview_problem("language_model", {"model": "m", "build": {**settings, "group_size": 64}})
    with pytest.raises(EvoHpoError, match="gptq has no setting 'tokens_of_calibration'"):
        preview_problem("language_model", {"model": "m", "build": {"tokens_of_calibration": 1}})
    with pytest.raises(EvoHpoError, match="inputs='9' must be"):
        preview_problem("language_model", {"model": "m", "build": {"inputs": "9"}})
    with pytest.raises(EvoHpoError, match="is no regular expression"):
        preview_problem("language_model", {"model": "m", "build": {"exclude": "("}})
    with pytest.raises(EvoHpoError, match=r"kinds=\['head'\] must be"):
        preview_problem("language_model", {"model": "m", "method": "drop", "levels": [], "build": {"kinds": ["head"]}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [0, 0]}, "seeds: 0 stands there twice"),
        ({"seeds": [0, -1]}, "-1 must be 0 or more"),
        ({"seeds": 10**12}, "from 1 to"),
        ({"searchers": [{"name": "random", "seeds": [3, 3]}]}, "3 stands there twice"),
        ({"searchers": [{"name": "random", "seeds": [-3]}]}, "-3 must be 0 or more"),
        ({"searchers": [{"name": "random", "label": "x" * 300}]}, "at most 100"),
        ({"problems": [{"name": "additive", "label": "x" * 300}]}, "at most 100"),
        ({"name": "x" * 300}, "at most 100"),
    ],
)
def test_seeds_that_are_no_seeds_and_names_too_long_for_files_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=re.escape(said)) as caught:
        make_plan(plan_data(**changes))
    assert "\n" not in str(caught.value)


def test_journals_of_long_labels_have_names_that_file_systems_take_and_differ() -> None:
    values = [["x" * 300, n] for n in range(3)]
    ablation = {"searcher": "evopress", "vary": {"offspring": values}}
    files = [Path(t.journal).name for t in make_plan(plan_data(ablation=ablation)).planned()]
    assert len(set(files)) == len(files)
    assert max(map(len, files)) < 256


@pytest.mark.parametrize(
    "text", [b"\xff", b"x = " + b"[" * 5000, b"x = 1" + b"0" * 5000], ids=["bytes", "deep", "long"]
)
def test_a_file_that_is_no_toml_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(text)
    with pytest.raises(PlanError, match="not valid TOML") as caught:
        PlanFile.read(path)
    assert "\n" not in str(caught.value)


def test_a_problem_whose_settings_are_of_a_wrong_type_is_refused_by_name() -> None:
    with pytest.raises(EvoHpoError, match=r"problem 'additive': units=\[\] must be an integer"):
        preview_problem("additive", {"units": []})


def test_labels_of_any_script_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    labels = ("探索 🚀", "a\u00a0b", "é", "👩\u200d💻")
    data = plan_data(searchers=[{"name": "random", "label": label} for label in labels])
    path = tmp_path / "plan.toml"
    path.write_text("\ufeff" + PlanFile.of(data, "x").text, encoding="utf-8")
    assert PlanFile.read(path).plan() == make_plan(data)
