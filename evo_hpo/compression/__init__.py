"""Compressors, the calibration pass, and the level store."""

from evo_hpo.compression.level_set import LevelSet, joined
from evo_hpo.compression.levels import Levels
from evo_hpo.compression.store import LevelStore, open_store

__all__ = ["LevelSet", "LevelStore", "Levels", "joined", "open_store"]
