"""Bounds of data sets, with errors: strata, control variates, samples, flows and scores."""
