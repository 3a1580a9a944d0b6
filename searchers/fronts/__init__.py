"""Searchers over a whole range of budgets."""
