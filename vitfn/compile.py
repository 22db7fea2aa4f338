"""torch.compile with a way back: a step that is tried in one compile form after another until one works."""

import functools
import logging
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfn import arguments, device, tree
from vitfn.errors import InputError, RunError, one_line
from vitfn.optim import Arithmetic, Columns, Number

# What is tried for each requested form, in order; 'off' is eager.
FORMS = {"step": ("step", "block", "off"), "block": ("block", "off"), "off": ("off",)}

# Of what backward could keep, the part that it may: so norms' outputs and the GELU's, 0.4 of an encoder block's bytes,
# are computed again, which costs no product (BUILD.md).
_KEPT = 0.9


def compiled(function: Callable, row: device.Device) -> Callable:
    """torch.compile(function) for a row of the table of devices: a graph of static shapes, with a cache of its own."""
    in_one_graph = _in_one_graph(function, row)

    def call(*arguments, **named):
        # Dynamo remembers shapes by a function's place in its file: those of another model would make these dynamic.
        static_shapes = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
        with static_shapes, torch._functorch.config.patch(activation_memory_budget=_KEPT):
            return in_one_graph(*arguments, **named)

    return call


def leaf_by_leaf(row: device.Device) -> Callable[[Arithmetic], Arithmetic]:
    """Runs an update's arithmetic on one leaf after the other, compiled once for leaves of any size.

    It reads and writes each leaf once, where eager functions pass over all of them again and again.
    """

    @functools.cache
    def through(arithmetic: Arithmetic) -> Arithmetic:
        in_one_graph = _in_one_graph(arithmetic, row)

        def run(columns: Columns, *numbers: Number | None) -> None:
            with torch._dynamo.config.patch(assume_static_by_default=False):
                for leaves in zip(*columns, strict=True):
                    if all(leaf.is_contiguous() for leaf in leaves):
                        in_one_graph(tuple([_flat(leaf)] for leaf in leaves), *numbers)
                    else:
                        arithmetic(tuple([leaf] for leaf in leaves), *numbers)

        return run

    return through


def _flat(leaf: Tensor) -> Tensor:
    """A contiguous leaf's memory as a vector; of a view Dynamo would guard the shape of what it is a view of."""
    return leaf.new_empty(0).set_(leaf.untyped_storage(), leaf.storage_offset(), (leaf.numel(),), (1,))


def trace_einops() -> None:
    """Lets torch 2.7's Dynamo trace into einops: the module that is imported registers its functions (issue 157601)."""
    import einops._torch_specific  # noqa: F401


def _in_one_graph(function: Callable, row: device.Device) -> Callable:
    """`mode`, `options` and `dynamic` are never given, since some backends refuse them."""
    trace_einops()
    # Dynamo would trace into re and guard the length of its cache, which the compiler's own use of it changes.
    torch.compiler.assume_constant_result(tree.matches)
    # Dynamo keeps its cache, and the limit of its recompilations, with the code object: every caller gets a copy.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, backend=device.compile_backend(row), fullgraph=True)


class CompiledStep:
    """A function of (carry, (images, ...)), built in the first compile form that works on the images' device.

    `build(form, row)` makes the function for a form and a row of the table of devices, once for each shape of images.
    A form that fails at a first call is reported, and the next one takes over: exact, as long as nothing is written
    before all is compiled. With `fallback` false it raises RunError instead. `form` is the form in use (None before the
    first call), `failures` what others died of. Before a first call, which costs more anyway, `check(carry, batch)`
    raises InputError for what is not a model's parameters or images.
    """

    def __init__(
        self,
        build: Callable[[str, device.Device], Callable],
        compile: str,
        fallback: bool,
        check: Callable[[Any, tuple], None],
    ):
        if compile not in ("auto", *FORMS):
            raise InputError(f"compile: found {compile!r}, expected one of auto, {', '.join(FORMS)}")
        self.form: str | None = None
        self.failures: dict[str, str] = {}
        self._build, self._requested, self._fallback, self._check = build, compile, fallback, check
        self._functions: dict[tuple, Callable] = {}

    def __call__(self, carry: Any, batch: tuple[Tensor, ...]) -> Any:
        arguments.check_tensor("images", images := batch[0], "(B, C, H, W)")
        kind = (images.shape, images.dtype, images.device.type)
        if kind not in self._functions:
            self._check(carry, batch)
            return self._first_call(carry, batch, kind)
        return self._functions[kind](carry, batch)

    def _first_call(self, carry: Any, batch: tuple[Tensor, ...], kind: tuple) -> Any:
        row = device.row_of(batch[0].device)
        *compiling, last = FORMS[self.form or (row.compile if self._requested == "auto" else self._requested)]
        failures = {}
        for form in compiling:
            try:
                function = self._build(form, row)
                with warnings.catch_warnings():
                    # Dynamo looks at the .grad of a block's input, and torch warns of that
                    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
                    result = function(carry, batch)
                break
            except RunError:  # the processes lost each other
                raise
            except Exception as error:  # compilers fail in every way there is
                failures[form] = one_line(f"{type(error).__name__}: {error}", 300)
                if not self._fallback:
                    raise RunError(f"compile={form} failed on {row.name}: {failures[form]}") from error
        else:
            form, function = last, self._build(last, row)
            result = function(carry, batch)  # an error of the caller's shows here as itself
        if failures:
            reasons = "; ".join(f"compile={failed}: {reason}" for failed, reason in failures.items())
            logging.getLogger("vitfn").warning(
                "COMPILING FAILED (%s). Going on with compile=%s: the same results, at another speed.", reasons, form
            )
        self.form, self.failures = form, self.failures | failures
        self._functions[kind] = function
        return result
