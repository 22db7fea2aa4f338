"""Sound files are read every time: threads share nothing that a Python's zipfile, or another reader, cannot bear."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vitfn
from vitfn import tree

CONFIG = vitfn.get_config("Ti/16", num_layers=6, image_size=64, num_classes=10, classifier="gap")
FORMATS = ["stored.npz", "compressed.npz", "stacked.npz", "model.safetensors", "model.pth", "legacy.pth"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, params = tmp_path_factory.mktemp("loads"), vitfn.init(CONFIG)
    vitfn.save(folder / "stored.npz", params, CONFIG)
    vitfn.save(folder / "stacked.npz", params, CONFIG, layout="big_vision_scan")
    vitfn.save(folder / "model.safetensors", params, CONFIG)
    arrays = {path: leaf.numpy() for path, leaf in tree.flatten(params).items()}
    np.savez_compressed(folder / "compressed.npz", **arrays)
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    torch.save(load_file(folder / "model.safetensors"), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_sound_file_is_read_thirty_times_of_thirty(folder, name):
    expected = tree.flatten(vitfn.load(folder / "stored.npz", CONFIG))
    for _ in range(30):
        found = tree.flatten(vitfn.load(folder / name, CONFIG))
        assert all(torch.equal(leaf, found[path]) for path, leaf in expected.items())
