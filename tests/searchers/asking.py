"""Asking a searcher by hand."""

from __future__ import annotations

from evo_hpo import Allowance, Batch, Searcher


def asked(searcher: Searcher, allowance: Allowance) -> Batch:
    """The next batch of a search that is not over."""
    batch = searcher.ask(allowance)
    assert batch is not None
    return batch
