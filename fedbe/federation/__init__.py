"""Rounds over clients: the loop, a round, the server, the hooks, and who takes part."""
