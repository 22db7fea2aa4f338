"""Writes a model for deployment: python -m vitfn.export MODEL OUT [--opset=12] [--batch=dynamic] [--precision=float16]

MODEL is a run's directory or a file of weights. OUT ends in .onnx (ONNX) or .pt2 (a torch.export program). It takes
'input' (B, C, H, W), normalised as vitfn.apply takes it and of the file's precision, and gives 'output' (B, K).
"""

import importlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from absl.flags import FlagValues
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from vitfn import flags, tree, weights
from vitfn.command import run_command
from vitfn.compile import trace_einops
from vitfn.config import ViTConfig
from vitfn.errors import InputError, RunError
from vitfn.files import replacing
from vitfn.preprocessing import Preprocessing
from vitfn.tree import Tree
from vitfn.vit import apply, shapes

# Of the difference from apply, relative to its largest output. The tests hold small models to a tenth of the first;
# in large ones rounding adds up (5.6e-5 was seen where all weights of a Ti/16 had been shifted).
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2}
_LARGEST = 2**31 - 1  # bytes of a protobuf, which an ONNX file is
_HEADROOM = 2**20  # bytes for the graph beside its numbers


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return run_command(command, argv, flags.export_flags, arguments=("MODEL", "OUT"))


def command(fv: FlagValues, model: str, out: str) -> None:
    """The command: OUT is written whole and checked, or not at all."""
    path, _ = weights.find(model)
    if (suffix := Path(out).suffix) not in (".onnx", ".pt2"):
        raise InputError(f"{out}: found the suffix {suffix or 'none'}, expected .onnx or .pt2")
    if not os.access(folder := Path(out).parent, os.W_OK):
        raise InputError(f"{out}: found no folder {folder} that can be written to, expected one: make it first")
    (described, preprocessing, _), dtype = weights.details(path), getattr(torch, fv.precision)
    batch = None if fv.batch == "dynamic" else fv.batch
    if suffix == ".onnx":
        _check_size(described.config, out)
        for name in ("onnx", "onnxconverter_common.float16")[: 1 if dtype == torch.float32 else 2]:
            _optional(name, "write ONNX" if name == "onnx" else "write float16")
    with tqdm(desc="reading", total=3, unit="part", delay=2, leave=False) as bar:
        params = weights.load(path)
        _next(bar, "tracing")
        if suffix == ".onnx":
            data = to_onnx(params, described.config, described.class_names, fv.opset, batch, dtype, preprocessing)
        else:
            data = to_program(params, described.config, batch, dtype)
        _next(bar, "checking")
        run = onnx_runner(data) if suffix == ".onnx" else program_runner(data)
        difference = run and largest_difference(run, params, described.config, batch, dtype)
        _next(bar, "writing")
        with replacing(out) as file:
            file.write(data)
    sizes = ", ".join(map(str, (described.config.channels, *described.config.image_hw)))
    for name, value in {
        "from": path,
        "model": f"{described.config.name}, input (B, {sizes})",
        "to": f"{out} ({len(data):,} bytes)",
        **({"opset": fv.opset} if suffix == ".onnx" else {}),
        "batch": fv.batch,
        "precision": fv.precision,
        "difference": "not checked: pip install onnxruntime" if difference is None else _shown(difference, dtype),
    }.items():
        print(f"{name:<10} {value}")


def to_onnx(
    params: Tree,
    config: ViTConfig,
    class_names: tuple[str, ...] | None = None,
    opset: int = 12,
    batch: int | None = 1,
    dtype: torch.dtype = torch.float32,
    preprocessing: Preprocessing | None = None,
) -> bytes:
    """`apply` as an ONNX model, the same bytes each time; `batch` None takes any number of images.

    The file says how to preprocess, as JSON in its metadata: image_size (height, width), mean and std, for pixels in
    [0, 1], and the `preprocessing` if there is one; and class_names. float16 holds for inputs and outputs too. Needs
    onnx, for float16 onnxconverter_common.
    """
    onnx = _optional("onnx", "write ONNX")
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is old; that sizes become constants, which they should
        torch.onnx.export(
            _Traced(params, config, dynamic=batch is None),
            (torch.zeros(batch or 2, config.channels, *config.image_hw),),
            cast(Any, buffer),  # whose type the signature of 2.13 leaves out
            opset_version=opset,
            do_constant_folding=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}} if batch is None else None,
            dynamo=False,  # the other one begins at opset 18
        )
    proto = onnx.load_model_from_string(buffer.getvalue())
    if dtype == torch.float16:
        float16 = _optional("onnxconverter_common.float16", "write float16")
        # Squares of a LayerNorm written out leave float16's range where activations exceed 256, as large models' do.
        kept = [*float16.DEFAULT_OP_BLOCK_LIST, "Pow", "ReduceMean"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that numbers below 1e-7 are rounded
            proto = float16.convert_float_to_float16(proto, op_block_list=kept)
    onnx.helper.set_model_props(proto, _metadata(config, class_names, preprocessing))
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True)


def to_program(params: Tree, config: ViTConfig, batch: int | None = 1, dtype: torch.dtype = torch.float32) -> bytes:
    """`apply` as a file of torch.export.save, whose state_dict has the paths of the tree, with '_' for '/'."""
    trace_einops()
    images = torch.zeros(batch or 2, config.channels, *config.image_hw, dtype=dtype)
    sizes = ({0: torch.export.Dim("batch", max=2**31 - 1)},) if batch is None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            _Module(tree.to(params, dtype), config), (images,), dynamic_shapes=sizes, strict=True
        )
        torch.export.save(program, buffer := io.BytesIO())
    return buffer.getvalue()


def _logits(params: Tree, images: Tensor, config: ViTConfig) -> Tensor:
    return cast(Tensor, apply(params, images, config))  # no tuple, where nothing is captured


class _Module(nn.Module):
    """`apply` as both exporters want it."""

    def __init__(self, params: Tree, config: ViTConfig):
        super().__init__()
        self.config, self.paths = config, list(tree.flatten(params))
        for path, leaf in tree.flatten(params).items():
            self.register_buffer(path.replace("/", "_"), leaf)

    def forward(self, input: Tensor) -> Tensor:
        leaves = {path: getattr(self, path.replace("/", "_")) for path in self.paths}
        return _logits(tree.unflatten(leaves), input, self.config)


class _Traced(nn.Module):
    """`apply` traced for ONNX, its weights constants."""

    def __init__(self, params: Tree, config: ViTConfig, dynamic: bool):
        super().__init__()
        self.params, self.config, self.dynamic = params, config, dynamic

    def forward(self, input: Tensor) -> Tensor:
        with _OldFunctions(input.shape[0] if self.dynamic else None):
            return _logits(self.params, input, self.config)


class _OldFunctions(TorchFunctionMode):
    """Tensor functions by those that opset 12 has, with all sizes constants but the batch's, which comes first."""

    def __init__(self, batch: Any):
        super().__init__()
        self.batch = batch  # as traced

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == Tensor.mT.__get__:  # type: ignore[attr-defined]
            return args[0].transpose(-2, -1)
        if function == Tensor.to and args[1] == args[0].dtype:
            return args[0]
        if function == Tensor.expand and self.batch is not None:
            return args[0].expand(self.batch, *args[2:])
        result = function(*args, **(kwargs or {}))
        if function == Tensor.shape.__get__:  # type: ignore[attr-defined]
            return tuple(int(size) for size in result)
        if function in (Tensor.flatten, Tensor.unflatten, Tensor.reshape):
            return args[0].reshape(-1, *(int(size) for size in result.shape[1:]))
        return result


def _metadata(
    config: ViTConfig, class_names: tuple[str, ...] | None, preprocessing: Preprocessing | None
) -> dict[str, str]:
    def each(value: float | tuple[float, ...]) -> list[float]:
        return list(value) if isinstance(value, tuple) else [value] * config.channels

    said = {
        "model": config.name,
        "image_size": config.image_hw,
        "mean": each(config.mean),
        "std": each(config.std),
        **({"preprocessing": preprocessing._asdict()} if preprocessing else {}),
        **({"class_names": class_names} if class_names else {}),
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}


def _check_size(config: ViTConfig, out: str) -> None:
    """Refuses what no ONNX file can hold, from the shapes alone; float16 is converted from float32, which must fit."""
    if (found := 4 * sum(math.prod(shape) for shape in shapes(config).values()) + _HEADROOM) > _LARGEST:
        expected = f"at most {_LARGEST:,} in an ONNX file (float16 is made from it)"
        raise InputError(f"{out}: found {found:,} bytes of float32, expected {expected}: write .pt2")


def onnx_runner(data: bytes) -> Callable[[Tensor], Tensor] | None:
    """An ONNX model as a function on the CPU, by onnxruntime; None where that is not installed."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def program_runner(data: bytes) -> Callable[[Tensor], Tensor]:
    """A torch.export program as a function on the CPU."""
    return torch.export.load(io.BytesIO(data)).module()


def largest_difference(
    run: Callable[[Tensor], Tensor], params: Tree, config: ViTConfig, batch: int | None, dtype: torch.dtype
) -> float:
    """The largest difference of `run` from `apply` in float32, relative to the largest output (a fraction).

    On fixed random images, of one batch, or of one and three where any is taken. Raises RunError beyond `LIMITS`.
    """
    differences = []
    for size in (1, 3) if batch is None else (batch,):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, config.channels, *config.image_hw, generator=generator).to(dtype)
        with torch.no_grad():
            wanted = _logits(params, images.float(), config)
            found = run(images).float()
        differences.append(float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)))
    worst = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
    if not worst <= LIMITS[dtype]:
        raise RunError(f"the exported model differs from vitfn.apply by {_shown(worst, dtype)}; nothing was written")
    return worst


def _shown(difference: float, dtype: torch.dtype) -> str:
    return f"{difference:.1e} of the largest output (limit {LIMITS[dtype]:.0e})"


def _next(bar: tqdm, what: str) -> None:
    bar.set_description(what, refresh=False)  # before its delay is over, nothing is shown
    bar.update()


def _optional(name: str, purpose: str) -> ModuleType:
    """A module that only some need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise InputError(f"found no {package}, expected it, to {purpose}: pip install {package}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
