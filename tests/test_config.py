"""The table of published models against Google's own numbers, and what a config refuses."""

import dataclasses
import json
import math
import re
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vitfn
from vitfn.config import model_names
from vitfn.errors import InputError

calm = settings(max_examples=50)


class Row(NamedTuple):
    """A model as vit_jax/configs/models.py has it; tokens and parameters at 224 pixels, with 1,000 classes."""

    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float
    classifier: str
    num_tokens: int
    parameters: int


PUBLISHED = {
    "ViT-Ti_16": Row(16, 192, 12, 3, 768, 0.0, "token", 197, 5_717_416),
    "ViT-S_16": Row(16, 384, 12, 6, 1536, 0.0, "token", 197, 22_050_664),
    "ViT-S_32": Row(32, 384, 12, 6, 1536, 0.0, "token", 50, 22_878_952),
    "ViT-B_8": Row(8, 768, 12, 12, 3072, 0.0, "token", 785, 86_576_872),
    "ViT-B_16": Row(16, 768, 12, 12, 3072, 0.0, "token", 197, 86_567_656),
    "ViT-B_32": Row(32, 768, 12, 12, 3072, 0.0, "token", 50, 88_224_232),
    "ViT-L_16": Row(16, 1024, 24, 16, 4096, 0.1, "token", 197, 304_326_632),
    "ViT-L_32": Row(32, 1024, 24, 16, 4096, 0.0, "token", 50, 306_535_400),
    "ViT-H_14": Row(14, 1280, 32, 16, 5120, 0.1, "token", 257, 632_045_800),
    "ViT-S_16-gap-norep": Row(16, 384, 12, 6, 1536, 0.0, "gap", 196, 22_049_896),
    "ViT-S_32-gap-norep": Row(32, 384, 12, 6, 1536, 0.0, "gap", 49, 22_878_184),
    "ViT-B_16-gap-norep": Row(16, 768, 12, 12, 3072, 0.0, "gap", 196, 86_566_120),
    "ViT-B_32-gap-norep": Row(32, 768, 12, 12, 3072, 0.0, "gap", 49, 88_222_696),
    "R+ViT-Ti_16": Row(8, 192, 12, 3, 768, 0.0, "token", 50, 6_337_704),
    "R26+ViT-S_32": Row(1, 384, 12, 6, 1536, 0.0, "token", 50, 36_431_912),
    "R26+ViT-B_32": Row(1, 768, 12, 12, 3072, 0.0, "token", 50, 101_383_976),
    "R50+ViT-B_16": Row(1, 768, 12, 12, 3072, 0.1, "token", 197, 98_659_112),
    "R50+ViT-L_32": Row(1, 1024, 24, 16, 4096, 0.1, "token", 50, 328_994_856),
}

# big_vision's variants: width, depth, mlp, heads, parameters of the encoder without its last norm
BIG_VISION = {
    "mu": (32, 1, 128, 2, 12_768),
    "Ti": (192, 12, 768, 3, 5_338_752),
    "S": (384, 12, 1536, 6, 21_294_336),
    "M": (512, 12, 2048, 8, 37_829_632),
    "B": (768, 12, 3072, 12, 85_056_000),
    "L": (1024, 24, 4096, 16, 302_311_424),
    "So400m": (1152, 27, 4304, 16, 411_468_912),
    "H": (1280, 32, 5120, 16, 629_680_640),
    "g": (1408, 40, 6144, 16, 1_010_009_856),
    "g-opt": (1536, 40, 6144, 16, 1_133_263_872),
    "G": (1664, 48, 8192, 16, 1_841_366_272),
    "G-opt": (1536, 48, 8192, 16, 1_662_004_224),
    "e": (1792, 56, 15360, 16, 3_803_903_488),
}


def parameters(config: vitfn.ViTConfig) -> int:
    return sum(math.prod(shape) for shape in vitfn.shapes(config).values())


def refusal(**fields) -> str:
    with pytest.raises(InputError) as error:
        vitfn.ViTConfig(**fields)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_the_table_is_the_published_models_and_nano():
    (nano,) = set(model_names()) - set(PUBLISHED)
    assert nano.startswith("ViT-Nano_")
    assert len(model_names()) == len(PUBLISHED) + 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_googles_sizes(name):
    config = vitfn.get_config(name)
    found = {field: getattr(config, field) for field in Row._fields if field != "parameters"}
    assert found | {"parameters": parameters(config)} == PUBLISHED[name]._asdict()
    assert (config.name, config.image_hw, config.num_classes) == (name, (224, 224), 1000)
    assert (config.attention_dropout_rate, config.representation_size) == (0.0, None)
    assert (config.gelu, config.layer_norm_eps, config.mean, config.std) == ("tanh", 1e-6, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("B/16", {"num_classes": 10}, 85_806_346),
        ("B/32", {"num_classes": 10}, 87_462_922),
        ("L/16", {"num_classes": 10}, 303_311_882),
        ("L/16", {"num_classes": 100}, 303_404_132),
        ("L/32", {"num_classes": 10}, 305_520_650),
        ("H/14", {"num_classes": 10}, 630_777_610),
        ("B/16", {"num_classes": 10, "image_size": 384}, 86_098_186),
        ("B/16", {"image_size": 384}, 86_859_496),
        ("B/16", {"num_classes": 21_843, "representation_size": 768}, 103_186_515),  # imagenet21k/ViT-B_16.npz
        ("R50-ViT-B_16", {"num_classes": 10}, 97_897_802),
        ("R50-ViT-B_16", {"num_classes": 100}, 97_967_012),
        ("R50+B/16", {"num_classes": 10, "image_size": 384}, 98_189_642),
        ("S/16", {"classifier": "gap", "posemb": "sincos2d", "representation_size": 384}, 22_122_472),  # vit_s16_i1k
    ],
)
def test_parameter_counts_of_fine_tuned_and_pre_trained_models(name, overrides, count):
    assert parameters(vitfn.get_config(name, **overrides)) == count


@pytest.mark.parametrize("variant", BIG_VISION)
def test_every_variant_of_big_vision_goes_with_any_patch(variant):
    width, depth, mlp, heads, count = BIG_VISION[variant]
    config = vitfn.get_config(f"{variant}/14", classifier="map")
    assert (config.hidden_size, config.num_layers, config.mlp_dim, config.num_heads) == (width, depth, mlp, heads)
    assert (config.name, config.patch_size) == (f"ViT-{variant}_14", 14)
    encoder = {path: shape for path, shape in vitfn.shapes(config).items() if path.startswith("Transformer/enc")}
    assert sum(map(math.prod, encoder.values())) == count


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        *(("B/16", 200), ("L/16", 392), ("H/14", 520)),
        *(("R50+ViT-B_16", 356), ("R26+ViT-S_32", 287), ("R50+ViT-L_32", 551), ("R+ViT-Ti_16", 203)),
    ],
)
def test_google_s_files_have_so_many_arrays(name, arrays):
    assert len(vitfn.shapes(vitfn.get_config(name))) == arrays
    assert len(vitfn.shapes(vitfn.get_config(name, representation_size=8))) == arrays + 2


def test_nano_is_a_small_model_for_32_pixels():
    (name,) = set(model_names()) - set(PUBLISHED)
    config = vitfn.get_config(name)
    assert config.image_hw == (32, 32)
    assert parameters(config) < 1_000_000


@calm
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    layers=st.integers(1, 3),
    mlp=st.integers(1, 9),
    patch=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    classes=st.integers(1, 6),
    classifier=st.sampled_from(["token", "gap"]),
    representation=st.none() | st.integers(1, 5),
)
def test_parameter_count_is_the_closed_form(
    heads, width, layers, mlp, patch, grid, classes, classifier, representation
):
    D, cls = heads * width, classifier == "token"
    config = vitfn.ViTConfig(
        patch_size=patch,
        image_size=(grid[0] * patch, grid[1] * patch),
        hidden_size=D,
        num_layers=layers,
        num_heads=heads,
        mlp_dim=mlp,
        num_classes=classes,
        classifier=classifier,
        representation_size=representation,
    )
    embedding = patch * patch * 3 * D + D + cls * D + (grid[0] * grid[1] + cls) * D
    block = 4 * (D * D + D) + 2 * 2 * D + 2 * D * mlp + mlp + D
    head = D * classes + classes
    if representation:
        head = D * representation + representation + representation * classes + classes
    assert parameters(config) == embedding + layers * block + 2 * D + head


@pytest.mark.parametrize("long", model_names())
def test_short_names_equal_long_names(long):
    stem, variant, patch = re.fullmatch(r"(.*)ViT-([A-Za-z]+)_(.+)", long).groups()
    assert vitfn.get_config(f"{stem}{variant}/{patch}") == vitfn.get_config(long)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("R50+ViT-B_16", 224, (14, 14)),
        ("R50+ViT-B_16", 384, (24, 24)),
        ("R50+ViT-B_16", (225, 100), (15, 7)),
        ("R50+ViT-B_16", 1, (1, 1)),
        ("R50+ViT-L_32", 224, (7, 7)),
        ("R26+ViT-S_32", (230, 33), (8, 2)),
        ("R+ViT-Ti_16", 224, (7, 7)),
        ("R+ViT-Ti_16", 240, (7, 7)),  # of 60 x 60 features, a VALID convolution leaves the last four out
    ],
)
def test_a_hybrid_takes_any_image_size(name, size, grid):
    assert vitfn.get_config(name, image_size=size).grid == grid


def test_an_image_without_a_whole_patch_is_refused():
    with pytest.raises(InputError, match="image_size: found 28x28, expected at least one patch of 8 on the stem's"):
        vitfn.get_config("R+ViT-Ti_16", image_size=28)


@pytest.mark.parametrize("stem", [{"num_layers": (2, 0)}, {"num_layers": (1.5,)}, {"width_factor": 0.3}])
def test_an_impossible_stem_is_refused(stem):
    with pytest.raises(InputError, match=r"^resnet: found "):
        vitfn.ResNetConfig(**stem)


def test_sincos2d_needs_a_width_in_quarters():
    assert "hidden_size: found 6" in refusal(hidden_size=6, num_heads=2, posemb="sincos2d")


def test_overrides_replace_fields():
    config = vitfn.get_config("L/16", num_classes=10, image_size=384, dropout_rate=0.0)
    assert (config.num_classes, config.grid, config.dropout_rate) == (10, (24, 24), 0.0)
    assert config == dataclasses.replace(vitfn.get_config("L/16"), num_classes=10, image_size=384, dropout_rate=0.0)


def test_non_square_image():
    config = vitfn.get_config("Ti/16", image_size=(224, 160))
    assert (config.image_hw, config.grid, config.num_tokens) == ((224, 160), (14, 10), 141)
    assert vitfn.shapes(config)["Transformer/posembed_input/pos_embedding"] == (1, 141, 192)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        vitfn.get_config("B/16").num_classes = 10


def test_a_config_is_a_dict_key():
    table = {vitfn.get_config("B/16"): "b", vitfn.get_config("B/32"): "c"}
    assert table[vitfn.get_config("ViT-B_16")] == "b"
    assert vitfn.get_config("B/16", num_classes=10) not in table


def test_lists_from_json_become_tuples():
    stem = vitfn.ResNetConfig((2, 1), 0.5)
    config = vitfn.ViTConfig(image_size=(224, 160), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resnet=stem)
    again = vitfn.ViTConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
    assert (again.image_size, again.mean, again.std) == ((224, 160), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "name", ["ViT-X_16", "X/16", "b/16", "", "R50+ViT-B_32", "ViT-", "R9+B/16", "L/16-gap-norep", "B/16/2"]
)
def test_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError) as error:
        vitfn.get_config(name)
    message = str(error.value)
    assert message.startswith(f"model_type: found {name!r}, expected one of ViT-")
    assert all(known in message for known in model_names())
    assert len(message.splitlines()) == 1


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(InputError, match=r"^classes, dropout: .*ViTConfig"):
        vitfn.get_config("B/16", dropout=0.1, classes=10, num_layers=2)


@pytest.mark.parametrize("field", ["patch_size", "channels", "hidden_size", "num_layers", "num_heads", "mlp_dim"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(field, value):
    assert re.fullmatch(rf"{field}: found {value}, expected .*at least 1", refusal(**{field: value}))


def test_no_classes_is_a_model_without_head():
    assert not any(path.startswith("head") for path in vitfn.shapes(vitfn.get_config("Ti/16", num_classes=0)))
    assert refusal(num_classes=-1) == "num_classes: found -1, expected an integer of at least 0"


@pytest.mark.parametrize("size", [225, (224, 225), (225, 224), 0, (224, 0), (-16, 16), 15])
def test_an_image_that_the_patch_does_not_divide_is_refused(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    message = refusal(image_size=size)
    assert message == f"image_size: found {height}x{width}, expected positive multiples of the patch size 16"


@pytest.mark.parametrize("field", ["dropout_rate", "attention_dropout_rate"])
@pytest.mark.parametrize("rate", [1, 1.5, -0.1, float("nan"), float("inf")])
def test_a_rate_that_is_no_probability_below_one_is_refused(field, rate):
    assert refusal(**{field: rate}) == f"{field}: found {rate}, expected a probability of at least 0 and below 1"


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("classifier", "cls", "'token', 'gap', 'map'"),
        ("posemb", "rope", "'learn', 'sincos2d'"),
        ("gelu", "relu", "'tanh', 'erf'"),
    ],
)
def test_a_bad_choice_is_refused_with_the_good_ones(field, value, choices):
    assert refusal(**{field: value}) == f"{field}: found {value!r}, expected one of {choices}"


def test_a_name_that_is_no_string_is_refused():
    assert refusal(name=["B/16"]).startswith("name: found ['B/16'], expected a string")


def test_a_stem_that_is_none_is_refused():
    assert refusal(resnet="R50") == "resnet: found 'R50', expected None or a ResNetConfig"


def test_heads_that_do_not_divide_the_hidden_size_are_refused():
    message = refusal(hidden_size=768, num_heads=10)
    assert message == "hidden_size: found 768, expected a multiple of num_heads=10"


@pytest.mark.parametrize("size", [(224,), (224, 224, 3), [], "224", None, 224.0])
def test_an_image_size_of_other_than_one_or_two_integers_is_refused(size):
    assert refusal(image_size=size).startswith("image_size: found ")


@pytest.mark.parametrize("field", ["patch_size", "num_layers", "num_classes", "hidden_size"])
@pytest.mark.parametrize("value", [2.5, "16", None])
def test_a_size_that_is_no_integer_is_refused(field, value):
    assert refusal(**{field: value}).startswith(f"{field}: found ")


@pytest.mark.parametrize("value", [0, -1, "768", 1.5])
def test_a_representation_size_that_is_no_positive_integer_is_refused(value):
    assert refusal(representation_size=value).startswith("representation_size: found ")


@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_mean_or_std_for_another_number_of_channels_is_refused(field):
    assert refusal(**{field: (0.5, 0.5)}).startswith(f"{field}: found ")
    vitfn.ViTConfig(channels=2, **{field: (0.5, 0.5)})
