"""Causal language models: loading, structure, text, evaluation."""
