"""Compressors, the calibration pass, and the level store."""

from evo_hpo.levels.joining import joined
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.levels import Levels
from evo_hpo.levels.store import LevelStore, open_store

__all__ = ["LevelSet", "LevelStore", "Levels", "joined", "open_store"]
