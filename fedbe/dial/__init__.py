"""The dial of a finished run."""
