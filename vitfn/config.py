"""What is static about a model: `ViTConfig`, and the table of every published ViT."""

import dataclasses
import math
import re
from typing import Any, Literal

from vitfn.errors import InputError


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The stem of a hybrid: bottleneck units in each stage, and the width in units of ResNet-50's 64 root channels."""

    num_layers: tuple[int, ...] = ()
    width_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_layers", tuple(self.num_layers))
        if not all(isinstance(units, int) and units >= 1 for units in self.num_layers):
            raise InputError(f"resnet: found stages of {self.num_layers} units, expected integers of at least 1")
        if self.width < 32 or self.width % 32:
            raise InputError(f"resnet: found {self.width} root channels, expected a multiple of the 32 groups")

    @property
    def width(self) -> int:
        """Channels of the root convolution."""
        return int(64 * self.width_factor)

    @property
    def features(self) -> int:
        """Channels of the last feature map."""
        return self.width * (2 ** (len(self.num_layers) + 1) if self.num_layers else 1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the root convolution, the pooling, and each stage."""
        return (2, 2, *(1 if stage == 0 else 2 for stage in range(len(self.num_layers))))


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer's shape and arithmetic; hashable, so that it can be a static argument.

    Sizes are in pixels (`patch_size`, `image_size`) or in features; rates are probabilities in [0, 1), that of
    stochastic depth the last block's.
    `image_size` is one side or (height, width); the patch divides both. With a `resnet` stem, patches are cut from its
    feature map, any image size is allowed, and what a last patch lacks is left out, as Google's convolution does.
    `classifier` pools the class token, the mean of the tokens ('gap'), or by an attention head ('map').
    `num_classes` 0 is a model without head, whose outputs are features. `mean` and `std` normalise pixels scaled to
    [0, 1]: one number for all channels, or one for each. `posemb_resize` is how positions become those of another grid,
    one of `RESIZES`; None is as the model's owner does it where weights are read, and Google's way elsewhere.
    """

    name: str = "ViT"
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    channels: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000
    classifier: Literal["token", "gap", "map"] = "token"
    representation_size: int | None = None
    posemb: Literal["learn", "sincos2d"] = "learn"
    posemb_resize: str | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    gelu: Literal["tanh", "erf"] = "tanh"
    layer_norm_eps: float = 1e-6
    resnet: ResNetConfig | None = None
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        for field in ("image_size", "mean", "std"):  # JSON and argument parsers hand over lists
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        if not isinstance(self.name, str):
            raise InputError(f"name: found {self.name!r}, expected a string")
        if isinstance(stem := self.resnet, dict):
            object.__setattr__(self, "resnet", ResNetConfig(**stem))
        for field, smallest in _SIZES.items():
            value = getattr(self, field)
            optional = field == "representation_size" and value is None
            if not optional and not (isinstance(value, int) and value >= smallest):
                raise InputError(f"{field}: found {value}, expected an integer of at least {smallest}")
        for field in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise InputError(f"{field}: found {value}, expected a probability of at least 0 and below 1")
        for field, choices in _CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise InputError(f"{field}: found {value!r}, expected one of {', '.join(map(repr, choices))}")
        if not (self.resnet is None or isinstance(self.resnet, ResNetConfig)):
            raise InputError(f"resnet: found {self.resnet!r}, expected None or a ResNetConfig")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size: found {self.hidden_size}, expected a multiple of num_heads={self.num_heads}"
            )
        if self.posemb == "sincos2d" and (self.hidden_size % 4 or self.hidden_size < 8):
            raise InputError(f"hidden_size: found {self.hidden_size}, expected a multiple of 4 for sincos2d positions")
        least: float
        for field, least in (("mean", -math.inf), ("std", 0), ("layer_norm_eps", 0)):
            value = getattr(self, field)
            values = value if isinstance(value, tuple) and field != "layer_norm_eps" else (value,)
            if not all(isinstance(number, (int, float)) and least < number < math.inf for number in values):
                raise InputError(f"{field}: found {value}, expected numbers above {least:g}")
            if values is value and len(value) != self.channels:
                raise InputError(f"{field}: found {len(value)} numbers, expected one or channels={self.channels}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise InputError(f"image_size: found {self.image_size}, expected an integer or (height, width)")
        height, width = self.image_hw
        if self.resnet is None and (height < 1 or width < 1 or height % self.patch_size or width % self.patch_size):
            raise InputError(
                f"image_size: found {height}x{width}, expected positive multiples of the patch size {self.patch_size}"
            )
        if min(height, width, *self.grid) < 1:
            raise InputError(
                f"image_size: found {height}x{width}, expected at least one patch of {self.patch_size} "
                f"on the stem's feature map"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the input image, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        sides = self.image_hw
        for stride in self.resnet.strides if self.resnet else ():
            sides = math.ceil(sides[0] / stride), math.ceil(sides[1] / stride)
        return sides[0] // self.patch_size, sides[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Length of the sequence the encoder sees: the patches, and the class token where there is one."""
        rows, columns = self.grid
        return rows * columns + (self.classifier == "token")


_SIZES = {  # and the least each may be
    "patch_size": 1,
    "channels": 1,
    "hidden_size": 1,
    "num_layers": 1,
    "num_heads": 1,
    "mlp_dim": 1,
    "num_classes": 0,
    "representation_size": 1,
}
# How position embeddings are resized, and by whom: corner-aligned bilinear (Google), bicubic (transformers, DeiT, MAE),
# with antialiasing (timm, DINOv2 with registers), corner-aligned (torchvision), by a scale factor of (new + 0.1) / old
# (Meta's own DINO and DINOv2). All but the corner-aligned ones have half-pixel centres.
RESIZES = ("bilinear_corners", "bicubic", "bicubic_antialias", "bicubic_corners", "bicubic_offset")
_CHOICES = {
    "classifier": ("token", "gap", "map"),
    "posemb": ("learn", "sincos2d"),
    "posemb_resize": (*RESIZES, None),
    "gelu": ("tanh", "erf"),
}

# hidden_size, num_layers, num_heads, mlp_dim: table 1 of the paper (arXiv 2010.11929), table 2 of AugReg (2106.10270),
# table 2 of 'Scaling Vision Transformers' (2106.04560), So400m of 2305.13035; Nano is vitfn's own, for 32-pixel
# images on a laptop.
VARIANTS = {
    "Nano": (64, 3, 4, 256),
    "mu": (32, 1, 2, 128),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "g-opt": (1536, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "G-opt": (1536, 48, 16, 8192),
    "e": (1792, 56, 16, 15360),
}

# Google's published names -> what differs from the variant's row; L/16 and H/14, R50+B/16 and R50+L/32 are fine-tuned
# with dropout, the others without. A hybrid's name has the stride of its tokens in pixels, not its patch size.
_GAP = {"classifier": "gap"}
_R26 = {"patch_size": 1, "resnet": ResNetConfig((2, 2, 2, 2))}
_MODELS: dict[str, dict[str, Any]] = {
    "ViT-Nano_8": {"image_size": 32},
    "ViT-Ti_16": {},
    "ViT-S_16": {},
    "ViT-S_32": {},
    "ViT-B_8": {},
    "ViT-B_16": {},
    "ViT-B_32": {},
    "ViT-L_16": {"dropout_rate": 0.1},
    "ViT-L_32": {},
    "ViT-H_14": {"dropout_rate": 0.1},
    "ViT-S_16-gap-norep": _GAP,
    "ViT-S_32-gap-norep": _GAP,
    "ViT-B_16-gap-norep": _GAP,
    "ViT-B_32-gap-norep": _GAP,
    "R+ViT-Ti_16": {"patch_size": 8, "resnet": ResNetConfig()},
    "R26+ViT-S_32": _R26,
    "R26+ViT-B_32": _R26,
    "R50+ViT-B_16": {"patch_size": 1, "resnet": ResNetConfig((3, 4, 9)), "dropout_rate": 0.1},
    "R50+ViT-L_32": {"patch_size": 1, "resnet": ResNetConfig((3, 4, 6, 3)), "dropout_rate": 0.1},
}


def model_names() -> tuple[str, ...]:
    """Every published name that `get_config` knows, in its long spelling."""
    return tuple(_MODELS)


def get_config(name: str, **overrides) -> ViTConfig:
    """The config of a model by its long (`ViT-B_16`) or short (`B/16`) name, with fields replaced by `overrides`.

    Beside the published names, every variant goes with every patch size, as in big_vision (`So400m/14`); `R50-ViT-B_16`
    is the seed's spelling of `R50+ViT-B_16`. 1,000 classes at 224 pixels unless overridden. Raises InputError for an
    unknown name, a field that ViTConfig does not have, or a value it refuses.
    """
    match = re.fullmatch(r"(R\d*[+-])?(?:ViT-)?([A-Za-z0-9-]+?)[_/](\d+)(-gap-norep)?", name)
    stem, variant, patch, suffix = match.groups(default="") if match else ("", "", "", "")
    long_name = f"{stem.replace('-', '+')}ViT-{variant}_{patch}{suffix}"
    published = _MODELS.get(long_name, {})
    if variant not in VARIANTS or ((stem or suffix) and not published):
        raise InputError(
            f"model_type: found {name!r}, expected one of {', '.join(_MODELS)}, or another patch size (short: B/16) "
            f"of {', '.join(VARIANTS)}"
        )
    if unknown := overrides.keys() - {field.name for field in dataclasses.fields(ViTConfig)}:
        raise InputError(f"{', '.join(sorted(unknown))}: not a field of ViTConfig")
    fields: dict[str, Any] = {"name": long_name, "patch_size": int(patch)}
    fields |= zip(("hidden_size", "num_layers", "num_heads", "mlp_dim"), VARIANTS[variant], strict=True)
    return ViTConfig(**(fields | published | overrides))
