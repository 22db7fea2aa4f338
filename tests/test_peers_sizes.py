"""Files at another image size: what the owner's own class computes there, and what vitfn makes of the same file."""

import dataclasses
import functools

import pytest
import test_peers as peers
import torch
from test_peers import SMALL, small, timm, torchvision, transformers, written

import vitfn
from vitfn import weights
from vitfn.foreign import IMAGENET

SIZES = [(32, 48), (48, 32), (24, 24), (56, 16), (64, 64), (8, 8)]
by_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def difference(theirs, path, size) -> float:
    """The relative error, of all outputs, of the file at `path` for images of this size."""
    config = dataclasses.replace(weights.describe(path).config, image_size=size)
    images = torch.randn(2, config.channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images)
        found = vitfn.apply(vitfn.load(path, config), images, config)
    assert expected.shape == found.shape
    return float((found - expected).norm() / expected.norm())


@by_size
@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_timm_s_models(tmp_path, size, pool):
    model = peers.randomised(peers.timm_model(small(classifier=pool), dynamic_img_size=True))
    assert difference(model, written(model, tmp_path), size) < 5e-6


@by_size
def test_timm_s_loader_resamples_as_its_model(tmp_path, size):
    model = peers.randomised(peers.timm_model(SMALL))
    other = peers.timm_model(small(image_size=size)).eval()
    state = timm.models.vision_transformer.checkpoint_filter_fn(dict(model.state_dict()), other)
    other.load_state_dict(state)
    assert difference(other, written(model, tmp_path), size) < 5e-6


@by_size
def test_timm_s_models_whose_class_token_has_no_position(tmp_path, size):
    model = timm.create_model("deit3_small_patch16_224", depth=2, img_size=64, num_classes=7, dynamic_img_size=True)
    path = written(peers.randomised(model), tmp_path)
    assert difference(model, path, (2 * size[0], 2 * size[1])) < 5e-6


@by_size
@pytest.mark.parametrize("layout", ["huggingface", "state_dict"])
def test_transformers_vit(tmp_path, size, layout):
    model = peers.randomised(peers.transformers_model(small(layer_norm_eps=1e-12)))
    path = written(model, tmp_path, layout)
    assert difference(lambda x: model(x, interpolate_pos_encoding=True).logits, path, size) < 5e-6


@by_size
def test_transformers_dinov2(tmp_path, size):
    model = peers.randomised(peers.of_transformers("Dinov2Model", num_hidden_layers=2)())
    path = written(model, tmp_path, "huggingface")
    assert difference(lambda x: model(x).pooler_output, path, size) < 5e-6


@by_size
@pytest.mark.parametrize("name", ["SiglipVisionModel", "SiglipForImageClassification"])
def test_transformers_siglip(tmp_path, size, name):
    fields = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.SiglipVisionConfig(**fields)
    if name != "SiglipVisionModel":
        config = transformers.SiglipConfig(vision_config=fields, text_config={"hidden_size": 64}, num_labels=3)
    model = peers.randomised(getattr(transformers, name)(config))
    path = written(model, tmp_path, "huggingface")

    def theirs(images):
        found = model(images, interpolate_pos_encoding=True)
        return found.pooler_output if name == "SiglipVisionModel" else found.logits

    assert difference(theirs, path, size) < 5e-6


def test_a_whole_siglip_model_s_image_tower_is_read(tmp_path):
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.SiglipConfig(
        vision_config={**fields, "image_size": 32, "patch_size": 8}, text_config={**fields, "vocab_size": 50}
    )
    model = peers.randomised(transformers.SiglipModel(config))
    path = written(model, tmp_path, "huggingface")
    found = weights.describe(path).config
    assert (found.classifier, found.num_heads, found.gelu) == ("map", 4, "tanh")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(images).pooler_output
    torch.testing.assert_close(vitfn.apply(vitfn.load(path), images, found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [16, 24, 48, 64, 8])
def test_torchvision_s_models(tmp_path, size):
    model = peers.randomised(peers.torchvision_model(small(**IMAGENET)))
    other = peers.torchvision_model(small(image_size=size, **IMAGENET)).eval()
    state = torchvision.models.vision_transformer.interpolate_embeddings(size, 8, dict(model.state_dict()))
    other.load_state_dict(state)
    assert difference(other, written(model, tmp_path), (size, size)) < 5e-6


def test_masked_autoencoders_are_read_without_their_decoder(tmp_path, caplog):
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    config = transformers.ViTMAEConfig(**fields, **decoder, image_size=32, patch_size=8, mask_ratio=0.0)
    model = peers.randomised(transformers.ViTMAEForPreTraining(config))
    path = written(model, tmp_path, "huggingface")
    images = torch.randn(2, 3, 32, 32)
    noise = torch.arange(16.0).repeat(2, 1)  # keeps the patches in order
    with torch.no_grad():
        expected = model.vit(images, noise=noise).last_hidden_state[:, 0]
    found = weights.describe(path).config
    assert found.layer_norm_eps == 1e-12
    torch.testing.assert_close(vitfn.apply(vitfn.load(path), images, found), expected, rtol=1e-5, atol=1e-5)
    assert "decoder" in caplog.text


@functools.cache
def registry() -> list[str]:
    modules = ("vision_transformer", "deit")
    return [name for module in modules for name in timm.list_models(module=module) if "_clip_" not in name]


@pytest.mark.slow
def test_what_arrays_cannot_show_of_timm_s_architectures_is_known(tmp_path):
    """Of every architecture that vitfn reads, with the config.json that timm writes: heads, GELU, pooling and size."""
    wrong, read = [], 0
    for name in registry():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=3)
        if not hasattr(model, "blocks") or len(model.blocks) < 1:
            continue
        found = timm_described(model, tmp_path)
        if found is None:
            continue
        read += 1
        block = model.blocks[0]
        tanh = "tanh" in type(block.mlp.act).__name__.lower()
        expected = (block.attn.num_heads, "tanh" if tanh else "erf", *(_whole(model)))
        if (found.num_heads, found.gelu, *found.image_hw) != expected:
            wrong.append((name, found.num_heads, found.gelu, found.image_hw, expected))
    assert not wrong
    assert read > 60


def _whole(model) -> tuple[int, ...]:
    sides = zip(model.patch_embed.img_size, model.patch_embed.patch_size, strict=True)
    return tuple(side - side % patch for side, patch in sides)


def timm_described(model, folder):
    """The config that names, shapes and timm's own config.json give; None for a model that is refused."""
    timm.models._hub.save_config_for_hf(model, folder / "config.json")
    shapes = {name: tuple(leaf.shape) for name, leaf in model.state_dict().items()}
    try:
        return _Shapes(folder / "model.safetensors", shapes).config
    except vitfn.errors.InputError:
        return None


class _Shapes(weights.Checkpoint):
    """A file that has shapes and no numbers."""

    def __init__(self, path, shapes):
        self.path, self.stated, self._assume = str(path), None, {}
        self.file = type("File", (), {"shapes": shapes, "path": str(path), "comment": b""})()
        self._recognise("")
        self._beside = self._read_beside()
