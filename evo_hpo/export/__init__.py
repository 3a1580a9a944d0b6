"""What the user takes away: the winning profile as a model that runs."""
