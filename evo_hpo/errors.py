"""Every error that this project raises on purpose.

    EvoHpoError
    ├── InvalidSpaceError (ValueError)       a space, unit or level that makes no sense
    ├── InfeasibleError (ValueError)         a budget that no assignment can meet, or an assignment outside it
    ├── UnknownNameError (KeyError)          a searcher, problem or setting that is not registered
    ├── InvalidSettingError (ValueError)     a setting outside its allowed range
    ├── PlanError (ValueError)               a plan file that cannot be used
    ├── BudgetError (ValueError)             a search budget that cannot pay for what is asked
    ├── ModelError (ValueError)              a model that is missing or unsupported
    ├── TextError (ValueError)               calibration or held-out text that is missing or too short
    ├── StoreError (ValueError)              a level store that is missing, damaged or of another model
    ├── JournalError (ValueError)            a journal that does not belong to this search
    ├── TrackingError (RuntimeError)         a tracking store that cannot be used
    │   └── RefusedError                     what a store will not take, however often it is asked
    ├── ScorersError (RuntimeError)          a cluster that cannot be used
    └── MissingPackageError (ImportError)    an optional package that is not installed

A message gives the value found, the allowed range, and what to do, in one line.
"""

from __future__ import annotations


class EvoHpoError(Exception):
    """Base of every error that this project raises on purpose.

    ``exit_code`` is the command's: 2 where something must be mended by who typed it, 1 where that is not known.
    """

    exit_code = 2


class InvalidSpaceError(EvoHpoError, ValueError):
    """A space, unit or level that makes no sense."""


class InfeasibleError(EvoHpoError, ValueError):
    """A budget that no assignment can meet, or an assignment that does not meet it."""


class UnknownNameError(EvoHpoError, KeyError):
    """A name that is not registered; the message lists near matches."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0])


class InvalidSettingError(EvoHpoError, ValueError):
    """A setting outside its allowed range."""


class PlanError(EvoHpoError, ValueError):
    """A plan file that cannot be used."""


class BudgetError(EvoHpoError, ValueError):
    """A search budget that cannot pay for what is asked of it."""


class ModelError(EvoHpoError, ValueError):
    """A model that is missing or unsupported."""


class TextError(EvoHpoError, ValueError):
    """Calibration or held-out text that is missing or too short."""


class StoreError(EvoHpoError, ValueError):
    """A level store that is missing, damaged or of another model."""


class JournalError(EvoHpoError, ValueError):
    """A journal that does not belong to this search."""


class TrackingError(EvoHpoError, RuntimeError):
    """A tracking store that cannot be used."""


class RefusedError(TrackingError):
    """What a tracking store will not take, however often it is asked; it may take everything else."""


class ScorersError(EvoHpoError, RuntimeError):
    """A cluster that cannot be used, or has no scorer left."""


class MissingPackageError(EvoHpoError, ImportError):
    """An optional package that is not installed."""
