"""Which of Nevergrad's optimizers cannot work here, and why: found by running each, see ``nevergrad_sweep.py``."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

_PACKAGES: dict[str, tuple[str, ...]] = {
    "ax": ("AX", "AXP"),
    "bayes_optim": ("BayesOptimBO", "PCABO", "PCABO80", "PCABO95DoE20"),
    "fcmaes": ("FCMA", "FCMAp13", "FCMAs03"),
    "nlopt": tuple(
        f"NLOPT_{name}"
        for name in (
            *("GN_AGS", "GN_CRS2_LM", "GN_DIRECT", "GN_DIRECT_L", "GN_ESCH", "GN_ISRES", "LN_BOBYQA", "LN_COBYLA"),
            *("LN_NELDERMEAD", "LN_NEWUOA_BOUND", "LN_PRAXIS", "LN_SBPLX"),
        )
    ),
    "pybobyqa": ("BOBYQA",),
    "pymoo": ("PymooBIPOP", "PymooCMAES", "PymooNSGA2"),
    "pySOT": ("pysot",),
    "smac": ("SMAC3",),
}
"""Optimizers by the optional package that they are a front of."""

_CLOCK = ("Carola8", "Carola9", "Carola10", "Carola13", "CmaFmin2", "MetaModelFmin2")
"""Their solver seeds itself from the clock, whatever seed it is given."""

_IMPORT = ("PolyLN",)
"""Their settings are drawn from numpy's unseeded generator when the library is imported."""

_SURROGATES = ("MetaModel", "MetaNGOpt", "CMAILL")
"""Part of the names of optimizers with a surrogate model: it makes a number of an array of one element, which numpy
refuses since 2.4. Those that ask their model late fail late, so none of them is let in."""

_NEEDS = {name: package for package, names in _PACKAGES.items() for name in names}


def why_not(name: str) -> str:
    """Why an optimizer cannot be used in this environment; empty: it can."""
    package = _NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        return f"it needs the package {package}, which is not installed"
    if name in _CLOCK:
        return "its solver seeds itself from the clock, so no search could be repeated or resumed"
    if name in _IMPORT:
        return "its settings are drawn anew in every process, so no search could be repeated or resumed"
    if any(part in name for part in _SURROGATES) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"its surrogate model fails on numpy {np.__version__} (it needs numpy before 2.4)"
    return ""
