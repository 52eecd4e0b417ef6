"""Where text comes from: documentation and headers of the installation, files, the Hub, saved data sets."""

from fedbe.corpora.base import SPLITS, Corpus, Described, split_of
from fedbe.corpora.documentation import InstalledDocumentation
from fedbe.corpora.files import FilesCorpus, HubCorpus, SavedCorpus
from fedbe.corpora.headers import TorchHeaders

__all__ = [
    "SPLITS",
    "Corpus",
    "Described",
    "FilesCorpus",
    "HubCorpus",
    "InstalledDocumentation",
    "SavedCorpus",
    "TorchHeaders",
    "split_of",
]
