"""What nobody should write: plans, profiles and texts end in exit code 0, or 2 and one line."""

from __future__ import annotations

import pytest

from benchmarks.measurements.fuzz import KINDS, fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_no_case_ends_in_a_traceback(kind: str) -> None:
    codes = fuzz(kind, 100)
    assert sum(codes.values()) >= 100
    assert set(codes) == {0, 2}  # what is right still passes
