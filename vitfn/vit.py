"""The Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): images to logits, as functions of a parameter tree.

B batch, C channels, P patch size, N tokens, D hidden size, R width of pre_logits, K classes.
"""

import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitfn import arguments, layers, resnet, rng, tree
from vitfn.config import ViTConfig
from vitfn.errors import InputError
from vitfn.tree import Tree


def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path, in the order of Google's files; nothing is allocated."""
    P, D, R, K = config.patch_size, config.hidden_size, config.representation_size, config.num_classes
    nested: Tree = {} if config.resnet is None else resnet.stem_shapes(config.resnet, config.channels)
    if config.classifier == "token":
        nested["cls"] = (1, 1, D)
    nested["embedding"] = {
        "kernel": (P, P, config.resnet.features if config.resnet else config.channels, D),
        "bias": (D,),
    }
    positions = {"posembed_input": {"pos_embedding": (1, config.num_tokens, D)}} if config.posemb == "learn" else {}
    nested["Transformer"] = {
        **positions,
        **{f"encoderblock_{i}": layers.block_shapes(config) for i in range(config.num_layers)},
        "encoder_norm": layers.layer_norm_shapes(config),
    }
    if config.classifier == "map":
        nested["MAPHead_0"] = layers.map_head_shapes(config)
    if R:
        nested["pre_logits"] = layers.dense_shapes(D, R)
    if K:
        nested["head"] = layers.dense_shapes(R or D, K)
    return tree.flatten(nested)


@functools.lru_cache
def _shape_tree(config: ViTConfig) -> Tree:
    return tree.unflatten(shapes(config))


def check(params: Tree, images: Tensor, config: ViTConfig) -> None:
    """Raises InputError unless images (B, C, H, W) are of the config's size, and params have the leaves of `shapes`.

    Where Dynamo traces, the tree is not checked.
    """
    arguments.check_images(images, config)
    if not torch.compiler.is_dynamo_compiling():
        arguments.check_params(params, config, _shape_tree(config))


def _xavier_uniform(leaf: Tensor, generator: torch.Generator, inputs: int) -> Tensor:
    """Glorot and Bengio, 2010: U(-a, a), a = sqrt(6 / (inputs + outputs)) of the kernel seen as a matrix."""
    limit = math.sqrt(6 / (inputs + leaf.numel() // inputs))
    return leaf.uniform_(-limit, limit, generator=generator)


def _lecun_normal(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """LeCun et al., 1998, as JAX has it: a normal cut at two standard deviations, rescaled to variance 1 / inputs."""
    std = math.sqrt(leaf.shape[-1] / leaf.numel()) / 0.87962566103423978
    return torch.nn.init.trunc_normal_(leaf, 0.0, std, -2 * std, 2 * std, generator=generator)


def _big_vision_positions(leaf: Tensor, generator: torch.Generator, token: bool) -> Tensor:
    """N(0, 1 / D), and for a class token -0.0, which changes nothing that it is added to."""
    leaf.normal_(0, leaf.shape[-1] ** -0.5, generator=generator)
    leaf[:, : int(token)] = -0.0
    return leaf


# Google's initialisers by path: the first pattern that matches the whole path decides.
_INITIALISERS: list[tuple[str, Callable[[Tensor, torch.Generator], Tensor]]] = [
    (r".*/(query|key|value)/kernel", lambda x, g: _xavier_uniform(x, g, x.shape[0])),
    (r".*/out/kernel", lambda x, g: _xavier_uniform(x, g, x.shape[0] * x.shape[1])),
    (r".*/Dense_\d/kernel", lambda x, g: _xavier_uniform(x, g, x.shape[0])),
    (r".*/Dense_\d/bias", lambda x, g: x.normal_(0, 1e-6, generator=g)),
    (r".*/pos_embedding", lambda x, g: x.normal_(0, 0.02, generator=g)),
    (r".*/probe", lambda x, g: _xavier_uniform(x, g, 1)),
    (r"embedding/kernel|pre_logits/kernel|.*conv[^/]*/kernel", _lecun_normal),
    (r".*/gn3/scale", lambda x, g: x.zero_()),  # a residual unit begins as the identity
    (r".*/scale", lambda x, g: x.fill_(1)),
    (r".*", lambda x, g: x.zero_()),  # biases, the class token, the head
]


def init(
    config: ViTConfig,
    seed: int = 0,
    place: Callable[[str, Tensor], Tensor] = lambda path, leaf: leaf,
    *,
    init_head_bias: float = 0.0,
    positions: Literal["google", "big_vision"] = "google",
) -> Tree:
    """Fresh float32 parameters on the CPU; each leaf is a function of (seed, path, shape) and of the options alone.

    `place(path, leaf)` may put each one elsewhere, or keep a part of it, before the next is made. The rest is what
    big_vision does otherwise from scratch: `init_head_bias` fills the head's bias, so that a sigmoid loss begins small
    (its configs have -6.9 for ImageNet-1k and -10 for ImageNet-21k); learned `positions` are N(0, 0.02^2) for every
    token as 'google' has them, or N(0, 1 / D) as 'big_vision' does, which has none for a class token: that is -0.0.
    Raises InputError for other positions, and for a bias where there is no head.
    """
    if positions not in ("google", "big_vision"):
        raise InputError(f"positions: found {positions!r}, expected google or big_vision")
    if init_head_bias and not config.num_classes:
        raise InputError(f"init_head_bias: found {init_head_bias}, expected 0 for a model without head")
    initialisers = [("head/bias", lambda x, g: x.fill_(init_head_bias)), *_INITIALISERS]
    if positions == "big_vision":
        token = config.classifier == "token"
        initialisers.insert(0, (".*/pos_embedding", lambda x, g: _big_vision_positions(x, g, token)))

    def leaf(path: str, shape: tuple[int, ...]) -> Tensor:
        initialise = next(function for pattern, function in initialisers if re.fullmatch(pattern, path))
        generator = torch.Generator().manual_seed(rng.fold_in(rng.stream(seed, "init"), zlib.crc32(path.encode())))
        return initialise(torch.empty(shape), generator)

    return tree.unflatten({path: place(path, leaf(path, shape)) for path, shape in shapes(config).items()})


def sincos2d(config: ViTConfig, like: Tensor) -> Tensor:
    """Fixed sine and cosine position embeddings of MoCo v3 (arXiv 2104.02057) and big_vision: (1, N, D).

    Zeros for a class token.
    """
    quarter = config.hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, device=like.device, dtype=torch.float32) / (quarter - 1))
    rows, columns = (torch.arange(n, device=like.device, dtype=torch.float32) for n in config.grid)
    y = (rows[:, None] * omega).repeat_interleave(len(columns), 0)  # (N, D / 4)
    x = (columns[:, None] * omega).repeat(len(rows), 1)
    of_patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]
    return F.pad(of_patches, (0, 0, int(config.classifier == "token"), 0)).to(like.dtype)


def positions(params: Tree, config: ViTConfig, like: Tensor) -> Tensor:
    """The position embeddings, a class token's first: learned, or fixed ones, placed like `like`: (1, N, D)."""
    if config.posemb == "sincos2d":
        return sincos2d(config, like)
    return params["Transformer"]["posembed_input"]["pos_embedding"]


def embed(params: Tree, images: Tensor, config: ViTConfig) -> Tensor:
    """Equation 1: patch embedding, class token first, plus position embedding: (B, C, H, W) -> (B, N, D)."""
    P, (rows, columns) = config.patch_size, config.grid
    if config.resnet:
        images = resnet.stem(params, images, config.resnet)[:, :, : rows * P, : columns * P]
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=P, q=P)  # (B, N, P P C)
    kernel = params["embedding"]["kernel"].flatten(0, 2)  # (P P C, D)
    x = layers.dense({"kernel": kernel, "bias": params["embedding"]["bias"]}, patches)  # (B, N, D)
    places = positions(params, config, x)  # (1, N, D)
    if config.classifier != "token":
        return x + places
    # the class token is added to its position before it is copied for each image: gradients that share no memory
    first = params["cls"].to(x.dtype) + places[:, :1]  # (1, 1, D)
    return torch.cat([first.expand(len(x), 1, -1), x + places[:, 1:]], dim=1)


def head(
    params: Tree, x: Tensor, config: ViTConfig, classify: Callable[..., Tensor] = layers.dense, fused: bool = False
) -> Tensor:
    """Encoded tokens to logits, equation 4 and the optional tanh layer of section 3.1: (B, N, D) -> (B, K).

    Without a head, the pooled features (B, D) or (B, R). `classify` makes something else of the head's parameters and
    these features. `fused` is `layers.block`'s.
    """
    if config.classifier == "map":
        x = layers.map_head(params["MAPHead_0"], x, config, fused)  # (B, D)
    else:
        x = x[:, 0] if config.classifier == "token" else x.mean(dim=1)  # (B, D)
    if config.representation_size:
        x = layers.dense(params["pre_logits"], x).tanh()  # (B, R)
    return classify(params["head"], x) if config.num_classes else x


def dropout_keys(config: ViTConfig, seed: int, step: int | Tensor, sample: Tensor) -> Tensor:
    """The dropout keys of each layer, of four places in it, for each sample (B,): (layers + 1, 4, B) int64.

    Row 0 is for the embedded tokens (one place), row i + 1 for encoder block i.
    """
    keys = rng.fold_in(rng.fold_in(rng.stream(seed, "dropout"), step), sample)  # (B,)
    places = torch.arange(4 * (config.num_layers + 1), device=sample.device)
    return rng.fold_in(keys, places[:, None]).reshape(-1, 4, len(sample))


def branch_factors(config: ViTConfig, keys: Tensor) -> Tensor:
    """Stochastic depth (Huang et al., arXiv 1603.09382): a factor for each block, branch and sample, (layers, 2, B).

    A branch of block i is dropped with probability rate * i / (layers - 1), and scaled by 1 / (1 - that) where it
    stays. `keys` are dropout's.
    """
    layers = config.num_layers
    rates = torch.arange(layers, device=keys.device).float() * (config.stochastic_depth_rate / max(1, layers - 1))
    rates = rates[:, None, None]
    return (rng.uniform(rng.fold_in(keys[1:, 1::2], 1)) >= rates) / (1 - rates)


def forward(
    params: Tree,
    images: Tensor,
    config: ViTConfig,
    keys: Tensor | None = None,
    captured: Tree | None = None,
    block: Callable[..., Tensor] = layers.block,
    classify: Callable[..., Tensor] = layers.dense,
    fused: bool = False,
) -> Tensor:
    """`apply`, (B, C, H, W) -> (B, K), with the dropout `keys` made and intermediates kept in a given dict.

    `block` may be compiled, `classify` is `head`'s, and `fused` is `layers.block`'s for the whole model.

    With class-token pooling the last block computes that token alone, unless intermediates are asked for.
    """
    x = embed(params, images, config)
    if captured is not None:
        captured["embedded"] = x
    x = layers.dropout(x, config.dropout_rate, None if keys is None else keys[0, 0])
    branches = None if keys is None or not config.stochastic_depth_rate else branch_factors(config, keys)
    pooled = captured is None and config.classifier == "token"  # of the last block the class token alone is used
    for i in range(config.num_layers):
        name = f"encoderblock_{i}"
        taps = None if captured is None else captured.setdefault(name, {})
        x = block(
            params["Transformer"][name],
            x,
            config,
            None if keys is None else keys[i + 1],
            taps,
            fused,
            None if branches is None else branches[i],
            pooled and i == config.num_layers - 1,
        )
        if taps is not None:
            taps["tokens"] = x
    x = layers.layer_norm(params["Transformer"]["encoder_norm"], x, config, fused)
    if captured is not None:
        captured["encoded"] = x
    return head(params, x, config, classify, fused)


def apply(
    params: Tree,
    images: Tensor,
    config: ViTConfig,
    *,
    seed: int | None = None,
    step: int | Tensor | None = None,
    sample: Tensor | None = None,
    capture: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, K) of normalised images (B, C, H, W); a pure function, on which every torch.func transform works.

    A model without head returns its pooled features instead. Dropout is active where `seed` and `step` are given: the
    masks are a function of them and of `sample` (B,) int64, each image's place in the global batch (0 to B - 1 by
    default). With `capture`, a regular expression over whole names, the result is (logits, {name: tensor}); the names
    are `embedded`, for each block `encoderblock_0/weights` (B, H, N, N), `encoderblock_0/activations` (B, N, M) and
    `encoderblock_0/tokens` (B, N, D), and `encoded`. Raises InputError for parameters that are not a tree of
    the config's leaves, for images that are not the config's, and for dtypes that do not go together.
    """
    check(params, images, config)
    if (seed is None) != (step is None) or (seed is None and sample is not None):
        given = {"seed": seed, "step": step, "sample": sample}
        found = ", ".join(name for name, value in given.items() if value is not None)
        raise InputError(f"seed, step: found {found} alone, expected both, which draw the dropout, or neither")
    keys = None
    if seed is not None and step is not None:
        places = torch.arange(len(images), device=images.device) if sample is None else sample
        keys = dropout_keys(config, seed, step, places)
    captured: Tree | None = None if capture is None else {}
    try:
        logits = forward(params, images, config, keys, captured)
    except RuntimeError as error:
        if "type" in str(error) and (wrong := arguments.mixed_dtypes(params, images)):
            raise InputError(wrong) from error
        raise
    return logits if captured is None else (logits, tree.select(captured, str(capture)))
