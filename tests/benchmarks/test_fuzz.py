"""What nobody should write: plans, profiles and texts end in exit code 0, or 2 and one line."""

from __future__ import annotations

import pytest

from benchmarks.measurements.fuzz import fuzz


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("plans", 60), ("profiles", 60), ("texts", 100), ("searches", 8), ("models", 4), ("commands", 12)],
)
def test_no_case_ends_in_a_traceback(kind: str, cases: int) -> None:
    codes = fuzz(kind, cases)
    assert sum(codes.values()) >= cases
    assert set(codes) == {0, 2}  # what is right still passes
