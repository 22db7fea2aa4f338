"""Pickles read without unpickling.

A pickle is a program. This one is not run: its instructions are followed as far as dicts of tensors need them, and
nothing that it names is looked up, made or called. What training scripts keep beside the weights (arguments, numpy's
numbers, paths, the state of an optimizer) becomes an inert `Object`, whatever its class. That is stricter than
torch.load(weights_only=True), which lets a file build byte arrays of any size and tensors larger than their memory.
"""

import math
import pickletools
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch

_STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


class Object(NamedTuple):
    """A class, a function, or what it would have made: of either the name, 'module name', is all that is kept."""

    name: str


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class Strided(NamedTuple):
    """A tensor, as far as a pickle tells of it: a view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """From its first element to its last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if self.numel else 0


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, lazy: Any = None
) -> Strided | Object:
    """torch._utils._rebuild_tensor_v2, without a tensor."""
    if lazy:
        raise ValueError("a tensor that is yet to be computed")
    if isinstance(storage, Object):
        return storage  # of a kind of numbers that no weights are
    if not isinstance(storage, Storage):
        raise ValueError("a tensor of something else than numbers")
    numbers = (offset, *shape, *stride)
    tensor = Strided(storage, offset, shape, stride)
    if not all(isinstance(n, int) and 0 <= n < 2**40 for n in numbers):
        raise ValueError("a tensor of something else than numbers")
    if tensor.numel > storage.numel or offset + tensor.extent > storage.numel:
        raise ValueError(f"a tensor of shape {shape}, more than its memory holds")
    return tensor


def _storage(kind: Any, named: Any, key: Any, place: Any, numel: Any, view: Any = None) -> Storage | Object:
    known = kind == "storage" and isinstance(key, str) and isinstance(numel, int) and view is None
    if not known or not isinstance(named, Object):
        raise ValueError("a reference that torch.save does not write")
    return Storage(key, _STORAGES[named.name], numel) if named.name in _STORAGES else named


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils _rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "collections OrderedDict": lambda items=(): {key: item for key, item in items if isinstance(key, (str, int))},
    "collections defaultdict": lambda *_: {},
    "torch._tensor _rebuild_from_type_v2": lambda maker, _, arguments, __: _made(maker, arguments),  # of a subclass
}
_LITERALS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": lambda: Object("builtins set"),
}
_GIVEN = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
          "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")  # fmt: skip
_MARK = object()


def _made(maker: Any, arguments: Any) -> Any:
    """What calling would have made: a tensor, a dict, or an object of that name, or of the class that copyreg gets."""
    name = maker.name if isinstance(maker, Object) else type(maker).__name__
    if name in _CALLS:
        return _CALLS[name](*arguments)
    of_class = name.startswith(("copyreg ", "copy_reg ")) and arguments and isinstance(arguments[0], Object)
    return arguments[0] if of_class else Object(name)


class Follower:
    """The machine that a pickle is a program for: a stack and a memo, and no way to anything else.

    `dtypes` are those of the storages by key, of all pickles that were followed, also of those that nothing kept has.
    Text instructions, which protocol 0 has and torch.save never writes, are refused, like those for objects from
    elsewhere.
    """

    def __init__(self) -> None:
        self.dtypes: dict[str, torch.dtype] = {}

    def follow(self, stream: IO[bytes]) -> Any:
        """What the next pickle in a stream would be, with descriptions for tensors and objects."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name in _GIVEN:
                self.stack.append(argument)
            elif operation.name in _LITERALS:
                self.stack.append(_LITERALS[operation.name]())
            elif operation.name == "STOP":
                return self.stack.pop()
            elif operation.name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{operation.name.lower()}", None)
                if step is None:
                    raise ValueError(f"the instruction {operation.name}, which torch.save does not write")
                step(argument)
        raise ValueError("a pickle without an end")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, place: Any) -> None:
        self.memo[place] = self.stack[-1]

    def _binget(self, place: Any) -> None:
        self.stack.append(self.memo[place])

    _long_binput, _long_binget = _binput, _binget

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _tuple1(self, _: Any) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: Any) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: Any) -> None:
        self._tuple_of(3)

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append({})
        self._set(items)

    def _frozenset(self, _: Any) -> None:
        self._since_mark()
        self.stack.append(Object("builtins frozenset"))

    def _additems(self, _: Any) -> None:
        self._since_mark()

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update((key, item) for key, item in pairs if isinstance(key, (str, int)))  # none else names

    def _setitem(self, _: Any) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _global(self, name: Any) -> None:
        self.stack.append(Object(str(name)))

    def _stack_global(self, _: Any) -> None:
        self.stack[-2:] = [Object(" ".join(self.stack[-2:]))]  # which are strings, or else it raises

    def _binpersid(self, _: Any) -> None:
        self.stack.append(found := _storage(*self.stack.pop()))
        if isinstance(found, Storage):
            self.dtypes[found.key] = found.dtype

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.stack.append(_made(self.stack.pop(), arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self._reduce(_)

    def _obj(self, _: Any) -> None:
        maker, *arguments = self._since_mark()
        self.stack.append(_made(maker, arguments))

    def _inst(self, name: Any) -> None:
        self.stack.append(_made(Object(str(name)), self._since_mark()))

    def _build(self, _: Any) -> None:
        self.stack.pop()  # a state dict's own attributes, or an object's, which are not kept
