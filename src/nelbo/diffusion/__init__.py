"""The mathematics: processes, parametrizations, kernels, decoders and the terms of the bound."""
