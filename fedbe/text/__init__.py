"""Text as token ids: tokenised, stored, packed into sequences, sampled from a model, and drawn to compare models on.

`tokens` asks tokenizers and configurations, `ragged` stores sequences of different lengths, `packing` fills sequences
with documents, `sampling` lets a model write, and `reference` provides text that belongs to no client.
"""
