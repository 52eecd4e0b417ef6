"""Controls: local training only, and pooled data."""
