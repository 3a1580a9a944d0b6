"""Imported by the process that those of searches are forked from: what each of them would ask for is known there."""

from __future__ import annotations

from evo_hpo.record.environment import environment
from evo_hpo.search.registry import available_problems, describe_searcher

environment()
available_problems()
describe_searcher("uniform")
