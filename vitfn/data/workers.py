"""Files decoded and cropped one by one, in worker processes ahead of their use or in this process."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from vitfn.data.images import decode
from vitfn.errors import InputError

Crop = Callable[[Tensor, Tensor], Tensor]  # images (B, C, H, W) uint8 and keys (B,) -> (B, C, h, w) float32
Items = list[tuple[str, int]]  # of a batch: each file's path and key
Decoded = tuple[Tensor, dict[int, InputError]]  # (B, C, h, w) float32, and what is wrong with those that stayed black


class Decoder(TorchDataset):
    """Files to pixels, a batch at a time: all that a worker holds. It must be picklable, and so must `crop`."""

    def __init__(self, channels: int, crop: Crop):
        self.channels, self.crop = channels, crop

    def __getitem__(self, items: Items) -> Decoded:
        pixels, bad = [], {}
        with _one_thread():
            for place, (path, key) in enumerate(items):
                try:
                    image = decode(path, self.channels)
                except InputError as error:  # as a value: one that a worker raised would arrive as a traceback
                    image, bad[place] = torch.zeros(self.channels, 32, 32, dtype=torch.uint8), error
                pixels.append(self.crop(image[None], torch.tensor([key])))  # (1, C, h, w)
        return torch.cat(pixels), bad


def read(decoder: Decoder, batches: Iterable[Items], workers: int, pin_memory: bool) -> Generator[Decoded, None, None]:
    """The batches decoded, in order, by so many processes, which end when the generator is closed or dropped."""
    context = None
    if workers:
        # Forked from a server that has imported torch once: 0.1 s for two workers, where spawning takes 6.
        forking = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
        context = multiprocessing.get_context("forkserver" if forking else "spawn")
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        decoder,
        batch_size=None,  # an item is a batch
        sampler=batches,
        num_workers=workers,
        worker_init_fn=_deafen,
        multiprocessing_context=context,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else iter() draws from torch's own
    )
    with _deaf_to_signals():
        decoded = iter(loader)
    yield from decoded


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: with more threads some resizing is rounded differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _deafen(worker: int) -> None:
    """In a worker, whose server a program may have started for itself before, with open ears."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


@contextlib.contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Processes whose server is started in here never see SIGINT and SIGTERM; this one sees them a little later.

    A terminal and a scheduler send them to all processes of a run, and the run's own decides what to do.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where a scheduler has no signals
        yield
        return
    resource_tracker.ensure_running()  # or its start, in here, would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
