"""What a caller may get wrong about a model's parameters and images: errors of one line that name the argument."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitfn import tree
from vitfn.config import ViTConfig
from vitfn.errors import InputError, few

_NAMED = 3  # leaves that an error names

Shapes = Mapping[str, Any]  # a tree of shapes


def check_tensor(name: str, found: Any, shape: str) -> None:
    """Raises InputError unless the argument is a tensor; `shape` says of which shape, as in '(B, C, H, W)'."""
    if not isinstance(found, Tensor):
        raise InputError(f"{name}: found {_kind(found)}, expected a torch.Tensor {shape}")


def check_images(images: Any, config: ViTConfig) -> None:
    """Raises InputError unless `images` is a floating-point tensor (B, C, H, W) of the config's size."""
    channels, (height, width) = config.channels, config.image_hw
    expected = f"(B, {channels}, {height}, {width})"
    check_tensor("images", images, expected)
    if images.shape[1:] != (channels, height, width):
        last = images.shape[1:] == (height, width, channels)
        hint = ", which images.permute(0, 3, 1, 2) has" if last else ""
        raise InputError(f"images: found shape {tuple(images.shape)}, expected {expected}{hint}")
    if not images.dtype.is_floating_point:
        what = "floating-point ones, as vitfn.data.augment.normalise makes them of pixels"
        raise InputError(f"images: found {images.dtype}, expected {what}")


def check_labels(labels: Any, count: int) -> None:
    """Raises InputError unless `labels` is a tensor with a label, or weights of the classes, for each image."""
    expected = f"({count},), or weights of the classes ({count}, K)"
    check_tensor("labels", labels, expected)
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise InputError(f"labels: found shape {tuple(labels.shape)}, expected {expected}")


def check_params(params: Any, config: ViTConfig, shapes: Shapes) -> None:
    """Raises InputError unless `params` has the leaves of the config's tree of shapes, no others, and all are tensors.

    Of a config without head they may have one: its features are what it is asked for.
    """
    if not config.num_classes and isinstance(params, Mapping) and "head" in params:
        params = {name: child for name, child in params.items() if name != "head"}
    if not _alike(params, shapes):
        raise InputError(f"params: {_difference(params, tree.flatten(shapes))}")


def _alike(found: Any, wanted: Shapes) -> bool:
    """Whether the trees have the same names, and tensors of the shapes: one quick pass, since each `apply` makes it."""
    if not isinstance(found, dict) and not isinstance(found, Mapping):  # the second takes longer
        return False
    if len(found) != len(wanted):
        return False
    for name, shape in wanted.items():
        leaf = found.get(name)
        if type(shape) is tuple:
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                return False
        elif not _alike(leaf, shape):
            return False
    return True


def _difference(params: Any, wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What was found in place of the model's tree, and what was expected."""
    if not isinstance(params, Mapping):
        return f"found {_kind(params)}, expected a nested dict of tensors, as vitfn.init makes it"
    if list(params) == ["params"]:
        return "found {'params': ...}, expected the tree in it: params['params']"
    found = tree.flatten(params)
    if missing := [path for path in wanted if path not in found]:
        return f"found no {few(missing)}, expected the leaves of vitfn.shapes(config)"
    if extra := [path for path in found if path not in wanted]:
        return f"found {few(extra)}, expected no leaves but those of vitfn.shapes(config)"
    if others := [path for path, leaf in found.items() if not isinstance(leaf, Tensor)]:
        return f"found {_kind(found[others[0]])} at {few(others)}, expected torch.Tensor: torch.as_tensor makes it"
    if others := [path for path in wanted if found[path].shape != wanted[path]]:
        shapes = [f"{path} of shape {tuple(found[path].shape)}" for path in others]
        return f"found {few(shapes)}, expected {', '.join(str(wanted[path]) for path in others[:_NAMED])}"
    return "found a flat dict, expected a nested one: vitfn.tree.unflatten(params)"


def mixed_dtypes(params: Mapping[str, Any], images: Tensor) -> str:
    """What is wrong where torch would not multiply: whose dtype differs from the others'; '' where none does."""
    found = tree.flatten(params)
    if images.dtype not in (dtypes := list(dict.fromkeys(leaf.dtype for leaf in found.values()))):
        return f"images: found {images.dtype}, expected the parameters' {' or '.join(map(str, dtypes))}"
    if others := [path for path, leaf in found.items() if leaf.dtype != images.dtype]:
        return f"params: found {found[others[0]].dtype} at {few(others)}, expected the images' {images.dtype}"
    return ""


def _kind(found: Any) -> str:
    return f"{type(found).__module__}.{type(found).__qualname__}".removeprefix("builtins.")
