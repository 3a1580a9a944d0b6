"""Timings and memory, each with one command."""
