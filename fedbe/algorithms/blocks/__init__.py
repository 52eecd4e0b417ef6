"""Algorithms that train blocks."""
