"""Algorithms that train low-rank adapters."""
