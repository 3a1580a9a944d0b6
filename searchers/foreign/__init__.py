"""Optuna's samplers and Nevergrad's optimizers as searchers of compression spaces."""
