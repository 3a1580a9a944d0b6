"""EvoPress inside ordinary Optuna studies and Nevergrad parametrizations."""
