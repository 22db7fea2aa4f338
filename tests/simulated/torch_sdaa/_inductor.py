"""A stand-in for torch.compile's backend `teco_inductor`: refuses what the vendor's refuses, runs graphs as they are.

SIMULATED_SDAA_DEFECT=L1 to L5 fails as known versions do: always, or as L4:N for graphs of more than N operators.
"""

import os

import torch
from functorch.compile import make_boxed_func
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd

_DEFECTS = {
    "L1": AssertionError("assert scheduling_ctor"),
    "L2": AttributeError("'_SDAADeviceProperties' object has no attribute 'multi_processor_count'"),
    "L3": AttributeError("'TecoFusedSchedulerNode' object has no attribute '_sizes'"),
    "L4": AssertionError(),
    "L5": IndexError("list index out of range"),
}


def _compile(graph, examples):
    if any(isinstance(example, torch.SymInt) for example in examples) or any(
        isinstance(size, torch.SymInt)
        for example in examples
        if isinstance(example, torch.Tensor)
        for size in example.shape
    ):
        raise NotImplementedError("teco_inductor: dynamic shapes are not supported")
    defect, _, most = os.environ.get("SIMULATED_SDAA_DEFECT", "").partition(":")
    operators = sum(node.op == "call_function" for node in graph.graph.nodes)
    if defect and operators > int(most or 0):
        raise _DEFECTS[defect]
    return make_boxed_func(graph.forward)


def teco_inductor(graph, examples, **options):
    """The backend; torch gives it `mode` and `options` by name."""
    if options:
        raise NotImplementedError(f"teco_inductor: found {sorted(options)}; mode and options are not supported")
    return aot_autograd(fw_compiler=_compile)(graph, examples)


register_backend(teco_inductor, name="teco_inductor")
