"""What the framework asks of data: one training set per client, and validation and test sets of the downstream task."""

from fedbe.data.batch import IGNORED, Batch, pad_samples
from fedbe.data.left_out import LeftOut, left_out_counts, left_out_lines
from fedbe.data.module import DataWrapper, FederatedDataModule, by_length, pad_token_id
from fedbe.data.pooled import PooledData

__all__ = [
    "IGNORED",
    "Batch",
    "DataWrapper",
    "FederatedDataModule",
    "LeftOut",
    "PooledData",
    "by_length",
    "left_out_counts",
    "left_out_lines",
    "pad_samples",
    "pad_token_id",
]
