"""Where rows come from: documentation and headers of the installation, files, pictures, the Hub, saved data sets."""

from fedbe.corpora.base import SPLITS, Corpus, Described, split_of
from fedbe.corpora.documentation import InstalledDocumentation
from fedbe.corpora.files import FilesCorpus, HubCorpus, SavedCorpus
from fedbe.corpora.headers import TorchHeaders
from fedbe.corpora.passages import Passages
from fedbe.corpora.pictures import ImageFolder

__all__ = [
    "SPLITS",
    "Corpus",
    "Described",
    "FilesCorpus",
    "HubCorpus",
    "ImageFolder",
    "InstalledDocumentation",
    "Passages",
    "SavedCorpus",
    "TorchHeaders",
    "split_of",
]
