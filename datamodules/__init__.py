"""Federated data modules, partitioners, and the report of who gets what."""

from fedbe.datamodules.causal_lm import CausalLMDataModule
from fedbe.datamodules.classification import LabelledDataModule, SequenceClassificationDataModule
from fedbe.datamodules.corpus import CorpusDataModule
from fedbe.datamodules.flipped import FlippedLabels
from fedbe.datamodules.flower import FlowerAdapter, FlowerPartitioner
from fedbe.datamodules.image import ImageClassificationDataModule
from fedbe.datamodules.instruction import InstructionDataModule
from fedbe.datamodules.partition import (
    DirichletPartitioner,
    IIDPartitioner,
    NaturalPartitioner,
    Partitioner,
    QuantityPartitioner,
    SizesPartitioner,
)
from fedbe.datamodules.report import ClientShare, describe_partition
from fedbe.datamodules.separation import family_separates_documents, separates_documents

__all__ = [
    "CausalLMDataModule",
    "ClientShare",
    "CorpusDataModule",
    "DirichletPartitioner",
    "FlippedLabels",
    "FlowerAdapter",
    "FlowerPartitioner",
    "IIDPartitioner",
    "ImageClassificationDataModule",
    "InstructionDataModule",
    "LabelledDataModule",
    "NaturalPartitioner",
    "Partitioner",
    "QuantityPartitioner",
    "SequenceClassificationDataModule",
    "SizesPartitioner",
    "describe_partition",
    "family_separates_documents",
    "separates_documents",
]
