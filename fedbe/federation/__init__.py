"""Rounds over clients: the loop, a round, the hooks, and who takes part."""
