"""Who chooses and who pays: problems, searchers, budgets, and the one loop between them."""
