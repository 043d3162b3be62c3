"""The version, for package metadata and the files that mmrl writes."""

__version__ = "0.1.0"
