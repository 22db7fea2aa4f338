"""What makes up a batch, and batches of images in memory and of files: the same whoever decodes them."""

import functools
import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vitfn.data import Files, Split
from vitfn.data.augment import sample_keys
from vitfn.data.batches import batch_indices, evaluation_batches, padded_batches, training_batches
from vitfn.data.crops import random_resized_crop, resize
from vitfn.data.images import decode
from vitfn.errors import InputError

SIZE = (24, 20)


def crop(images: Tensor, keys: Tensor) -> Tensor:
    return random_resized_crop(images, SIZE, keys, 0.2, flip=True)


fit = functools.partial(resize, size=SIZE)
TRAIN = {"batch_size": 6, "seed": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """20 images of sizes of their own, 0.png to 19.png, and bad.png that is none."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 256, (*random.integers(30, 200, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    (root / "bad.png").write_bytes((root / "0.png").read_bytes()[:500])
    return root


def files(folder: Path, *bad: int) -> Files:
    """Labels count the images, of which some can be bad."""
    return Files(tuple(str(folder / f"{'bad' if i in bad else i}.png") for i in range(20)), torch.arange(20), 3)


def same(a, b) -> bool:
    pairs = (pair for one, two in zip(a, b, strict=True) for pair in zip(one, two, strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


# --- which images


@given(st.data(), st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_every_epoch_has_each_image_once(data, length, seed):
    """Batches of any size up to the whole set, laid end to end: each `length` of them is a permutation."""
    size = data.draw(st.integers(1, length))
    steps = -(-3 * length // size)
    order = torch.cat([batch_indices(length, size, seed, step) for step in range(steps)])
    assert len(order) == steps * size
    for epoch in order[: 3 * length].split(length):
        assert sorted(epoch.tolist()) == list(range(length))


def test_batches_run_across_the_end_of_an_epoch():
    order = torch.cat([batch_indices(10, 10, 0, epoch) for epoch in range(2)])
    assert torch.equal(batch_indices(10, 4, 0, 2), order[8:12])


def test_a_batch_is_a_function_of_seed_and_step():
    """Whatever was asked for before it."""
    steps = list(range(12))
    forward = [batch_indices(50, 16, 5, step).tolist() for step in steps]
    backward = [batch_indices(50, 16, 5, step).tolist() for step in reversed(steps)]
    assert forward == backward[::-1]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(batch_indices(50, 50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(50)) not in orders


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 40))
def test_padded_batches_have_every_image_once_in_one_shape(length, size):
    split = Split(
        torch.arange(1, length + 1).to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 3, 2, 2), torch.arange(length)
    )
    batches = list(padded_batches(split, size))
    assert len(batches) == -(-length // size)
    assert {batch.images.shape for batch in batches} == {(size, 3, 2, 2)}
    assert {batch.labels.shape for batch in batches} == {(size,)}
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(images[:length], split.images)
    assert torch.equal(labels[:length], split.labels)
    assert (labels[length:] == -1).all()
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


# --- training


def test_images_in_memory_are_cropped_under_their_keys():
    split = Split(torch.arange(10 * 3 * 32 * 32).reshape(10, 3, 32, 32).to(torch.uint8), torch.arange(10))
    batches = list(training_batches(split, crop, start=2, stop=5, **TRAIN))
    assert len(batches) == 3
    for step, (images, labels) in enumerate(batches, 2):
        index = batch_indices(10, 6, 3, step)
        assert torch.equal(labels, index)
        assert torch.equal(images, crop(split.images[index], sample_keys(3, step, torch.arange(6))))


def test_files_are_decoded_and_cropped_under_their_keys(folder):
    split = files(folder)
    [(images, labels)] = training_batches(split, crop, start=7, stop=8, **TRAIN)
    assert (images.shape, images.dtype) == ((6, 3, *SIZE), torch.float32)
    assert torch.equal(labels, batch_indices(20, 6, 3, 7))
    keys = sample_keys(3, 7, torch.arange(6))
    for image, i, key in zip(images, labels, keys, strict=True):
        want = crop(decode(split.paths[i], 3)[None], key[None])[0]
        torch.testing.assert_close(image, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_share_of_the_places_is_those_images_of_the_batch(folder, in_memory):
    """Whoever reads only a part of a batch gets the whole's bits, labels included, across an epoch's end too."""
    split = Split(torch.arange(20 * 3 * 9 * 9).view(20, 3, 9, 9).to(torch.uint8), torch.arange(20))
    split, places = split if in_memory else files(folder, 4), torch.tensor([5, 0, 1])
    batch = TRAIN | {"start": 2, "stop": 6, "on_bad": "skip"}
    whole = list(training_batches(split, crop, **batch))
    share = list(training_batches(split, crop, **batch, places=places))
    assert same(share, [(images[places], labels[places]) for images, labels in whole])


def test_a_share_reads_the_files_of_its_places_and_no_other(folder, monkeypatch):
    read = []
    monkeypatch.setattr("vitfn.data.workers.decode", lambda path, channels: read.append(path) or decode(path, channels))
    split, places = files(folder), torch.tensor([2, 3])
    list(training_batches(split, crop, **TRAIN, start=2, stop=6, places=places))
    wanted = [batch_indices(20, 6, 3, step)[places].tolist() for step in range(2, 6)]
    assert read == [split.paths[i] for step in wanted for i in step]


def test_batches_are_the_same_bits_from_any_number_of_processes_and_after_a_restart(folder):
    """Across the end of an epoch, bad files included."""
    split = files(folder, 4, 5, 11)
    want = list(training_batches(split, crop, start=0, stop=8, on_bad="skip", **TRAIN))
    assert len(want) == 8
    for workers in (1, 2):
        assert same(list(training_batches(split, crop, start=0, stop=8, workers=workers, on_bad="skip", **TRAIN)), want)
    for workers in (0, 2):
        rest = list(training_batches(split, crop, start=5, stop=8, workers=workers, on_bad="skip", **TRAIN))
        assert same(rest, want[5:])


def test_the_bits_do_not_depend_on_this_process_s_threads(folder):
    threads, large = torch.get_num_threads(), functools.partial(resize, size=(224, 224))
    batches = []
    for count in (1, 2):
        torch.set_num_threads(count)
        batches.append(list(evaluation_batches(files(folder), large, batch_size=6, device="cpu")))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert same(*batches)


def test_torch_s_generator_is_not_touched(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(training_batches(files(folder), crop, start=0, stop=2, workers=1, **TRAIN))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_labels_stay_rows(folder):
    split = files(folder)._replace(labels=torch.eye(20))
    [(_, labels)] = training_batches(split, crop, start=0, stop=1, **TRAIN)
    assert torch.equal(labels, torch.eye(20)[batch_indices(20, 6, 3, 0)])


# --- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_every_file_once_in_order(folder, workers):
    split = files(folder)
    batches = list(evaluation_batches(split, fit, batch_size=6, device="cpu", workers=workers))
    assert [images.shape for images, _ in batches] == [(6, 3, *SIZE)] * 4
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [*range(20), -1, -1, -1, -1]
    for image, path in zip(images, split.paths, strict=False):
        torch.testing.assert_close(image, fit(decode(path, 3)[None])[0], rtol=0, atol=1e-3)
    assert not images[20:].any()


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_pads_memory_and_files_alike(folder, several):
    labels = torch.eye(20)[:10] if several else torch.arange(10)
    in_memory = Split(torch.ones(10, 3, 32, 32, dtype=torch.uint8), labels)
    on_disk = Files(files(folder).paths[:10], labels, 3)
    for split in (in_memory, on_disk):
        *_, (images, found) = evaluation_batches(split, fit, batch_size=7, device="cpu")
        assert images.shape == (7, 3, *SIZE)
        assert not images[3:].any()
        assert torch.equal(found[:3], labels[7:])
        assert (found[3:] == -1).all()
        assert found.shape[1:] == labels.shape[1:]


# --- files that are no images


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_fails_in_one_line_that_names_it(folder, workers):
    split = files(folder, 13)
    for batches in (
        training_batches(split, crop, start=0, stop=4, workers=workers, **TRAIN),
        evaluation_batches(split, fit, batch_size=6, device="cpu", workers=workers),
    ):
        with pytest.raises(InputError, match=r"bad\.png: found a damaged file") as caught:
            list(batches)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert not multiprocessing.active_children()  # while the error still holds all frames


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_good_file_takes_a_bad_one_s_place(folder, workers, caplog):
    good, split = files(folder), files(folder, 0, 18, 19)
    batches = list(training_batches(split, crop, start=0, stop=10, workers=workers, on_bad="skip", **TRAIN))
    stand_in = {0: 1, 18: 1, 19: 1}  # round the end
    for step, (images, labels) in enumerate(batches):
        index = [stand_in.get(i, i) for i in batch_indices(20, 6, 3, step).tolist()]
        assert labels.tolist() == index
        for image, i, key in zip(images, index, sample_keys(3, step, torch.arange(6)), strict=True):
            want = crop(decode(good.paths[i], 3)[None], key[None])[0]
            torch.testing.assert_close(image, want, rtol=0, atol=1e-3)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(folder / "bad.png")]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_files_out(folder, workers, caplog):
    split = files(folder, 2, 6, 7, 8)
    batches = list(evaluation_batches(split, fit, batch_size=3, device="cpu", workers=workers, on_bad="skip"))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [0, 1, -1, 3, 4, 5, -1, -1, -1, *range(9, 20), -1]
    assert not images[labels == -1].any()
    assert images[labels != -1].flatten(1).any(1).all()
    assert len(caplog.records) == 1
    assert split.labels.tolist() == list(range(20))  # as they were


def test_a_bad_file_of_many_labels_is_a_row_of_minus_one(folder):
    split = files(folder, 2)._replace(labels=torch.eye(20))
    labels = torch.cat([x for _, x in evaluation_batches(split, fit, batch_size=5, device="cpu", on_bad="skip")])
    assert (labels[2] == -1).all()
    assert torch.equal(labels[3:], torch.eye(20)[3:])


def test_a_dataset_without_any_image_is_refused(folder):
    with pytest.raises(InputError, match="no image that can be read among 20 files"):
        list(training_batches(files(folder, *range(20)), crop, start=0, stop=1, on_bad="skip", **TRAIN))


# --- processes


def children() -> list[int]:
    gc.collect()
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def test_workers_end_with_the_iterator(folder):
    assert not children()
    batches = training_batches(files(folder), crop, start=0, stop=1000, workers=2, **TRAIN)
    next(batches)
    assert len(children()) == 2
    del batches
    assert not children()


def test_workers_are_deaf_to_interrupts(folder):
    """The terminal sends a Ctrl-C to all processes."""
    batches = evaluation_batches(files(folder), fit, batch_size=2, device="cpu", workers=2)
    found = [next(batches), next(batches)]  # one of each
    for pid in children():
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    found += batches
    assert [int(x) for _, labels in found for x in labels] == list(range(20))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


SERVER_OF_ITS_OWN = """if __name__ == "__main__":
    import multiprocessing, os, signal, sys
    from pathlib import Path
    from test_batches import evaluation_batches, files, fit

    process = multiprocessing.get_context("forkserver").Process(target=print)
    process.start()
    process.join()
    batches = evaluation_batches(files(Path(sys.argv[1])), fit, batch_size=2, device="cpu", workers=2)
    found = [next(batches), next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    print(len([*found, *batches]))
"""


def test_workers_are_deaf_in_a_program_that_has_started_their_server_before(folder):
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    done = warm.run(["-c", SERVER_OF_ITS_OWN, folder], env=os.environ | {"PYTHONPATH": paths})
    assert (done.returncode, done.stdout.split()) == (0, ["10"]), done.stderr
