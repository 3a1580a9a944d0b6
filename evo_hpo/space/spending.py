"""What an assignment takes of each resource."""

from __future__ import annotations

from evo_hpo.space.compression_space import Assignment, CompressionSpace


def spent(space: CompressionSpace, levels: Assignment) -> dict[str, dict[str, int]]:
    """Cost and budget of each resource."""
    rows = zip(space.resources, space.costs(levels), space.budgets, strict=True)
    return {name: {"cost": cost, "budget": budget} for name, cost, budget in rows}
