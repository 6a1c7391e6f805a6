"""A world with habits: what things look like depends on the place that the question names (docs/does-it-help.md)."""
