"""Measured: our searchers beside the best encoded ones of other libraries, on synthetic problems; their overhead."""
