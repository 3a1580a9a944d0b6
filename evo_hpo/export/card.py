"""The model card of an exported folder: what it is, how it was found, and how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evo_hpo.levels.level_set import LevelSet
from evo_hpo.models.mixed import MIXED
from evo_hpo.record.environment import versions
from evo_hpo.search.checkpoint import losses_by_text
from evo_hpo.space.amounts import shown


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        profile: as it was read.
        path: its file; the plan of its comparison lies beside it.
        levels, assignment: what it takes of what.
        format: "dense", "compressed-tensors" or "GGUF"; ``dtype``: of dense weights.
        bytes: of the weight files; ``weights``: of the model.
        checked: what loading the folder back showed, or that it was not done.
    """

    profile: Mapping[str, Any]
    path: Path
    levels: LevelSet
    assignment: Sequence[int]
    format: str
    dtype: str
    bytes: int
    weights: int
    checked: str

    def text(self) -> str:
        """As Markdown."""
        data, model = self.profile, self.profile["problem"].get("settings", {}).get("model", "")
        name = Path(str(model)).name or data["problem"]["name"]
        parts = [
            f"# {name}, compressed layer by layer",
            f"{shown(self.bytes)} of weights, {8 * self.bytes / self.weights:.3f} bits a weight over all"
            f" {self.weights:,} weights of the model; {self.average()}."
            f" Format: {self.format}, {self.dtype}.",
            *self._notes(),
            "## Figures",
            self._figures(),
            f"Loaded back: {self.checked}",
            "## How it was found",
            self._how(),
            "## Profile",
            self._table(),
            "## Plan",
            f"```toml\n{self._plan()}\n```",
            "## Versions",
            ", ".join(f"{package} {version}" for package, version in versions().items()),
        ]
        return "\n\n".join(parts) + "\n"

    def average(self) -> str:
        """What the budget counted."""
        average, resource = self.profile["average"], self.levels.resource
        if resource == "modules":  # whose average is that of the first group
            units = self.levels.units
            kept = sum(unit.levels[level] != "dropped" for unit, level in zip(units, self.assignment, strict=True))
            return f"{kept} of {len(units)} searched modules kept"
        if resource == "weights":
            return f"{100 * average:.4g} % of the searched {resource} kept"
        return f"{average:.4g} {'bits of storage' if resource == 'storage' else resource} a searched weight"

    def _notes(self) -> list[str]:
        """What a reader might expect of the file and does not get."""
        kinds = Counter(c.level.settings.get("kind", "dense") for c in self.levels.chosen(self.assignment).values())
        found = []
        if self.format == "dense":
            found.append("All weights are dense: nothing is smaller or faster than the uncompressed model.")
        elif self.format == "compressed-tensors" and (kinds["sparse"] or kinds["dropped"]):
            found.append(
                f"{kinds['sparse']} sparse and {kinds['dropped']} dropped modules are dense, with zeros: the format has"
                " no sparse weights (compressed-tensors and vLLM removed them), so nothing of these is smaller."
            )
        elif self.format == "GGUF":
            found.append(
                "The types in the `.tensor-types.txt` beside it are for `llama-quantize --tensor-type-file`, which"
                " makes blocks of its own from an F16 file: what calibration (or GPTQ) brought to these ones is lost."
            )
        return found

    def _figures(self) -> str:
        """Held-out figures, a row a text."""
        held_out = self.profile["held_out"]
        names = losses_by_text(held_out)
        texts = self.profile["problem"].get("settings", {}).get("held_out", "")
        first = next(iter(texts)) if isinstance(texts, Mapping) else texts or "held-out text"
        rows = ["| text | KL to the uncompressed model, nats a token | perplexity |", "|---|---|---|"]
        for name in names:
            figures = [held_out.get(f"{name}/{key}" if name else key) for key in ("loss", "perplexity")]
            told = ["" if value is None else f"{value:.5g}" for value in figures]
            rows.append(f"| {name or first} | {' | '.join(told)} |")
        return "\n".join(rows)

    def _how(self) -> str:
        data = self.profile
        settings = "".join(f", {key} = {value}" for key, value in (data.get("settings") or {}).items())
        identity = (data.get("fingerprint") or {}).get("identity") or {}
        found = f"Searcher {data.get('searcher', '?')}{settings}, seed {data.get('seed', '?')}"
        settings = data["problem"].get("settings", {})
        arithmetic = f" with {own}'s arithmetic" if (own := settings.get("arithmetic")) else ""
        dtype = identity.get("dtype", "float32")
        kind = f"{'float32 with products in bfloat16' if dtype == MIXED else dtype}{arithmetic}"
        return f"{found}; held-out figures in {kind}, outside of the search's budget."

    def _table(self) -> str:
        """Levels of a block's layers, a row a block, and of units outside of blocks, a row a unit."""
        units = self.levels.units
        labels = {u.name: u.levels[k] for u, k in zip(units, self.assignment, strict=True)}
        outer = {unit.name: labels.pop(unit.name) for unit in units if unit.block is None}
        beside = ["| unit | level |", "|---|---|", *(f"| {name} | {label} |" for name, label in outer.items())]
        if not labels:
            return "\n".join(beside)
        roles = list(dict.fromkeys(unit.role for unit in units if unit.block is not None))
        rows = [f"| block | {' | '.join(roles)} |", "|---" * (len(roles) + 1) + "|"]
        for block in sorted({unit.block for unit in units if unit.block is not None}):
            own = {unit.role: labels[unit.name] for unit in units if unit.block == block}
            rows.append(f"| {block} | {' | '.join(own.get(role, '') for role in roles)} |")
        return "\n".join([*rows, "", *beside] if outer else rows)

    def _plan(self) -> str:
        plan = self.path.parent.parent / "plan.toml"
        if self.path.parent.name == "profiles" and plan.is_file():
            return plan.read_text(encoding="utf-8").strip()
        settings = self.profile["problem"].get("settings", {})
        return "\n".join(f"# {key} = {value!r}" for key, value in settings.items()) or "# not kept"
