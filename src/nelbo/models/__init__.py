"""Models built from a configuration and a schema, and their conditions."""
