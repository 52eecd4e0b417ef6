"""A run's configuration: sections, parsing, rules, and how a run is built from it."""
