"""Measurements of this project, one command each."""
