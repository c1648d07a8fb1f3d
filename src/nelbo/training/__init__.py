"""Training of a model in memory: objective, optimiser, batches, presets."""
