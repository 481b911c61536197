"""Where a registry keeps its records: memory or a file, and how they lie in it."""
