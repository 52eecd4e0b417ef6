"""What is added to a model and trained: blocks, adapters, a gate, the whole model, and stacks of them."""
