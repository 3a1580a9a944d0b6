"""Problems that a plan can name: synthetic, recorded from a real model, and SmolLM2."""
