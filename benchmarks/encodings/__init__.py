"""Measured: which encodings suit which optimizer, and which of Nevergrad's optimizers work here at all."""
