"""Which images make up a batch, a function of (seed, step) alone; and the batches themselves."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import Tensor

from vitfn import rng
from vitfn.data.augment import sample_keys
from vitfn.data.dataset import Files, Split
from vitfn.data.workers import Crop, Decoder, Items, read
from vitfn.device import row_of
from vitfn.errors import InputError

Fit = Callable[[Tensor], Tensor]  # images (B, C, H, W) uint8 -> (B, C, h, w) float32


@functools.lru_cache(maxsize=2)
def _epoch(length: int, seed: int, epoch: int) -> Tensor:
    return rng.permutation(length, rng.fold_in(rng.stream(seed, "order"), epoch))


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The indices (batch_size,) of step `step`: every epoch is a permutation of its own, batches run across its end."""
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // length, (stop - 1) // length + 1)
    # parts of epochs, not a part of whole ones: a dataset may have millions of images
    parts = [_epoch(length, seed, e)[max(start - e * length, 0) : stop - e * length] for e in epochs]
    return torch.cat(parts)


def padded_batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Every image once, in order, in batches of one size: the last is filled up with empty images labelled -1."""
    for start in range(0, split.size, batch_size):
        yield _padded(split.images[start : start + batch_size], split.labels[start : start + batch_size], batch_size)


def _padded(images: Tensor, labels: Tensor, batch_size: int) -> Split:
    missing = batch_size - len(labels)
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        labels = torch.cat([labels, labels.new_full((missing, *labels.shape[1:]), -1)])
    return Split(images, labels)


def training_batches(
    split: Split | Files,
    crop: Crop,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    device: torch.device | str,
    places: Tensor | None = None,
    workers: int = 0,
    on_bad: str = "fail",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, h, w) float32, 0 to 255, and labels (B,) or (B, K), on `device`, of steps `start` to `stop` - 1.

    Each batch is a function of (seed, step); with `places` (P,) only the images at these are read, in this order.
    Images in memory are cropped at once on the device; files are decoded and cropped one by one, in `workers` processes
    or, with 0, in this one, to the same bits; `crop` must be picklable. A file that is no image raises InputError under
    on_bad='fail'; under 'skip' the next good one of the dataset takes its place, and it is warned of once.
    """
    labels, places = split.labels.to(device), torch.arange(batch_size) if places is None else places

    def indices(step: int) -> Tensor:
        return batch_indices(split.size, batch_size, seed, step)[places]

    if isinstance(split, Split):
        images, there = split.images.to(device), places.to(device)
        for step in range(start, stop):
            index = indices(step).to(device, non_blocking=True)
            yield crop(images[index], sample_keys(seed, step, there)), labels[index]
        return

    def items(step: int) -> Items:
        keys = sample_keys(seed, step, places)
        return [(split.paths[i], key) for i, key in zip(indices(step).tolist(), keys.tolist(), strict=True)]

    decoder, warned = Decoder(split.channels, crop), set[str]()
    with closing(read(decoder, map(items, range(start, stop)), workers, row_of(torch.device(device)).pins)) as decoded:
        for step, (pixels, bad) in zip(range(start, stop), decoded, strict=True):
            index = indices(step)
            for place, error in bad.items():
                _report(error, on_bad, warned)
                key = int(sample_keys(seed, step, places)[place])
                index[place], pixels[place] = _next_good(split, int(index[place]), key, decoder, warned)
            yield pixels.to(device, non_blocking=True), labels[index.to(device, non_blocking=True)]


def evaluation_batches(
    split: Split | Files,
    fit: Fit,
    *,
    batch_size: int,
    device: torch.device | str,
    workers: int = 0,
    on_bad: str = "fail",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order: (B, C, h, w) float32, 0 to 255, and labels (B,) or (B, K), on `device`.

    All batches are of one size: the last is filled up with zeros, labelled -1 (a whole row of them where labels are
    rows). Files are decoded as by `training_batches`; under on_bad='skip' one that is no image is such padding too.
    """
    if isinstance(split, Split):
        for images, labels in padded_batches(split, batch_size):
            yield fit(images.to(device)), labels.to(device)
        return
    starts = range(0, split.size, batch_size)
    items = ([(path, 0) for path in split.paths[start : start + batch_size]] for start in starts)
    decoder, warned = Decoder(split.channels, functools.partial(_without_keys, fit)), set[str]()
    with closing(read(decoder, items, workers, row_of(torch.device(device)).pins)) as decoded:
        for start, (pixels, bad) in zip(starts, decoded, strict=True):
            labels = split.labels[start : start + batch_size].clone()
            for place, error in bad.items():
                _report(error, on_bad, warned)
                labels[place] = -1
            pixels, labels = _padded(pixels, labels, batch_size)
            yield pixels.to(device, non_blocking=True), labels.to(device)


def _without_keys(fit: Fit, images: Tensor, keys: Tensor) -> Tensor:
    return fit(images)


def _report(error: InputError, on_bad: str, warned: set[str]) -> None:
    if on_bad == "fail":
        raise error
    if str(error) not in warned:
        warned.add(str(error))
        logging.getLogger("vitfn").warning("%s; it is left out", error)


def _next_good(split: Files, index: int, key: int, decoder: Decoder, warned: set[str]) -> tuple[int, Tensor]:
    """The next file that is an image, round the end of the dataset, and its pixels (C, h, w)."""
    for i in (*range(index + 1, split.size), *range(index)):
        pixels, bad = decoder[[(split.paths[i], key)]]
        if not bad:
            return i, pixels[0]
        _report(bad[0], "skip", warned)
    raise InputError(f"--data_dir: found no image that can be read among {split.size:,} files, expected at least one")
