"""What a model looks at, as functions of its attention weights and of its parameters.

B batch, L layers, H heads, N tokens, D hidden size, (h, w) the grid of patches, P patch size, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitfn import layers
from vitfn.config import ViTConfig
from vitfn.tree import Tree
from vitfn.vit import apply, positions


def rollout(weights: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928): weights (L, B, H, N, N) -> (B, N, N).

    Row i tells how much of each embedded token is in token i at the end, if values passed through attention and the
    residual branch alone: the product over the layers of (mean over heads + identity) / 2.
    """
    mixed = torch.eye(weights.shape[-1], device=weights.device)
    for layer in weights.mean(2):  # (B, N, N)
        mixed = (layer + torch.eye(layer.shape[-1], device=layer.device)) / 2 @ mixed
    return mixed


def relevance(weights: Tensor, gradients: Tensor) -> Tensor:
    """Gradient-weighted relevance (Chefer et al., arXiv 2103.15679, equations 5 and 6) -> (B, N, N).

    `weights` and the gradients of a class's logits for them are (L, B, H, N, N). Row i tells what of each embedded
    token speaks for the class through token i: R <- R + mean over heads of max(gradient * weight, 0) R.
    """
    relevant = torch.eye(weights.shape[-1], device=weights.device)
    for layer, gradient in zip(weights, gradients, strict=True):
        relevant = relevant + (gradient * layer).clamp(min=0).mean(1) @ relevant
    return relevant


def attend(params: Tree, images: Tensor, config: ViTConfig) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Logits (B, K), each layer's attention weights (B, H, N, N), and which part each token has in the result (B, N).

    That part is 1 for the class token, 1 / N under average pooling, or the pooling head's own attention.
    """
    logits, found = apply(params, images, config, capture=r".*/weights|encoded")
    encoded = found.pop("encoded")  # (B, N, D)
    if config.classifier == "map":
        taps: Tree = {}
        head = params["MAPHead_0"]
        layers.attention_pooling(head["MultiHeadDotProductAttention_0"], encoded, head["probe"][0], config, taps=taps)
        part = taps["weights"].mean(1)[:, 0]  # (B, N)
    elif config.classifier == "gap":
        part = torch.full_like(encoded[..., 0], 1 / encoded.shape[1])
    else:
        part = torch.zeros_like(encoded[..., 0])
        part[:, 0] = 1
    return logits, tuple(found.values()), part


class Explained(NamedTuple):
    """What `attend` finds, and the gradients of a class's logits for the attention weights: None without classes."""

    logits: Tensor  # (B, K)
    weights: Tensor  # (L, B, H, N, N)
    gradients: Tensor | None  # (L, B, H, N, N)
    part: Tensor  # (B, N)


def explain(params: Tree, images: Tensor, config: ViTConfig, label: int | None = None) -> Explained:
    """The attention behind the logits of class `label`, by default of each image's likeliest."""
    if not config.num_classes:
        with torch.no_grad():
            logits, weights, part = attend(params, images, config)
        return Explained(logits, torch.stack(weights), None, part)
    with torch.enable_grad():
        logits, weights, part = attend(params, images.detach().requires_grad_(), config)
        of_class = logits.amax(-1) if label is None else logits[:, label]  # (B,)
        gradients = torch.autograd.grad(of_class.sum(), weights)
    return Explained(logits.detach(), torch.stack(weights).detach(), torch.stack(gradients), part.detach())


def on_grid(of_tokens: Tensor, config: ViTConfig) -> Tensor:
    """What is said of each token, without the class token, by the place of its patch: (..., N) -> (..., h, w)."""
    h, w = config.grid
    return of_tokens[..., -h * w :].unflatten(-1, (h, w))


def distances(weights: Tensor, config: ViTConfig) -> Tensor:
    """How far heads look, in pixels: (L, B, H, N, N) -> (L, H), as in figure 7 of arXiv 2010.11929.

    The mean over images and patches of the distance to the patches that are attended to, weighted by attention.
    """
    h, w = config.grid
    rows, columns = (side / n * torch.arange(n).float() for side, n in zip(config.image_hw, (h, w), strict=True))
    places = torch.cartesian_prod(rows, columns)  # (h w, 2)
    between = torch.cdist(places, places).to(weights.device)  # (h w, h w)
    patches = weights[..., -h * w :, -h * w :]
    return ((patches * between).sum(-1) / patches.sum(-1)).mean((1, 3))


def position_similarity(params: Tree, config: ViTConfig) -> Tensor:
    """Cosine similarity of each patch's position embedding with all others': (h, w, h, w), -1 to 1."""
    h, w = config.grid
    places = positions(params, config, torch.empty(0))[0, -h * w :]  # (h w, D)
    unit = torch.nn.functional.normalize(places, dim=-1)
    return (unit @ unit.T).unflatten(1, (h, w)).unflatten(0, (h, w))


def filters(params: Tree, count: int = 28) -> Tensor:
    """The first principal components of the patch embedding's filters, or of a stem's: (count, P, P, C), each 0 to 1.

    Fewer than `count` where there are fewer. As in figure 7 of arXiv 2010.11929.
    """
    kernel = params["conv_root"]["kernel"] if "conv_root" in params else params["embedding"]["kernel"]  # (P, P, C, D)
    each = kernel.flatten(0, 2).T  # (D, P P C)
    components = torch.linalg.svd(each - each.mean(0), full_matrices=False).Vh[:count]
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    return ((components - low) / (high - low)).unflatten(1, kernel.shape[:3])
