"""Datasets by name, as uint8 tensors; `augment` and `batches` turn them into training and evaluation batches."""

from vitfn.data.dataset import DATASETS, Dataset, Split, load

__all__ = ["DATASETS", "Dataset", "Split", "load"]
