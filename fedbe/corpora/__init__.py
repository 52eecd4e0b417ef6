"""Where text comes from: documentation and headers of the installation, files, the Hub, saved data sets."""

from fedbe.corpora.base import SPLITS, Corpus, Described, split_of
from fedbe.corpora.documentation import InstalledDocumentation
from fedbe.corpora.files import FilesCorpus, HubCorpus, SavedCorpus
from fedbe.corpora.headers import TorchHeaders
from fedbe.corpora.passages import Passages

__all__ = [
    "SPLITS",
    "Corpus",
    "Described",
    "FilesCorpus",
    "HubCorpus",
    "InstalledDocumentation",
    "Passages",
    "SavedCorpus",
    "TorchHeaders",
    "split_of",
]
