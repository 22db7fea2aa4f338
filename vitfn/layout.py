"""What a layout is: the names and shapes under which a family of files stores the canonical tree."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from vitfn.config import ViTConfig

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How the arrays of a family of files are named and shaped.

    `anchor` matches the name of the patch embedding's kernel in such a file, and its first group a prefix that all
    names share. `paths(name, shape)` are the canonical paths of an array's equal parts along its first axis, none for a
    name that the layout does not have. `own(path, config)` is the inverse: the name of the array that a leaf is part
    of, empty where the layout has no place for it. `part(path, shape, parts)` is a part's shape in the tree, as far as
    it is known without the number of heads. `store(path, leaf)` is the part that a leaf becomes, and `restore(path,
    part)` a view of the part with the leaf's numbers in order. `assumed` are fields of the config that such files do
    not state, where they are other than Google's; `ignored` matches the names of what is not the model's; `classifiers`
    are those that the family's own code has; `prefix` is written before every name.
    """

    name: str
    anchor: str
    paths: Callable[[str, Shape], tuple[str, ...]]
    own: Callable[[str, ViTConfig], str]
    part: Callable[[str, Shape, int], Shape]
    store: Callable[[str, Tensor], Tensor]
    restore: Callable[[str, Tensor], Tensor]
    assumed: dict[str, Any] = {}  # noqa: RUF012, never written
    ignored: str = r"(?!)"
    classifiers: tuple[str, ...] = ("token", "gap", "map")
    prefix: str = ""


# torch's arrays: kernels are (out, in) or, of a convolution, (out, in, height, width), and heads are not told apart.


def torch_part(path: str, shape: Shape, parts: int) -> Shape:
    if parts > 1 and shape:
        shape = (shape[0] // parts, *shape[1:])
    if path.endswith("pos_embedding") and len(shape) == 2:
        return (1, *shape)
    if not path.endswith("kernel"):
        return shape
    return (*shape[2:], *shape[1::-1]) if len(shape) == 4 else shape[::-1]


def torch_store(path: str, leaf: Tensor) -> Tensor:
    if path.endswith("pos_embedding") or path in ("cls", "MAPHead_0/probe"):
        return leaf
    if not path.endswith("kernel"):
        return leaf.flatten()  # (H, d) -> (D,)
    if leaf.ndim == 4:
        return leaf.permute(3, 2, 0, 1)
    return (leaf.flatten(0, -2) if path.endswith("out/kernel") else leaf.flatten(1)).T  # (H, d, D) or (D, H, d)


def torch_restore(path: str, part: Tensor) -> Tensor:
    if not path.endswith("kernel"):
        return part
    return part.permute(2, 3, 1, 0) if part.ndim == 4 else part.T


class _Template:
    """A name with numbers in it: `{}`, or `{-1}` for one that the file counts from 0 and the tree from 1."""

    def __init__(self, text: str):
        self._pieces = re.split(r"\{(?:-1)?\}", text)
        self._offsets = [number == "{-1}" for number in re.findall(r"\{(?:-1)?\}", text)]
        self._pattern = re.compile(r"(0|[1-9]\d{0,3})".join(map(re.escape, self._pieces)))

    def numbers(self, name: str) -> list[int] | None:
        """The numbers in the name, as the tree counts them; None for another name."""
        if match := self._pattern.fullmatch(name):
            return [int(number) + offset for number, offset in zip(match.groups(), self._offsets, strict=True)]
        return None

    def name(self, numbers: list[int]) -> str:
        given = [str(number - offset) for number, offset in zip(numbers, self._offsets, strict=True)]
        return "".join(a + b for a, b in zip(self._pieces, [*given, ""], strict=True))


def _rules(table: dict[str, str]) -> Iterator[tuple[_Template, list[_Template]]]:
    for own, canonical in table.items():
        norm = re.search(r"(LayerNorm_\d|encoder_norm|gn[^/]*)/\*$", canonical)
        leaves = (("weight", "scale" if norm else "kernel"), ("bias", "bias")) if "*" in canonical else (("", ""),)
        for theirs, ours in leaves:
            paths = canonical.replace("*", ours)
            choice = re.search(r"\((.*)\)", paths)
            together = [paths.replace(choice[0], name) for name in choice[1].split(",")] if choice else [paths]
            yield _Template(own.replace("*", theirs)), [_Template(path) for path in together]


def renaming(table: dict[str, str]) -> tuple[Callable[[str, Shape], tuple[str, ...]], Callable[[str], str]]:
    """A layout's `paths`, and `own` without the config, by a table {own template: canonical template}.

    `*` stands for weight and bias, which are kernel (in a norm: scale) and bias; `(query,key,value)` for leaves that
    are one array, in this order. Of several templates for a path, the first is written.
    """
    rules = list(_rules(table))

    def paths(name: str, shape: Shape) -> tuple[str, ...]:
        for own, canonical in rules:
            if (numbers := own.numbers(name)) is not None:
                return tuple(template.name(numbers) for template in canonical)
        return ()

    def own(path: str) -> str:
        for template, canonical in rules:
            for one in canonical:
                if (numbers := one.numbers(path)) is not None:
                    return template.name(numbers)
        return ""

    return paths, own
