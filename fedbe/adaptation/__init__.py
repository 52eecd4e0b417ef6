"""What is added to a model."""
