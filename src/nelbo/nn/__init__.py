"""Neural networks, which return tensors and know no probabilities."""
