"""Golden values, speed, size and held-out perplexity of the compressors."""
