"""What may be chosen: units, their levels' exact costs, and the assignments that the budget allows."""
