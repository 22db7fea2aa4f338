"""Which images make up a batch: a function of (seed, step) alone."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from vitfn import rng
from vitfn.data.dataset import Split


@functools.lru_cache(maxsize=2)
def _epoch(length: int, seed: int, epoch: int) -> Tensor:
    return rng.permutation(length, rng.fold_in(rng.stream(seed, "order"), epoch))


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The indices (batch_size,) of step `step`: every epoch is a permutation of its own, batches run across its end."""
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // length, places[-1] // length + 1)
    order = torch.cat([_epoch(length, seed, epoch) for epoch in epochs])
    start = places[0] - epochs[0] * length
    return order[start : start + batch_size]


def padded_batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Every image once, in order, in batches of one size: the last is filled up with empty images labelled -1."""
    for start in range(0, len(split.labels), batch_size):
        images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
            labels = torch.cat([labels, labels.new_full((missing,), -1)])
        yield Split(images, labels)
