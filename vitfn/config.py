"""What is static about a model: `ViTConfig`, and the table of every published plain ViT."""

import dataclasses
import re
from typing import Literal

from vitfn.errors import InputError


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer's shape and arithmetic; hashable, so that it can be a static argument.

    Sizes are in pixels (`patch_size`, `image_size`) or in features; rates are probabilities in [0, 1).
    `image_size` is one side or (height, width); the patch divides both. `mean` and `std` normalise
    pixels scaled to [0, 1]: one number for all channels, or one for each.
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
    classifier: Literal["token", "gap"] = "token"
    representation_size: int | None = None
    posemb: Literal["learn"] = "learn"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    gelu: Literal["tanh", "erf"] = "tanh"
    layer_norm_eps: float = 1e-6
    resnet: None = None
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        for field in ("image_size", "mean", "std"):  # JSON and argument parsers hand over lists
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        for field in _SIZES:
            value = getattr(self, field)
            optional = field == "representation_size" and value is None
            if not optional and not (isinstance(value, int) and value >= 1):
                raise InputError(f"{field}: found {value}, expected an integer of at least 1")
        for field in ("dropout_rate", "attention_dropout_rate"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise InputError(f"{field}: found {value}, expected a probability of at least 0 and below 1")
        for field, choices in _CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise InputError(f"{field}: found {value!r}, expected one of {', '.join(map(repr, choices))}")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size: found {self.hidden_size}, expected a multiple of num_heads={self.num_heads}"
            )
        for field in ("mean", "std"):
            if isinstance(value := getattr(self, field), tuple) and len(value) != self.channels:
                raise InputError(f"{field}: found {len(value)} numbers, expected one or channels={self.channels}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise InputError(f"image_size: found {self.image_size}, expected an integer or (height, width)")
        if not (self.layer_norm_eps > 0 and min(self.std if isinstance(self.std, tuple) else (self.std,)) > 0):
            raise InputError(f"layer_norm_eps, std: found {self.layer_norm_eps}, {self.std}, expected numbers above 0")
        height, width = self.image_hw
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"image_size: found {height}x{width}, expected positive multiples of the patch size {self.patch_size}"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the input image, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        if not (self.layer_norm_eps > 0 and min(self.std if isinstance(self.std, tuple) else (self.std,)) > 0):
            raise InputError(f"layer_norm_eps, std: found {self.layer_norm_eps}, {self.std}, expected numbers above 0")
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Length of the sequence the encoder sees: the patches, and the class token where there is one."""
        rows, columns = self.grid
        return rows * columns + (self.classifier == "token")


_SIZES = (
    "patch_size",
    "channels",
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_dim",
    "num_classes",
    "representation_size",
)
_CHOICES = {"classifier": ("token", "gap"), "posemb": ("learn",), "gelu": ("tanh", "erf"), "resnet": (None,)}

# hidden_size, num_layers, num_heads, mlp_dim: table 1 of the paper (arXiv 2010.11929) and table 2 of AugReg
# (arXiv 2106.10270); Nano is vitfn's own, for 32-pixel images on a laptop.
_VARIANTS = {
    "Nano": (64, 3, 4, 256),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}

# name -> what differs from the variant's row; Google fine-tunes L/16 and H/14 with dropout, the others without.
_MODELS: dict[str, dict] = {
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
    "ViT-S_16-gap-norep": {"classifier": "gap"},
    "ViT-S_32-gap-norep": {"classifier": "gap"},
    "ViT-B_16-gap-norep": {"classifier": "gap"},
    "ViT-B_32-gap-norep": {"classifier": "gap"},
}


def model_names() -> tuple[str, ...]:
    """Every name that `get_config` knows, in its long spelling."""
    return tuple(_MODELS)


def get_config(name: str, **overrides) -> ViTConfig:
    """The config of a model by its long (`ViT-B_16`) or short (`B/16`) name, with fields replaced by `overrides`.

    1,000 classes at 224 pixels unless overridden. Raises InputError for a name not in the table, a field that
    ViTConfig does not have, or a value it refuses.
    """
    long_name = name if name.startswith("ViT-") else "ViT-" + name.replace("/", "_")
    if long_name not in _MODELS:
        raise InputError(f"model_type: found {name!r}, expected one of {', '.join(_MODELS)} (short: B/16)")
    if unknown := overrides.keys() - {field.name for field in dataclasses.fields(ViTConfig)}:
        raise InputError(f"{', '.join(sorted(unknown))}: not a field of ViTConfig")
    variant, patch = re.match(r"ViT-([A-Za-z]+)_(\d+)", long_name).groups()  # type: ignore[union-attr]
    hidden_size, num_layers, num_heads, mlp_dim = _VARIANTS[variant]
    fields = {
        "name": long_name,
        "patch_size": int(patch),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
    }
    return ViTConfig(**(fields | _MODELS[long_name] | overrides))
