"""Training the small base model that comes with fedbe."""
