"""The hybrids' stem: a ResNet with weight-standardised convolutions and group normalisation, as Google computes it.

B batch, C channels, H x W the feature map. Kernels are (height, width, in, out). Section 3.1, 'Hybrid Architecture',
of arXiv 2010.11929; Big Transfer, arXiv 1912.11370, without pre-activation.
"""

import torch.nn.functional as F
from torch import Tensor

from vitfn.config import ResNetConfig
from vitfn.tree import Tree

_GROUPS = 32


def _norm_shapes(channels: int) -> Tree:
    return {"scale": (channels,), "bias": (channels,)}


def unit_shapes(inputs: int, width: int, project: bool) -> Tree:
    """A bottleneck unit from `inputs` to 4 `width` channels."""
    shapes: Tree = {
        "conv1": {"kernel": (1, 1, inputs, width)},
        "gn1": _norm_shapes(width),
        "conv2": {"kernel": (3, 3, width, width)},
        "gn2": _norm_shapes(width),
        "conv3": {"kernel": (1, 1, width, 4 * width)},
        "gn3": _norm_shapes(4 * width),
    }
    if project:
        shapes |= {"conv_proj": {"kernel": (1, 1, inputs, 4 * width)}, "gn_proj": _norm_shapes(4 * width)}
    return shapes


def stem_shapes(config: ResNetConfig, channels: int) -> Tree:
    shapes: Tree = {"conv_root": {"kernel": (7, 7, channels, config.width)}, "gn_root": _norm_shapes(config.width)}
    inputs = config.width
    for stage, units in enumerate(config.num_layers):
        width = config.width * 2**stage
        for unit in range(1, units + 1):
            block = shapes.setdefault(f"block{stage + 1}", {})
            block[f"unit{unit}"] = unit_shapes(inputs, width, project=unit == 1)
            inputs = 4 * width
    return shapes


def _same(x: Tensor, size: int, stride: int, value: float = 0.0) -> Tensor:
    """XLA's SAME padding: ceil(n / stride) outputs, and where the padding is odd its larger half below and right."""
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:]]
    top, left = total[0] // 2, total[1] // 2
    return F.pad(x, (left, total[1] - left, top, total[0] - top), value=value)


def std_conv(params: Tree, x: Tensor, stride: int = 1) -> Tensor:
    """Convolution by a kernel standardised for each output (Qiao et al., arXiv 1903.10520): (B, C, H, W) -> same."""
    kernel = params["kernel"].permute(3, 2, 0, 1).contiguous()  # (out, in, height, width)
    kernel = kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)
    deviation = kernel.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # (out, 1, 1, 1)
    return F.conv2d(_same(x, kernel.shape[2], stride), kernel / (deviation + 1e-5), stride=stride)


def group_norm(params: Tree, x: Tensor) -> Tensor:
    """Group normalisation (Wu and He, arXiv 1803.08494) in 32 groups: (B, C, H, W) -> the same."""
    return F.group_norm(x, _GROUPS, params["scale"], params["bias"], 1e-6)


def unit(params: Tree, x: Tensor, stride: int) -> Tensor:
    """A bottleneck unit (He et al., arXiv 1512.03385): (B, C, H, W) -> (B, 4 width, H / stride, W / stride)."""
    residual = x
    if "conv_proj" in params:
        residual = group_norm(params["gn_proj"], std_conv(params["conv_proj"], x, stride))
    y = group_norm(params["gn1"], std_conv(params["conv1"], x)).relu()
    y = group_norm(params["gn2"], std_conv(params["conv2"], y, stride)).relu()
    y = group_norm(params["gn3"], std_conv(params["conv3"], y))
    return (residual + y).relu()


def stem(params: Tree, images: Tensor, config: ResNetConfig) -> Tensor:
    """Images to a feature map: (B, C, H, W) -> (B, features, H / s, W / s), each division by a stride rounded up."""
    root, pool, *strides = config.strides
    x = group_norm(params["gn_root"], std_conv(params["conv_root"], images, root)).relu()
    x = F.max_pool2d(_same(x, 3, pool, value=float("-inf")), 3, pool)
    for stage, (units, stride) in enumerate(zip(config.num_layers, strides, strict=True), 1):
        for i in range(1, units + 1):
            x = unit(params[f"block{stage}"][f"unit{i}"], x, stride if i == 1 else 1)
    return x
