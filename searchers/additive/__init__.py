"""Searchers that fit an additive model of the loss and solve it exactly."""
