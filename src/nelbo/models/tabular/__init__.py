"""The parts of a model for the columns of a table."""
