"""Measurements of the framework itself, run by ``fedbe bench``."""
