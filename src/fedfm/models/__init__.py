"""Models and tokenizers, from the Hub, from folders and files, or embedded in packages."""

from fedfm.models.architectures import Architecture, HeadSplit, architecture
from fedfm.models.embedded import EMBEDDED
from fedfm.models.load import Head, Loaded, load

__all__ = ["EMBEDDED", "Architecture", "Head", "HeadSplit", "Loaded", "architecture", "load"]
