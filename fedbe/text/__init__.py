"""Tokens, packing and sampling of text."""
