"""The base model and its architecture: blocks, passes, freezing, verification."""
