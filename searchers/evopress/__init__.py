"""EvoPress: mutation, selection, starts, published presets."""
