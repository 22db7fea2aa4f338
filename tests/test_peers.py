"""The models of timm, transformers and torchvision themselves, with random numbers: their files read, and written."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitfn
from vitfn import tree, weights
from vitfn.errors import InputError
from vitfn.foreign import IMAGENET

try:
    torchvision = pytest.importorskip("torchvision")
except RuntimeError:  # its own operators, built for CUDA, cannot be loaded beside a torch for the CPU
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = vitfn.ViTConfig(
    patch_size=8, image_size=32, hidden_size=64, num_layers=2, num_heads=4, mlp_dim=128, num_classes=10, gelu="erf"
)
NAMES = tuple("abcdefghij")
small = functools.partial(dataclasses.replace, SMALL)


def timm_model(config: vitfn.ViTConfig, **fields) -> nn.Module:
    if config.resnet:
        backbone = timm.models.vision_transformer_hybrid._resnetv2(config.resnet.num_layers)
        embed = timm.models.vision_transformer_hybrid.HybridEmbed
        fields["embed_layer"] = functools.partial(embed, backbone=backbone)
    return timm.models.VisionTransformer(
        **{field: getattr(config, field) for field in ("patch_size", "num_classes", "num_heads")},
        img_size=config.image_hw,
        in_chans=config.channels,
        global_pool={"token": "token", "gap": "avg", "map": "map"}[config.classifier],
        embed_dim=config.hidden_size,
        depth=config.num_layers,
        mlp_ratio=config.mlp_dim / config.hidden_size,
        class_token=config.classifier == "token",
        fc_norm=False,
        norm_layer=functools.partial(nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer=functools.partial(nn.GELU, approximate="tanh" if config.gelu == "tanh" else "none"),
        **fields,
    )


def transformers_model(config: vitfn.ViTConfig) -> nn.Module:
    theirs = transformers.ViTConfig(
        **{field: getattr(config, field) for field in ("hidden_size", "layer_norm_eps", "image_size", "patch_size")},
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        hidden_act="gelu" if config.gelu == "erf" else "gelu_new",
        num_channels=config.channels,
        **({"id2label": dict(enumerate(NAMES))} if config.num_classes else {}),
    )
    if config.num_classes:
        return transformers.ViTForImageClassification(theirs)
    return transformers.ViTModel(theirs, add_pooling_layer=config.representation_size is not None)


def torchvision_model(config: vitfn.ViTConfig) -> nn.Module:
    fields = ("image_size", "patch_size", "num_layers", "num_heads", "mlp_dim", "num_classes", "representation_size")
    same = {field: getattr(config, field) for field in fields}
    return torchvision.models.VisionTransformer(**same, hidden_dim=config.hidden_size)


MODELS = {
    "timm": timm_model,
    "huggingface": transformers_model,  # by save_pretrained
    "huggingface5": transformers_model,  # by state_dict
    "torchvision": torchvision_model,
}
ODD = {"hidden_size": 48, "num_heads": 3}  # whose heads no file but config.json tells
PEERS = {
    "timm": ("timm", SMALL),
    "timm, gap": ("timm", small(classifier="gap")),
    "timm, map": ("timm", small(classifier="map")),
    "timm, no head": ("timm", small(num_classes=0)),
    "timm, grey": ("timm", small(channels=1)),
    "timm, root": ("timm", small(image_size=64, resnet=vitfn.ResNetConfig())),
    "timm, stem": ("timm", small(image_size=64, patch_size=1, resnet=vitfn.ResNetConfig((2, 1)))),
    "huggingface": ("huggingface", small(layer_norm_eps=1e-12)),
    "huggingface, wide": ("huggingface", small(image_size=(32, 48), gelu="tanh", **ODD)),
    "huggingface, pooler": ("huggingface", small(num_classes=0, representation_size=64, layer_norm_eps=1e-12)),
    "huggingface, no head": ("huggingface", small(num_classes=0, layer_norm_eps=1e-3)),
    "huggingface5": ("huggingface5", small(layer_norm_eps=1e-12)),
    "huggingface5, pooler": ("huggingface5", small(num_classes=0, representation_size=64, layer_norm_eps=1e-12)),
    "huggingface5, no head": ("huggingface5", small(num_classes=0, channels=1, layer_norm_eps=1e-12)),
    "torchvision": ("torchvision", small(**IMAGENET)),
    "torchvision, pre_logits": ("torchvision", small(representation_size=24, **IMAGENET)),
}
WRITTEN = PEERS | {
    "timm, wide": ("timm", small(image_size=(32, 48), gelu="tanh", **ODD)),
    "timm, sincos2d": ("timm", small(posemb="sincos2d")),
    "timm, sincos2d gap": ("timm", small(posemb="sincos2d", classifier="gap", layer_norm_eps=1e-3)),
    "huggingface5, wide": ("huggingface5", small(image_size=(32, 48), gelu="tanh", **ODD)),
}


@torch.no_grad()
def randomised(model: nn.Module, stem: float = 100.0) -> nn.Module:
    """No number is 0 or 1 by accident, and beside a stem's kernels the epsilon that standardises them vanishes."""
    generator = torch.Generator().manual_seed(0)
    for name, leaf in model.named_parameters():
        noise = torch.randn(leaf.shape, generator=generator)
        if leaf.ndim == 1 or len(leaf) == 1:
            leaf.copy_((leaf.ndim == 1 and "bias" not in name) + 0.1 * noise)
        else:
            leaf.copy_((stem if ".backbone." in name else 0.5 * leaf[0].numel() ** -0.5) * noise)
    return model.eval()


def random_params(config: vitfn.ViTConfig) -> dict:
    """Likewise."""
    generator = torch.Generator().manual_seed(0)
    flat = tree.flatten(vitfn.init(config))
    for path, leaf in flat.items():
        leaf += (100 if "conv" in path else 0.05) * torch.randn(leaf.shape, generator=generator)
    return tree.unflatten(flat)


def written(model: nn.Module, folder: Path, layout: str = "", suffix: str = "safetensors") -> Path:
    """The model in a file as its own package writes it: 'huggingface' is save_pretrained, with a config.json."""
    path = folder / "model.safetensors"
    if layout == "huggingface":
        model.save_pretrained(folder)
    else:
        save_file({name: leaf.contiguous() for name, leaf in model.state_dict().items()}, path)
    if suffix != "safetensors":
        torch.save(load_file(path), path.with_suffix(f".{suffix}"))
    return path.with_suffix(f".{suffix}")


@torch.no_grad()
def error(model: nn.Module, params: dict, config: vitfn.ViTConfig) -> float:
    """The largest difference between what the peer and vitfn compute."""
    images = torch.randn(2, config.channels, *config.image_hw, generator=torch.Generator().manual_seed(0))
    theirs, ours = model(images), vitfn.apply(params, images, config)
    if not isinstance(theirs, Tensor):
        features = theirs[1] if config.representation_size else theirs[0]
        theirs = features if features.ndim == 2 else features[:, 0]  # logits, pooled, or the class token's
    assert theirs.shape == ours.shape
    assert 0.05 < theirs.std() < 5
    return (theirs - ours).abs().max().item()


def arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path) as file:
        return {name: torch.from_numpy(array) for name, array in file.items()}


def assert_survives(path: Path, config: vitfn.ViTConfig, layout: str) -> None:
    """The file's arrays are, to the bit, those of the tree written again, also by way of Google's npz."""
    back, google = path.with_stem("back"), path.with_name("google.npz")
    expected, direct = arrays(path), vitfn.load(path)
    vitfn.save(google, direct, config)
    for params in (direct, vitfn.load(google)):
        vitfn.save(back, params, config, layout=layout)
        found = arrays(back)
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype)
            assert torch.equal(found[name], leaf), name


# Both ways, in every layout


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(("layout", "config"), PEERS.values(), ids=PEERS)
def test_a_peer_s_file_gives_the_peer_s_logits(tmp_path, layout, config, suffix):
    model = randomised(MODELS[layout](config))
    path = written(model, tmp_path, layout, suffix)
    names = NAMES if layout == "huggingface" and config.num_classes else None
    owner = {"timm": "bicubic_antialias", "torchvision": "bicubic_corners"}.get(layout, "bicubic")
    assert weights.describe(path) == (dataclasses.replace(config, posemb_resize=owner), names, False)
    assert error(model, vitfn.load(path), config) < 5e-6


@pytest.mark.parametrize(("layout", "config"), WRITTEN.values(), ids=WRITTEN)
def test_a_peer_computes_the_logits_of_what_vitfn_wrote(tmp_path, layout, config):
    model, params = MODELS[layout](config).eval(), random_params(config)
    path = tmp_path / "model.safetensors"
    vitfn.save(path, params, config, layout=layout)
    if layout == "huggingface":
        model.config.save_pretrained(tmp_path)
        kwargs = {} if config.num_classes else {"add_pooling_layer": config.representation_size is not None}
        model, said = type(model).from_pretrained(tmp_path, output_loading_info=True, **kwargs)
        assert not any(said.values())
    else:
        model.load_state_dict(load_file(path), strict=True)
    assert error(model, params, config) < 5e-6


@pytest.mark.parametrize(("layout", "config"), PEERS.values(), ids=PEERS)
def test_a_peer_s_arrays_survive_to_the_bit(tmp_path, layout, config):
    assert_survives(written(randomised(MODELS[layout](config)), tmp_path, layout), config, layout)


CONFIGS = {
    "token": SMALL,
    "root": small(patch_size=4, resnet=vitfn.ResNetConfig((), 0.5)),
    "stem": small(patch_size=1, resnet=vitfn.ResNetConfig((2, 1), 0.5)),
    "pre_logits": small(representation_size=24),
    "no head": small(num_classes=0),
    "gap": small(classifier="gap"),
    "map": small(classifier="map"),
    "sincos2d": small(posemb="sincos2d"),
}
OTHERS = [(layout, name) for layout in ("original", "linen", "big_vision", "big_vision_scan") for name in CONFIGS]
OTHERS += [("seed", "token"), ("seed", "root"), ("seed", "stem"), ("timm", "pre_logits")]


@pytest.mark.parametrize(("layout", "name"), OTHERS)
def test_arrays_of_layouts_without_a_peer_survive_to_the_bit(tmp_path, layout, name):
    path = tmp_path / ("model.safetensors" if layout in ("seed", "timm") else "model.npz")
    vitfn.save(path, random_params(CONFIGS[name]), CONFIGS[name], layout=layout)
    assert_survives(path, CONFIGS[name], layout)


@pytest.mark.parametrize("layout", ["original", "big_vision", "big_vision_scan"])
@pytest.mark.parametrize("peer", ["timm", "timm, gap", "timm, map", "timm, grey", "timm, root", "timm, stem"])
def test_timm_reads_npz_files_that_vitfn_wrote(tmp_path, peer, layout):
    _, config = PEERS[peer]
    model, params = timm_model(config, no_embed_class=layout != "original").eval(), random_params(config)
    vitfn.save(tmp_path / "model.npz", params, config, layout=layout)
    model.load_pretrained(str(tmp_path / "model.npz"))
    assert error(model, params, config) < 5e-6


# timm's architectures

TIMM = {
    "vit_tiny_patch16_224": {"depth": 12},
    "vit_tiny_patch16_384": {"num_classes": 0},
    "vit_small_patch32_224": {},
    "vit_base_patch8_224": {"img_size": 64},
    "vit_base_patch16_224": {"in_chans": 1},
    "vit_base_patch16_224_miil": {},
    "vit_large_patch16_224": {"depth": 1},
    "vit_huge_patch14_224": {"depth": 1, "img_size": 70},
    "vit_medium_patch16_gap_240": {},
    "vit_base_patch16_siglip_224": {},
    "vit_so400m_patch14_siglip_gap_224": {"depth": 1, "img_size": 70},
    "vit_small_patch14_dinov2": {"depth": 12, "img_size": 224, "num_classes": 0},
    "deit_tiny_patch16_224": {"depth": 12},
    "deit3_small_patch16_224": {"depth": 12},
    "vit_tiny_r_s16_p8_224": {"depth": 12},
    "vit_small_r26_s32_224": {},
    "vit_base_r50_s16_224": {"depth": 1},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_s_architectures_are_recognised_and_computed(tmp_path, name):
    """Hybrids differ by as much as timm, which divides a kernel by sqrt(var + 1e-8), does from Google's std + 1e-5."""
    model = randomised(timm.create_model(name, **({"depth": 2, "num_classes": 10} | TIMM[name])), stem=0.05)
    path = written(model, tmp_path, suffix="pt")
    config, params = weights.describe(path).config, vitfn.load(path)
    assert (config.num_heads, config.image_hw) == (model.blocks[0].attn.num_heads, model.patch_embed.img_size)
    assert error(model, params, config) < (2e-4 if config.resnet else 5e-6)
    assert all(map(torch.equal, tree.leaves(params), tree.leaves(vitfn.load(path.with_suffix(".safetensors")))))


def test_pixels_are_normalised_as_timm_s_models_want(tmp_path):
    """Where LayerScale, DeiT's wrapping or config.json tell; else the log says what is assumed."""
    deit = timm.create_model("deit_tiny_patch16_224", depth=1)
    assert weights.describe(written(deit, tmp_path)).config.mean == 0.5
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    timm.models.save_for_hf(deit, tmp_path / "hub", safe_serialization=True)
    scaled = written(timm.create_model("deit3_small_patch16_224", depth=1), tmp_path)
    for path in (tmp_path / "deit.pth", tmp_path / "hub/model.safetensors", scaled):
        config = weights.describe(path).config
        assert (config.mean, config.std) == (deit.pretrained_cfg["mean"], deit.pretrained_cfg["std"])


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({"hidden_size": 64, "num_heads": 2}, 4),
        ({"hidden_size": 320, "num_heads": 10}, 5),
        ({"hidden_size": 768, "num_heads": 16}, 12),
        ({"gelu": "tanh"}, 4),
        ({"layer_norm_eps": 1e-2}, 4),
    ],
    ids=str,
)
def test_what_a_file_cannot_tell_is_assumed_and_said_and_a_config_sets_it_right(tmp_path, caplog, fields, heads):
    """The heads of a published model of that width are assumed, or heads of 64."""
    config = small(**fields)
    model = randomised(timm_model(config))
    path = written(model, tmp_path)
    assumed = weights.describe(path).config
    assert assumed == small(hidden_size=config.hidden_size, num_heads=heads, posemb_resize="bicubic_antialias")
    assert error(model, vitfn.load(path), assumed) > 2e-5
    (message,) = caplog.messages
    assert f"assumed {heads} heads, a square image, erf GELU, LayerNorm epsilon 1e-06, pixels in [-1, 1]" in message
    assert error(model, vitfn.load(path, config), config) < 5e-6
    assert caplog.messages == [message]


def test_a_config_loads_what_heads_of_64_do_not_divide(tmp_path):
    config = small(hidden_size=200, num_heads=5)
    model = randomised(timm_model(config))
    assert error(model, vitfn.load(written(model, tmp_path), config), config) < 5e-6


# transformers and torchvision


@pytest.mark.parametrize("layout", ["huggingface", "state_dict"])
def test_dinov2_of_transformers_gives_its_class_token(tmp_path, caplog, layout):
    model = randomised(of_transformers("Dinov2Model", num_hidden_layers=2, mlp_ratio=3)())
    path = written(model, tmp_path, layout)
    config = weights.describe(path).config
    assert config == small(num_classes=0, mlp_dim=192, posemb_resize="bicubic", **IMAGENET)
    assert error(model, vitfn.load(path), config) < 5e-6
    assert "embeddings.mask_token ignored" in caplog.text
    assert "LayerScale folded" in caplog.text


def test_pixels_are_normalised_as_transformers_preprocessor_says(tmp_path):
    path = written(transformers_model(SMALL), tmp_path, "huggingface")
    preprocessor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    preprocessor.save_pretrained(tmp_path)
    config = weights.describe(path).config
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_names_of_older_torchvision_are_read(tmp_path):
    model = randomised(torchvision_model(SMALL))
    older = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): leaf
        for name, leaf in model.state_dict().items()
    }
    assert sum("mlp.linear_" in name for name in older) == 8
    save_file(older, tmp_path / "model.safetensors")
    assert error(model, vitfn.load(tmp_path / "model.safetensors"), SMALL) < 5e-6


# What vitfn does not compute


def of_timm(name: str, **fields) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, depth=1, **fields)


def of_transformers(name: str, **fields) -> Callable[[], nn.Module]:
    model = getattr(transformers, name)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    return lambda: model(model.config_class(**(sizes | fields)))


gated = of_transformers("Dinov2Model", use_swiglu_ffn=True)


@pytest.mark.parametrize(
    ("reason", "build"),
    [
        ("register tokens", of_timm("vit_small_patch14_reg4_dinov2", img_size=28)),
        ("a norm before the first block", of_timm("vit_xsmall_patch16_clip_224")),
        ("a norm after pooling", of_timm("vit_tiny_patch16_224", global_pool="avg")),
        ("a distillation token", of_timm("deit_tiny_distilled_patch16_224")),
        ("normalised queries and keys", of_timm("vit_tiny_patch16_224", qk_norm=True)),
        ("no position embeddings (rotary or relative ones?)", of_timm("vit_small_patch16_rope_224")),
        ("rotary positions", of_timm("vit_small_patch16_rope_mixed_ape_224")),
        ("LayerScale under a name", of_timm("vit_small_patch16_rope_ape_224")),  # its rope is not in the file
        ("relative positions", of_timm("samvit_base_patch16", img_size=32)),
        ("a query and value bias without a key's", of_timm("eva02_tiny_patch14_224")),
        ("a gated or normalised MLP", of_timm("eva02_base_patch16_clip_224")),
        ("a gated MLP", of_timm("vit_giant_patch14_dinov2", img_size=28)),
        ("extra patch_embed.backbone.bn1.", of_timm("vit_small_resnet26d_224")),
        ("num_heads cannot be seen in this layout", lambda: timm_model(small(hidden_size=200, num_heads=5))),
        ("a distillation token", of_transformers("DeiTForImageClassification")),
        ("register tokens", of_transformers("Dinov2WithRegistersModel")),
        ("a gated or normalised MLP", gated),
        ("a gated or normalised MLP", lambda: nn.ModuleDict({"encoder": gated()})),
        ("a head over the class token beside the mean", of_transformers("Dinov2ForImageClassification")),
        ("(bn1.bias, bn1.num_batches_tracked, bn1.running_mean and 119 more)", torchvision.models.resnet18),
    ],
)
def test_what_vitfn_does_not_compute_is_refused_by_its_name(tmp_path, reason, build):
    model = build()
    path = written(model, tmp_path, "huggingface" if hasattr(model, "save_pretrained") else "")
    for function in (weights.describe, vitfn.load):
        with pytest.raises(InputError) as refusal:
            function(path)
        (line,) = str(refusal.value).splitlines()
        assert str(path) in line
        assert reason in line
