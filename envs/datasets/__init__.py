"""Offline data: one reader per file format, all giving the same `OfflineDataset`, behind one door, `load_dataset`."""

from .dataset import DatasetError, OfflineDataset
from .load import list_datasets, load_dataset

__all__ = ["DatasetError", "OfflineDataset", "list_datasets", "load_dataset"]
