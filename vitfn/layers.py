"""The layers as pure functions of (parameters, input): shapes and formula side by side.

B batch, N tokens, D hidden size, H heads, d = D / H, M the MLP's width. Kernels are (in, out).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn import rng
from vitfn.config import ViTConfig
from vitfn.tree import Tree


def dense_shapes(inputs: int, outputs: int) -> Tree:
    """The shapes of a dense layer: kernel (I, O), bias (O,)."""
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def affine(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """x W + b: (..., I) -> (..., O). One product, whose gradient for W has W's own memory layout."""
    return torch.addmm(bias, x.flatten(0, -2), kernel).unflatten(0, x.shape[:-1])


def dense(params: Tree, x: Tensor) -> Tensor:
    """A dense layer: (..., I) -> (..., O)."""
    return affine(x, params["kernel"], params["bias"])


def layer_norm_shapes(config: ViTConfig) -> Tree:
    """The shapes of layer normalisation: scale and bias (D,)."""
    return {"scale": (config.hidden_size,), "bias": (config.hidden_size,)}


def layer_norm(params: Tree, x: Tensor, config: ViTConfig, fused: bool = False) -> Tensor:
    """Layer normalisation over features (Ba et al., arXiv 1607.06450): (..., D) -> (..., D).

    Written out: torch's own, which `fused` takes, has a forward derivative whose derivatives are wrong without a word
    (pytorch issue 196700). ONNX, which is traced, has an operator for it.
    """
    scale, bias = params["scale"], params["bias"]
    if fused or torch.jit.is_tracing():
        return F.layer_norm(x, x.shape[-1:], scale, bias, config.layer_norm_eps)
    y = x.to(torch.promote_types(x.dtype, torch.float32))  # under float16 a square may not be finite
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + config.layer_norm_eps).rsqrt()
    return (y * scale + bias).to(x.dtype)


def dropout(x: Tensor, rate: float, keys: Tensor | None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Inverted dropout (Srivastava et al., JMLR 2014): (B, ...) -> (B, ...).

    The mask hashes the samples' keys (B,) and the element's place in `x`; without keys nothing is dropped. Where `x` is
    the leading part of something of a `shape`, without B, the places are those in it.
    """
    if keys is None or rate == 0:
        return x
    keep = rng.bits(keys, *(shape or x.shape[1:])) >= int(rate * 2**32)
    return torch.where(keep[tuple(slice(n) for n in x.shape)], x / (1 - rate), 0)


def branch(x: Tensor, branches: Tensor | None, place: int) -> Tensor:
    """What a residual branch adds, multiplied by its factor for each sample: (B, N, D) -> (B, N, D)."""
    return x if branches is None else x * branches[place, :, None, None]


def attention_shapes(config: ViTConfig) -> Tree:
    """The shapes of query, key and value: kernel (D, H, d), bias (H, d); of out: kernel (H, d, D), bias (D,)."""
    D, H = config.hidden_size, config.num_heads
    project = {"kernel": (D, H, D // H), "bias": (H, D // H)}
    return {
        "query": project,
        "key": project,
        "value": project,
        "out": {"kernel": (H, D // H, D), "bias": (D,)},
    }


def attention(
    params: Tree,
    x: Tensor,
    config: ViTConfig,
    key: Tensor | None = None,
    taps: Tree | None = None,
    fused: bool = False,
) -> Tensor:
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V (appendix A of arXiv 2010.11929): (B, N, D) -> (B, N, D).

    The key's bias is never added: it moves all scores of a query by the same amount, which softmax takes away again.
    """

    def heads(y: Tensor) -> Tensor:  # (B, N, H d) -> (B, H, N, d)
        return y.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)

    query, value, out = params["query"], params["value"], params["out"]
    q = heads(affine(x, query["kernel"].flatten(1), query["bias"].flatten()))
    k = heads(x @ params["key"]["kernel"].flatten(1))
    v = heads(affine(x, value["kernel"].flatten(1), value["bias"].flatten()))
    if fused and taps is None and (key is None or config.attention_dropout_rate == 0):
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, d)
    else:
        weights = (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(-1)  # (B, H, N, N)
        if taps is not None:
            taps["weights"] = weights
        N = x.shape[1]
        y = dropout(weights, config.attention_dropout_rate, key, (config.num_heads, N, N)).to(v.dtype) @ v
    return affine(y.transpose(1, 2).flatten(2), out["kernel"].flatten(0, 1), out["bias"])  # (B, N, D)


def attention_pooling(
    params: Tree, x: Tensor, query: Tensor, config: ViTConfig, key: Tensor | None = None, taps: Tree | None = None
) -> Tensor:
    """What one query an image (B, D), or one for all (1, D), sees of the tokens x: (B, N, D) -> (B, D).

    Attention's numbers for less work, since no token's key or value is computed: q (W_k x) = (q W_k) x, and the sum of
    weighted values is W_v times the weighted sum.
    """

    def by_head(kernel: Tensor) -> Tensor:  # (D, H, d) -> (H, D, d), with gradients that lie as the kernel does
        return torch.stack(kernel.unbind(1))

    H, N = config.num_heads, x.shape[1]
    ask, value, out = params["query"], params["value"], params["out"]
    q = affine(query, ask["kernel"].flatten(1), ask["bias"].flatten())  # (B, D)
    q = q.unflatten(1, (H, -1)).transpose(0, 1) / math.sqrt(q.shape[1] // H)  # (H, B, d)
    asked = (q @ by_head(params["key"]["kernel"]).mT).transpose(0, 1)  # (B, H, D)
    weights = (asked @ x.mT).softmax(-1)[:, :, None]  # (B, H, 1, N)
    if taps is not None:
        taps["weights"] = weights
    kept = dropout(weights, config.attention_dropout_rate, key, (H, N, N))[:, :, 0]  # (B, H, N)
    seen = (kept.to(x.dtype) @ x).transpose(0, 1)  # (H, B, D)
    y = (seen @ by_head(value["kernel"])).transpose(0, 1)  # (B, H, d)
    dropping = key is not None and config.attention_dropout_rate > 0
    y = y + value["bias"] * (kept.sum(-1, keepdim=True) if dropping else 1)  # what all weights add up to
    return affine(y.flatten(1), out["kernel"].flatten(0, 1), out["bias"])


def gelu(x: Tensor, form: str) -> Tensor:
    """The GELU (Hendrycks and Gimpel, arXiv 1606.08415), `form` 'tanh' or 'erf': (...) -> (...).

    (1 + tanh(u)) / 2 is sigmoid(2 u), which costs a compiled CPU kernel a third: what is compiled takes that.
    """
    if form == "tanh" and torch.compiler.is_dynamo_compiling():
        y = x.float()  # under float16 its square may not be finite
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


def mlp_shapes(config: ViTConfig) -> Tree:
    """The shapes of the two dense layers, (D, M) and (M, D)."""
    D, M = config.hidden_size, config.mlp_dim
    return {"Dense_0": dense_shapes(D, M), "Dense_1": dense_shapes(M, D)}


def mlp(params: Tree, x: Tensor, config: ViTConfig, key: Tensor | None = None, taps: Tree | None = None) -> Tensor:
    """Two dense layers around a GELU: (B, N, D) -> (B, N, D)."""
    x = gelu(dense(params["Dense_0"], x), config.gelu)  # (B, N, M)
    if taps is not None:
        taps["activations"] = x
    return dense(params["Dense_1"], dropout(x, config.dropout_rate, key))


def block_shapes(config: ViTConfig) -> Tree:
    """The shapes of an encoder block, by the names of Google's files of 2020."""
    return {
        "LayerNorm_0": layer_norm_shapes(config),
        "MultiHeadDotProductAttention_1": attention_shapes(config),
        "LayerNorm_2": layer_norm_shapes(config),
        "MlpBlock_3": mlp_shapes(config),
    }


def attended(
    params: Tree,
    x: Tensor,
    config: ViTConfig,
    key: Tensor | None = None,
    taps: Tree | None = None,
    fused: bool = False,
    pooled: bool = False,
) -> Tensor:
    """The attention branch of the encoder block with its norm: (B, N, D) -> (B, N, D), or `pooled` (B, 1, D)."""
    y = layer_norm(params["LayerNorm_0"], x, config, fused)
    if pooled:
        return attention_pooling(params["MultiHeadDotProductAttention_1"], y, y[:, 0], config, key, taps)[:, None]
    return attention(params["MultiHeadDotProductAttention_1"], y, config, key, taps, fused)


def block(
    params: Tree,
    x: Tensor,
    config: ViTConfig,
    keys: Tensor | None = None,
    taps: Tree | None = None,
    fused: bool = False,
    branches: Tensor | None = None,
    pooled: bool = False,
    attended: Callable[..., Tensor] = attended,
) -> Tensor:
    """The pre-norm encoder block, equations 2 and 3 of arXiv 2010.11929: (B, N, D) -> (B, N, D).

    `keys` (4, B) draw the dropout masks of the attention weights, the attention's output, the MLP's activations and
    the MLP's output. A dict given as `taps` receives the attention weights (B, H, N, N) and the activations
    (B, N, M). `fused` takes torch's fused attention and layer norm, which are faster, for first-order reverse-mode
    gradients only. `branches` (2, B) multiplies what attention and MLP add to each sample (stochastic depth). `pooled`,
    the result is of the first token alone, (B, 1, D), and as little is computed.
    """
    k0, k1, k2, k3 = (None,) * 4 if keys is None else keys
    y = attended(params, x, config, k0, taps, fused, pooled)
    x = (x[:, :1] if pooled else x) + branch(dropout(y, config.dropout_rate, k1), branches, 0)
    y = layer_norm(params["LayerNorm_2"], x, config, fused)
    y = mlp(params["MlpBlock_3"], y, config, k2, taps)
    return x + branch(dropout(y, config.dropout_rate, k3), branches, 1)


def map_head_shapes(config: ViTConfig) -> Tree:
    """The shapes of the pooling head: probe (1, 1, D), attention, layer normalisation, MLP."""
    return {
        "probe": (1, 1, config.hidden_size),
        "MultiHeadDotProductAttention_0": attention_shapes(config),
        "LayerNorm_0": layer_norm_shapes(config),
        "MlpBlock_0": mlp_shapes(config),
    }


def map_head(params: Tree, x: Tensor, config: ViTConfig, fused: bool = False) -> Tensor:
    """Multi-head attention pooling (Lee et al., arXiv 1810.00825; Zhai et al., arXiv 2106.04560): (B, N, D) -> (B, D).

    A learned probe attends to all tokens; a residual MLP follows. There is no dropout in it.
    """
    x = attention_pooling(params["MultiHeadDotProductAttention_0"], x, params["probe"][0], config)  # (B, D)
    y = mlp(params["MlpBlock_0"], layer_norm(params["LayerNorm_0"], x, config, fused), config)
    return x + y
