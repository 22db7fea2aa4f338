"""Trained DINOv2 weights on two photographs: tokens of the owner's own class, by ONNX Runtime and transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import REFERENCE, SHARED

import vitfn
from vitfn import convert, weights
from vitfn.adapt import resize_positions
from vitfn.data.augment import normalise

FILE, EXPECTED = SHARED / "data/dinov2_s14/model.safetensors", SHARED / "reference/dinov2_s14.expected.npz"
trained = pytest.mark.skipif(not FILE.exists(), reason="needs ../shared: 88 MB of trained weights")


def encoded(path, size: int) -> torch.Tensor:
    """The last tokens of the two photographs (2, N, D)."""
    config = dataclasses.replace(weights.describe(path).config, image_size=size)
    with np.load(EXPECTED) as file:
        images = torch.from_numpy(file[f"images_{size}"])
    with torch.no_grad():
        _, found = vitfn.apply(vitfn.load(path, config), normalise(images, config), config, capture="encoded")
    return found["encoded"]


def error(found: torch.Tensor, name: str) -> float:
    with np.load(EXPECTED) as file:
        expected = torch.from_numpy(file[name])
    return float((found - expected).norm() / expected.norm())


@trained
@pytest.mark.parametrize("written", ["", "model.npz", "model.safetensors"])
def test_tokens_at_another_size_are_the_owner_s_also_after_a_conversion(tmp_path, capsys, written):
    path = FILE
    if written:
        path = tmp_path / written
        assert convert.main(["convert", str(FILE), str(path)]) == 0
        assert "this model has positions resized by bicubic, " in capsys.readouterr().out
    assert error(encoded(path, 224), "tokens_224") < 5e-6  # 5.7e-2 with Google's corner-aligned bilinear


@trained
@pytest.mark.slow
def test_the_class_token_at_its_own_size():
    assert error(encoded(FILE, 518)[:, 0], "class_token_518") < 5e-6


@trained
def test_a_stated_method_wins():
    config = dataclasses.replace(weights.describe(FILE).config, image_size=224, posemb_resize="bilinear_corners")
    owner = dataclasses.replace(config, posemb_resize=None)
    found, expected = (
        vitfn.load(FILE, one)["Transformer"]["posembed_input"]["pos_embedding"] for one in (config, owner)
    )
    assert float((found - expected).norm() / expected.norm()) > 0.01


@pytest.mark.parametrize("grid", [(4, 7), (8, 3), (10, 10), (2, 2), (5, 4)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_meta_s_own_code_resizes_by_a_scale_factor(grid):
    """tests/reference/meta_positions.npz: what interpolate_pos_encoding of facebookresearch/dinov2 makes of positions.

    Run once beside vitfn: its DinoVisionTransformer of 4 blocks, whole and in chunks, at these sizes, and vitfn's
    reading of its state dict differ by at most 8e-7.
    """
    with np.load(REFERENCE / "meta_positions.npz") as file:
        positions, expected = (torch.from_numpy(file[name]) for name in ("positions", f"{grid[0]}x{grid[1]}"))
    found = resize_positions(positions, (5, 5), grid, "bicubic_offset")
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)  # of numbers of N(0, 1)
