"""Files in every format: what is right is read right, damaged and hostile files are refused, written ones whole."""

import argparse
import collections
import contextlib
import datetime
import enum
import io
import json
import logging
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_archive import KILLS, LFS, mutate

import vitfn
from vitfn import foreign, google, tree, weights
from vitfn.containers import open_file, write_file
from vitfn.errors import InputError

SIZES = {"patch_size": 4, "image_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}
CONFIG = vitfn.ViTConfig(num_classes=3, **SIZES)
GENERATOR = torch.Generator().manual_seed(0)
PARAMS = tree.unflatten({path: torch.randn(size, generator=GENERATOR) for path, size in vitfn.shapes(CONFIG).items()})


def stored(layout) -> dict[str, torch.Tensor]:
    return {n: leaf.contiguous() for n, leaf in weights.stored(tree.flatten(PARAMS), CONFIG, layout, layout.prefix)}


ORIGINAL, TIMM = stored(google.ORIGINAL), stored(foreign.TIMM)


def save_npz(path, tensors: dict[str, torch.Tensor], writer=np.savez) -> None:
    """As JAX's users do: bfloat16, which numpy does not know, as raw bytes."""
    arrays = {name: leaf.detach() for name, leaf in tensors.items()}
    raw = {n: a.view(torch.int16).numpy().view("V2") for n, a in arrays.items() if a.dtype == torch.bfloat16}
    with open(path, "wb") as file:
        writer(file, **{name: raw[name] if name in raw else array.numpy() for name, array in arrays.items()})


def save_safetensors(path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: leaf.detach().clone(memory_format=torch.contiguous_format) for name, leaf in tensors.items()}, path
    )


WRITERS = {  # and the kind that their files are
    "npz": (save_npz, "npz"),
    "npz, compressed": (lambda path, tensors: save_npz(path, tensors, np.savez_compressed), "npz"),
    "safetensors": (save_safetensors, "safetensors"),
    "torch": (lambda path, content: torch.save(content, path), "torch"),
    "torch, legacy": (lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=False), "torch"),
}
each_format = pytest.mark.parametrize(("write", "kind"), WRITERS.values(), ids=WRITERS)
both_of_torch_s = pytest.mark.parametrize(
    "write", [WRITERS["torch"][0], WRITERS["torch, legacy"][0]], ids=["zip", "legacy"]
)


def read(path) -> dict[str, torch.Tensor]:
    with open_file(path) as file:
        return {name: file.read(name)[0].clone() for name in file.shapes}


def assert_same(found: dict, expected: dict) -> None:
    """To the bit, in float32."""
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        bits = [tensor.detach().float().contiguous().view(torch.int32) for tensor in (found[name], leaf)]
        assert torch.equal(*bits), name


def refusal(function, path) -> str:
    with pytest.raises(InputError) as error:
        function(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# What is right


@each_format
@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pth", "a"])
def test_a_file_is_recognised_by_its_content(tmp_path, write, kind, name):
    write(tmp_path / name, TIMM)
    with open_file(tmp_path / name) as file:
        assert (file.kind, file.comment, file.path) == (kind, b"", str(tmp_path / name))
        assert file.shapes == {name: tuple(leaf.shape) for name, leaf in TIMM.items()}
        assert file.dtypes == dict.fromkeys(TIMM, "float32")
    assert_same(read(str(tmp_path / name)), TIMM)


@each_format
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_kind_of_float_is_read_right(tmp_path, write, kind, dtype):
    numbers = torch.tensor([0.0, -0.0, 1.5, -1 / 3, 1e-7, 6e4, math.inf, -math.inf])
    leaves = {"numbers": numbers, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "grid": numbers.reshape(2, 4)}
    leaves = {name: leaf.to(getattr(torch, dtype)) for name, leaf in leaves.items()}
    write(tmp_path / "a", leaves)
    with open_file(tmp_path / "a") as file:
        assert file.dtypes == dict.fromkeys(leaves, dtype)
        assert not file.owned or all(file.read(name)[0].dtype == torch.float32 for name in leaves)
    assert_same(read(tmp_path / "a"), leaves)


@each_format
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_arrays_of_other_than_floats_are_refused_by_name_when_they_are_read(tmp_path, write, kind, dtype):
    write(tmp_path / "a", {"steps": torch.ones(3, dtype=dtype), "cls": torch.ones(3)})
    with open_file(tmp_path / "a") as file:
        assert torch.equal(file.read("cls")[0], torch.ones(3))
        assert "steps: found an array of" in refusal(lambda path: file.read("steps"), tmp_path / "a")


def relatives(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers, but in memory that they share, with gaps, in another order, in another precision, in a graph."""
    together, found = torch.cat([leaf.flatten() for leaf in tensors.values()]).bfloat16().float(), {}
    forms: list[Callable] = [lambda leaf: leaf, torch.nn.Parameter, torch.Tensor.bfloat16, torch.Tensor.double]
    forms += [lambda leaf: leaf.T.contiguous().T if leaf.ndim == 2 else leaf]
    forms += [lambda leaf: torch.stack([leaf, leaf], -1)[..., 1], lambda leaf: leaf.clone().requires_grad_() * 1]
    for place, leaf in zip(torch.tensor([t.numel() for t in tensors.values()]).cumsum(0), tensors.items(), strict=True):
        part = together[place - leaf[1].numel() : place].view(leaf[1].shape)
        found[leaf[0]] = forms[len(found) % len(forms)](part)
    return found


@each_format
def test_loaded_leaves_own_aligned_contiguous_writable_memory(tmp_path, write, kind):
    related = relatives(ORIGINAL if kind == "npz" else TIMM)
    save_safetensors(tmp_path / "plain", {name: leaf.float() for name, leaf in related.items()})
    write(tmp_path / "related", related)
    found = tree.flatten(vitfn.load(tmp_path / "related", CONFIG))
    assert_same(found, tree.flatten(vitfn.load(tmp_path / "plain", CONFIG)))
    assert len({leaf.untyped_storage().data_ptr() for leaf in found.values()}) == len(found)
    for leaf in found.values():
        assert leaf.dtype == torch.float32
        assert leaf.data_ptr() % 64 == 0
        assert leaf.is_contiguous()
        assert leaf.untyped_storage().nbytes() == 4 * leaf.numel()
        assert not leaf.requires_grad
        leaf.zero_()
    assert_same(read(tmp_path / "related"), related)


@each_format
def test_parts_are_equal_parts_of_the_first_axis(tmp_path, write, kind):
    leaf = torch.randn(6, 4, generator=GENERATOR)
    write(tmp_path / "a", {"a": leaf, "transposed": leaf.T.contiguous().T, "last": leaf[:, :3]})
    for name, expected in read(tmp_path / "a").items():
        for parts in (1, 2, 3, 6):
            with open_file(tmp_path / "a") as file:
                found = file.read(name, parts)
            assert len(found) == parts
            assert torch.equal(torch.cat(found), expected)
            assert {part.shape for part in found} == {(6 // parts, expected.shape[1])}


SIGNALLING = [0x7FF0000000000001, 0x7FF7FFFFFFFFFFFF]  # what processors make of these NaNs is an exception


@each_format
def test_numbers_that_float32_does_not_have_are_read_without_a_warning(tmp_path, write, kind):
    wide = torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)
    write(tmp_path / "a", {"a": wide, "b": torch.tensor(SIGNALLING).view(torch.float64)})
    found = read(tmp_path / "a")
    assert found["a"].float().tolist() == [math.inf, -math.inf, 1]
    assert found["b"].float().isnan().all()


def of_model(path, prefix: str) -> dict[str, torch.Tensor]:
    """The arrays of a state dict that is under a key of the file's."""
    return {name.removeprefix(prefix): leaf for name, leaf in read(path).items() if name.startswith(prefix)}


class Anything:
    """An object of a training script's own, of which nothing is made."""

    def __init__(self) -> None:
        self.leaf = torch.ones(2)

    def __repr__(self) -> str:
        return "Anything()"


class Enum(enum.Enum):
    A = 1


def training_state() -> dict:
    """What training scripts save beside the model."""
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    others = {"epoch": 3, "loss": 0.5, "name": "ViT", "done": True, "none": None, "log": [1, (2, 3)], "big": 2**70}
    return {"optimizer": optimizer.state_dict(), "ema": model.state_dict(), "size": torch.Size([2, 2]), **others}


@both_of_torch_s
@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module", "net", "anything", None])
def test_the_state_dict_is_found_among_what_else_a_training_script_saves(tmp_path, write, wrapper):
    write(tmp_path / "a", training_state() | ({wrapper: TIMM} if wrapper else TIMM))
    prefix = f"{wrapper}/" if wrapper else ""
    assert_same({name: leaf for name, leaf in of_model(tmp_path / "a", prefix).items() if name in TIMM}, TIMM)
    found = tree.flatten(vitfn.load(tmp_path / "a", CONFIG))
    assert all(torch.equal(leaf, found[path]) for path, leaf in tree.flatten(PARAMS).items())


OTHER = {name: leaf + 1 for name, leaf in TIMM.items()}  # another model of the same names


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("teacher/module.backbone.", "student/module.backbone."),
        ("model/teacher.backbone.", "model/student.backbone."),
        ("state_dict_ema/", "state_dict/"),
        ("model/", "model_ema/"),
        ("target_encoder/", "encoder/"),
        ("state_dict/base_encoder.", "state_dict/momentum_encoder."),
        ("", "ema/"),
    ],
)
def test_of_several_models_the_one_its_owner_evaluates_is_read_and_that_is_said(tmp_path, caplog, first, second):
    content: dict = {}
    for prefix, arrays in ((second, OTHER), (first, TIMM)):
        *keys, begin = prefix.split("/")
        place = content
        for key in keys:
            place = place.setdefault(key, {})
        place |= {begin + name: leaf for name, leaf in arrays.items()}
    torch.save(content, path := tmp_path / "a.pth")
    assert torch.equal(vitfn.load(path, CONFIG)["cls"], PARAMS["cls"])
    assert f"found the model under {first!r} and {second!r}: the first is read, FILE:PREFIX another" in caplog.text
    if first:
        assert torch.equal(vitfn.load(f"{path}:{second.strip('/.')}", CONFIG)["cls"], PARAMS["cls"] + 1)


def test_without_a_model_the_keys_of_the_file_are_named(tmp_path):
    torch.save({"epoch": 1, "net": {"a": torch.ones(2)}, "optimizer": {"b": torch.ones(3)}}, tmp_path / "a.pth")
    message = refusal(vitfn.load, tmp_path / "a.pth")
    assert "under the keys net, optimizer: net/a, optimizer/b" in message


def test_a_pickled_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    assert "an object of the class torch.nn.modules.linear.Linear" in refusal(vitfn.load, tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_of_pickle_is_read(tmp_path, protocol):
    torch.save({"args": argparse.Namespace(a=1), "model": TIMM}, tmp_path / "a", pickle_protocol=protocol)
    assert_same(of_model(tmp_path / "a", "model/"), TIMM)


BESIDE = [  # as in schedules' states and configs
    *(collections.Counter([3, 5]), torch.float16, torch.device("cpu")),
    *(b"raw", {1, 2}, {0.5: 1, None: 2, (3, 4): 5}),
    *(argparse.Namespace(lr=0.1, model="vit"), np.float64(0.5), np.arange(3), Path("x"), Anything(), frozenset([1])),
    *(datetime.timedelta(1), collections.defaultdict(dict, a={}), collections.deque([1]), slice(3), 3 + 4j, Enum.A),
]


@both_of_torch_s
@pytest.mark.parametrize("beside", BESIDE, ids=repr)
def test_a_model_is_read_whatever_lies_beside(tmp_path, write, beside):
    write(tmp_path / "a", {"state_dict": TIMM, "beside": beside})
    assert_same(of_model(tmp_path / "a", "state_dict/"), TIMM)


@both_of_torch_s
def test_a_tensor_that_is_negative_lazily_is_refused(tmp_path, write):
    write(tmp_path / "a", {"a": torch._neg_view(torch.ones(3))})
    assert "yet to be computed" in refusal(open_file, tmp_path / "a")


@both_of_torch_s
@pytest.mark.parametrize("content", [[torch.ones(3)], torch.ones(3), 5, None, "text"], ids=lambda c: type(c).__name__)
def test_what_is_no_state_dict_is_refused(tmp_path, write, content):
    write(tmp_path / "a", content)
    assert f"expected a state dict, found {type(content).__name__}" in refusal(open_file, tmp_path / "a")


# What is refused by what it is


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.npz"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("folder", "a folder without weights"),
        (b"", "0 bytes"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "a web page.*download the file again"),
        (b"<html> {}</html>", "a web page"),
        (LFS, "a git-LFS pointer.*git lfs pull"),
        (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "expected a file of weights"),
        (b"PK", "cut off"),
        (bytes(8) + b"{", "no safetensors file"),
        (pickle.dumps({"a": np.ones(3)}), "no state dict"),
    ],
    ids=lambda part: repr(part)[:20],
)
def test_what_holds_no_weights_is_refused_by_what_it_is(tmp_path, name, content, says):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(says, refusal(vitfn.load, tmp_path / name))


# Files made by hand, with whatever numbers in them


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: tuple, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def npy(descr: str, shape: tuple, data: bytes, fortran_order: bool = False) -> bytes:
    header = repr({"descr": descr, "fortran_order": fortran_order, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED, copies: int = 0) -> bytes:
    """`copies` more entries for its last member in the directory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.filelist += archive.filelist[-1:] * copies
    return file.getvalue()


def op(value) -> bytes:
    """The pickle operations that push a value; bytes are such operations already."""
    match value:
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case int():
            return b"\x8a" + bytes([len(pickle.encode_long(value))]) + pickle.encode_long(value)
        case tuple():
            return b"(" + b"".join(map(op, value)) + b"t"
        case dict():
            return b"}(" + b"".join(op(key) + op(part) for key, part in value.items()) + b"u"
    return value


def call(function: str, *arguments) -> bytes:
    return b"c" + function.replace(" ", "\n").encode() + b"\n" + op(arguments) + b"R"


REBUILD = "torch._utils _rebuild_tensor_v2"


def tensor(count: int, shape: tuple, strides: tuple, dtype: str = "Float", key: str = "0", more: tuple = ()) -> bytes:
    """What torch.save pickles of a tensor in a storage of `count` elements; legacy files have one `more` None."""
    storage = op(("storage", f"ctorch\n{dtype}Storage\n".encode(), key, "cpu", count, *more)) + b"Q"
    return call(REBUILD, storage, 0, shape, strides, False, call("collections OrderedDict"))


def pickled(value) -> bytes:
    return b"\x80\x02" + op(value) + b"."


def torch_zip(value, storages=(bytes(64),), compression=zipfile.ZIP_STORED, **more: bytes) -> bytes:
    members = {f"a/data/{i}": storage for i, storage in enumerate(storages)}
    members |= {f"a/{name}": content for name, content in more.items()}
    return zipped({"a/data.pkl": pickled(value), "a/version": b"3\n", **members}, compression)


def torch_legacy(value, keys=(), data: bytes = b"") -> bytes:
    start = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return start + pickled(value) + pickled(keys) + data


# Damaged and hostile files are read in another process, which no crash, hang or bomb gets out of


def isolated(function: str, *arguments):
    """What a function of this module returns in a process of its own."""
    code = f"import json, sys, test_containers as this; print(json.dumps(this.{function}(*sys.argv[1:])))"
    paths = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1]))
    done = warm.run(["-c", code, *arguments], env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return json.loads(done.stdout)


DEEDS = re.compile(r"exec|os\.(system|exec|posix_spawn|fork|mkdir|remove|rename)|subprocess.*|socket.*")


@contextlib.contextmanager
def watch(own: str) -> Iterator[dict]:
    """Reports code that is run, files but its `own` that are written, warnings, and the memory that is taken."""
    report, before, active = {"seen": []}, peak(), True

    def hook(event: str, arguments: tuple) -> None:
        if not active:
            return
        name, _, flags = arguments if event == "open" else ("", "", 0)
        written = flags & (os.O_WRONLY | os.O_RDWR) and not str(name).startswith(own)
        if (written or DEEDS.fullmatch(event)) and "/encodings/" not in str(arguments):  # imported when first used
            report["seen"].append(f"{event} {arguments}"[:300])

    torch.set_num_threads(1)
    logging.disable()  # of what is assumed, for thousands of files
    sys.addaudithook(hook)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield report
    active = False
    report["seen"] += sorted({f"warning: {warning.message}"[:300] for warning in caught})
    report["megabytes"] = peak() - before


def peak() -> float:
    """This process's, in megabytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def outcome(function, path) -> str:
    """'read', how it was refused, or what else went wrong."""
    try:
        function(path)
    except InputError as error:
        proper = str(path) in str(error) and len(str(error).splitlines()) == 1
        return ("refused: " if proper else "improper: ") + str(error)[:500]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return "read"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# What the three formats call a type, and its size in bytes.
DTYPES = {"F32": ("<f4", "Float", 4), "F16": ("<f2", "Half", 2), "BF16": ("|V2", "BFloat16", 2)}
DTYPES |= {"F64": (">f8", "Double", 8), "I64": ("<i8", "Long", 8), "F8_E4M3": ("|O", "Untyped", 1), "X": ("X", "X", 4)}
NUMBERS = (-1, 0, 1, 2, 3, 4, 5, 8, 9, 16, 24, 25, 10**6, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
NAMES = ("", "a\nb", "../../a", "blocks.9999.norm1.bias", "Transformer/encoderblock_999999999/a", "/a", "b\\a")
Arrays = dict[str, tuple[str, tuple[int, ...], int, bytes]]  # type, shape, number of elements, and the bytes


def arrays_of(form: str) -> Arrays:
    model = ORIGINAL if form.startswith("npz") else TIMM
    return {name: ("F32", tuple(leaf.shape), leaf.numel(), leaf.numpy().tobytes()) for name, leaf in model.items()}


def rewritten(form: str, random: np.random.Generator) -> bytes:
    """The model as somebody wrote it who took an array or two away, or gave them other names, types, shapes, sizes."""

    def draw(choices):
        return list(choices)[random.integers(len(choices))]

    arrays = arrays_of(form)
    for _ in range(random.integers(1, 3)):
        name = draw(arrays)
        dtype, shape, count, data = arrays.pop(name)
        match random.integers(8):
            case 0:
                continue
            case 1:
                name = draw((*NAMES, *arrays))
            case 2:
                count = draw(NUMBERS)
            case 3:
                data = data[: draw(NUMBERS)] + bytes(random.integers(2))
            case 4:
                dtype = draw(DTYPES)
            case 5:
                shape = tuple(draw(NUMBERS) for _ in range(random.integers(6)))
            case _:
                shape = tuple(draw((size, size, *NUMBERS)) for size in shape) + (1,) * (not random.integers(9))
        if math.prod(shape) in range(10_000) and random.integers(4):
            count, data = math.prod(shape), random.bytes(math.prod(shape) * DTYPES[dtype][2])
        arrays[name] = dtype, shape, count, data
    return composed(form, arrays, plain=bool(random.integers(9)))


def composed(form: str, arrays: Arrays, plain: bool = True) -> bytes:
    """A file of these arrays, whether they make sense or not; unless `plain`, in Fortran's order or of one number."""
    if form.startswith("npz"):
        members = {
            f"{n}.npy": npy(DTYPES[dtype][0], shape, data, not plain) for n, (dtype, shape, _, data) in arrays.items()
        }
        return zipped(members, zipfile.ZIP_DEFLATED if "compressed" in form else zipfile.ZIP_STORED)
    header, tensors, records, place = {}, {}, [], 0
    for name, (dtype, shape, count, data) in arrays.items():
        header[name] = entry(dtype, shape, place, place + count * DTYPES[dtype][2])
        strides = tuple(math.prod(shape[i + 1 :]) if plain else 0 for i in range(len(shape)))
        tensors[name] = tensor(count, shape, strides, DTYPES[dtype][1], str(len(records)), (None,) * ("legacy" in form))
        records.append(data)
        place += len(data)
    if form == "safetensors":
        return safetensors(header, b"".join(records))
    if form == "torch":
        return torch_zip(tensors, records)
    sized = ((count % 2**64).to_bytes(8, "little") + data for _, _, count, data in arrays.values())
    return torch_legacy(tensors, tuple(map(str, range(len(records)))), b"".join(sized))


@pytest.mark.parametrize("form", WRITERS)
def test_files_made_by_hand_are_like_others(tmp_path, form):
    (tmp_path / "a").write_bytes(composed(form, arrays_of(form)))
    assert_same(read(tmp_path / "a"), ORIGINAL if form.startswith("npz") else TIMM)


def fuzz(form: str, folder: str, count: int = 2000, seed: int = 0) -> dict:
    """Loads damaged files: half of them with injured bytes, half rewritten."""
    write, kind = WRITERS[form]
    path, random, slowest, results, problems = Path(folder, f"a.{kind}"), np.random.default_rng(seed), 0.0, [], []
    if form in ("npz", "safetensors"):
        vitfn.save(path, PARAMS, CONFIG)
    else:
        write(path, ORIGINAL if kind == "npz" else TIMM)
    whole, expected = path.read_bytes(), tree.flatten(vitfn.load(path, CONFIG))
    outcome(vitfn.load, path.with_name("none"))  # imports what is imported when it is first needed
    with watch(folder) as report:
        handles = len(os.listdir("/proc/self/fd"))
        for i in range(count):
            injured, config, found = i % 2, CONFIG if kind == "torch" or i // 2 % 2 else None, {}
            path.write_bytes(mutate(whole, random) if injured else rewritten(form, random))
            start = time.process_time()
            result = outcome(lambda path: found.update(tree.flatten(vitfn.load(path, config))), path)  # noqa: B023
            slowest = max(slowest, time.process_time() - start)
            if result == "read":
                sizes = {name: tuple(leaf.shape) for name, leaf in found.items()}
                right = sizes == vitfn.shapes(config or weights.describe(path).config)
                if injured and kind == "npz":
                    right = right and all(torch.equal(found[name], leaf) for name, leaf in expected.items())
                result = result if right else f"wrong: {sizes}"
            if not result.startswith(("read", "refused: ")):
                problems.append(f"{i}: {result}")
                path.with_name(f"problem {i}").write_bytes(path.read_bytes())
            results.append(result[:4])
        handles -= len(os.listdir("/proc/self/fd"))
    counts = {which: [results[part::2].count(which) for part in (1, 0)] for which in ("read", "refu")}
    return report | {"handles": handles, "slowest": slowest, "problems": problems} | counts


@linux
@pytest.mark.slow
@pytest.mark.parametrize("form", WRITERS)
def test_2000_damaged_files_are_refused_or_read(tmp_path, form):
    report = isolated("fuzz", form, tmp_path)
    assert report["problems"] == []
    assert report["seen"] == []
    assert report["handles"] == 0
    assert report["megabytes"] < 300
    assert report["slowest"] < 3
    assert sum(report["read"]) + sum(report["refu"]) == 2000
    assert min(report["refu"]) > 100


# Hostile files can do no more than be refused


def doubling(levels: int) -> bytes:
    """A tuple of two tuples of two tuples ..., all of them the same."""
    places = (struct.pack("<I", level) for level in range(levels))
    return b")" + b"".join(b"r" + place + b"j" + place + b"\x86" for place in places)


def sharing(layers: int, width: int) -> bytes:
    """A model whose layers have all of their numbers in the same place."""
    tensors = {}
    for name, leaf in ORIGINAL.items():
        wide = {"Dense_0/kernel": (8, width), "Dense_0/bias": (width,), "Dense_1/kernel": (width, 8)}
        shape = wide.get("/".join(name.split("/")[-2:]), tuple(leaf.shape))
        one = tensor(8 * width, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))
        tensors |= {name.replace("block_0", f"block_{i}"): one for i in range(layers)}
    return torch_zip(tensors, [bytes(32 * width)])


def changed(form: str, shapes: dict[str, tuple], data: bytes = b"") -> bytes:
    """The model with other shapes over other data."""
    new: Arrays = {name: (F32, shape, math.prod(shape), data) for name, shape in shapes.items()}
    return composed(form, arrays_of(form) | new)


def commented(text: str) -> bytes:
    plain = composed("safetensors", arrays_of("safetensors"))
    end = 8 + struct.unpack("<Q", plain[:8])[0]
    return safetensors({"__metadata__": {"vitfn": text}} | json.loads(plain[8:end]), plain[end:])


def stating(**fields) -> bytes:
    return commented(json.dumps({"vitfn": {"config": SIZES | fields}}))


F32, NUMBER, WRITE = "F32", npy("<f4", (), bytes(4)), "open('executed', 'w')"
HIDDEN = call("builtins bytearray", 1 << 29)  # 512 MB, for a pickle that nobody looks at
CODE = {
    "os.system": call("posix system", "touch executed"),
    "eval": call("builtins eval", WRITE),
    "the eval of Python 2": call("__builtin__ eval", WRITE),
    "eval by STACK_GLOBAL": op("builtins") + op("eval") + b"\x93" + op((WRITE,)) + b"R",
    "eval by INST": b"(" + op(WRITE) + b"ibuiltins\neval\n",
}


def pickles(more: tuple = ()) -> dict[str, object]:
    same = tensor(16, (3 * 10**6,), (0,), more=more)  # millions of the same number
    encode = call("_codecs encode", "0123456789", "utf-8")
    return CODE | {
        "a module with its source": op(("module", b"ctorch\nSize\n", "setup.py", "1")) + b"Q",
        "a byte array of 10**11": call("builtins bytearray", 10**11),
        "a byte array of 512 MB": HIDDEN,
        "a FloatTensor of 10**12": call("torch FloatTensor", 10**12),
        "a FloatStorage of 10**12": call("torch FloatStorage", 10**12),
        "an untyped storage of 10**12": call("torch.storage UntypedStorage", 10**12),
        "a stride of 0": {"a": tensor(16, (10**12,), (0,), more=more)},
        "a negative stride": {"a": tensor(16, (4, 4), (-4, 1), more=more)},
        "a negative shape": {"a": tensor(16, (-4, -4), (4, 1), more=more)},
        "a shape beyond 64 bits": {"a": tensor(16, (2**62, 2**62), (0, 0), more=more)},
        "a shape of 2**64": {"a": tensor(16, (2**32, 2**32), (0, 0), more=more)},
        "a lazy tensor that doubles": call(REBUILD, None, 0, (), (), False, None, doubling(60)),
        "more than the storage": {"a": tensor(16, (1 << 27,), (1,), more=more)},
        "nested lists": b"]" * 100_000 + b"a" * 99_999,
        "nested tuples": b")" + b"\x85" * 100_000,
        "nested marks": b"(" * 50_000 + b"t" * 50_000,
        "a deep key": {b")" + b"\x85" * 160_000: 1},
        "a doubling key": {doubling(60): 1},
        "a doubling function": doubling(60) + b")R",
        "a doubling text": b"c_codecs\nencode\n" * 26 + encode + (op("hex") + b"\x86R") * 26,
        "a Counter of a tensor": call("collections Counter", same),
        "an OrderedDict of a tensor": call("collections OrderedDict", same),
        "a Size of a tensor": call("torch Size", same),
        "a hidden get": call("collections OrderedDict") + op({"get": 5}) + b"b",
        "hidden items": call("collections OrderedDict") + op({"items": 5}) + b"b",
        "a text of 4 GB": b"X\xff\xff\xff\xffabc",
        "a text of 2**63": b"\x8d" + b"\xff" * 7 + b"\x7fabc",
        "a memo of 2**32": b"Nr\xff\xff\xff\xff",
    }


REFUSED: dict[str, bytes | Callable[[], bytes]] = {
    **{f"torch, {name}": torch_zip(value) for name, value in pickles().items()},
    **{f"legacy, {name}": torch_legacy(value) for name, value in pickles((None,)).items()},
    "legacy, keys": torch_legacy({}, keys=HIDDEN),
    "legacy, deep keys": torch_legacy({}, (b")" + b"\x85" * 160_000,), bytes(64)),
    "legacy, doubling keys": torch_legacy({}, (doubling(60),), bytes(64)),
    "legacy, before an archive": torch_legacy(HIDDEN) + torch_zip({}),
    "torch, before an archive as long": torch_zip(HIDDEN) + torch_zip(b"}." + bytes(len(HIDDEN) - 2)),
    "torch, DATA.PKL beside": torch_zip({}, **{"DATA.PKL": pickled(HIDDEN)}),
    "torch, two data.pkl": zipped({"a/data.pkl": pickled({}), "b/data.pkl": pickled(CODE["eval"])}),
    "torch, TorchScript": torch_zip({}, **{"constants.pkl": pickled(())}),
    "torch, compressed": torch_zip({"a": tensor(1 << 20, (1 << 20,), (1,))}, [bytes(1 << 22)], zipfile.ZIP_DEFLATED),
    "torch, record elsewhere": torch_zip({"a": tensor(16, (16,), (1,), key="../../../../../../etc/passwd")}),
    "torch, short record": changed("torch", {"head.weight": (3, 8)}, bytes(80)),
    "torch, short record swapped": torch_zip({"a": tensor(10**5, (10**5,), (1,))}, byteorder=b"big"),
    "torch, a pickle of 15 MB": lambda: torch_zip(b"]" * (15 << 20)),
    "torch, 40 layers in 8 MB": lambda: sharing(40, 1 << 18),
    "npz, bomb": lambda: zipped({"cls.npy": npy("<f4", (1 << 28,), bytes(1 << 30))}, zipfile.ZIP_DEFLATED),
    "npz, nested": zipped({"cls.npz": zipped({"a.npy": NUMBER})}),
    "npz, nested as npy": zipped({"cls.npy": zipped({"a.npy": NUMBER})}),
    "npz, a member 20,000 times": zipped({"cls.npy": npy("<f4", (10**5,), bytes(4 * 10**5))}, copies=19_999),
    "npz, 5,000 members": lambda: zipped({f"{i}.npy": NUMBER for i in range(5000)}),
    "npz, 2**62 classes": changed("npz", {"head/kernel": (0, 2**62), "head/bias": (2**62, 0)}),
    "npz, no width": changed("npz", {google.POSITIONS: (1, 4, 0)}),
    "npz, NUL": zipped({"cls.npy": NUMBER, "../a?NUL.npy": NUMBER}).replace(b"?NUL", b"\0NUL"),
    "safetensors, 2**62 classes": changed("safetensors", {"head.weight": (2**62, 0), "head.bias": (2**62, 0)}),
    "safetensors, no width": changed("safetensors", {"pos_embed": (1, 4, 0)}),
    "safetensors, 10**15 bytes of header": safetensors({}, length=10**15),
    "safetensors, 2**64 - 1 bytes of header": safetensors({}, length=2**64 - 1),
    "safetensors, a header too long": safetensors({}, length=3),
    "safetensors, a deep header": safetensors(b'{"a":' + b"[" * 10**6),
    "safetensors, no JSON": safetensors(b"{1, 2}"),
    "safetensors, metadata of numbers": safetensors({"__metadata__": {"format": 5}}),
    "safetensors, overlap": safetensors({n: entry(F32, (2,), i, i + 8) for i, n in ((0, "a"), (4, "b"))}, bytes(12)),
    "safetensors, same place": safetensors({n: entry(F32, (2,), 0, 8) for n in "ab"}, bytes(8)),
    "safetensors, hole": safetensors({"a": entry(F32, (1,), 0, 4), "b": entry(F32, (1,), 8, 12)}, bytes(12)),
    "safetensors, more data": safetensors({"a": entry(F32, (1,), 0, 4)}, bytes(12)),
    "safetensors, less data": safetensors({"a": entry(F32, (3,), 0, 12)}, bytes(8)),
    "safetensors, backwards": safetensors({"a": entry(F32, (1,), 4, 0)}, bytes(4)),
    "safetensors, negative": safetensors({"a": entry(F32, (-1,), -4, 0)}, bytes(4)),
    "safetensors, beyond 64 bits": safetensors({"a": entry(F32, (2**32, 2**32), 0, 0)}),
    "safetensors, unknown type": safetensors({"a": entry("F8", (4,), 0, 4)}, bytes(4)),
    "safetensors, another config": commented('{"vitfn": {"config": {"hidden_size": 24}}}'),
    "safetensors, a config of unknown fields": commented('{"vitfn": {"config": {"width": 8}}}'),
    "safetensors, a config of a million layers": stating(num_layers=10**6),
    "safetensors, a config of infinite width": stating(resnet={"width_factor": 1e308}),
    "safetensors, no config": commented('{"vitfn": {}}'),
}
TRICKS = ("../../x", "/x", "..\\..\\x", "C:x", "a\nb", "a\r\x1b[31mb", "", ".", "é" * 10_000, *NAMES)
HARMLESS: dict[str, bytes | Callable[[], bytes]] = {
    "npz, names": zipped({f"{name}.npy": NUMBER for name in TRICKS}),
    "safetensors, names": safetensors({name: entry(F32, (0,), 0, 0) for name in TRICKS}),
    "torch, names": torch_zip({name: tensor(16, (16,), (1,)) for name in TRICKS}),
    "torch, protocol 3": zipped({"a/data.pkl": b"\x80\x03}.", "a/version": b"3\n"}),
    "safetensors, a name twice": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(F32, (0,), 0, 0)).encode(),) * 2)),
    "safetensors, eight bits": safetensors({"a": entry("F8_E4M3", (4,), 0, 4)}, bytes(4)),
    "safetensors, others' metadata": safetensors({"__metadata__": {"a": "5"}, "a": entry(F32, (1,), 0, 4)}, bytes(4)),
    "safetensors, half a description": commented('{"vitfn": {"config": {"hidden_si'),
}


@linux
@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
def test_hostile_pickles_are_live(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    result = pickle.loads(pickled(code))
    assert (tmp_path / "executed").exists()
    if result:
        result.close()


def probe(folder: str) -> dict[str, dict]:
    """What reading and loading each file of a folder does to a process of its own, of 20 seconds and 4 GB more."""
    import resource  # Windows has none

    reports, good = {}, Path(folder).with_name("good")
    for form in WRITERS:  # imports what is imported when it is first needed
        good.write_bytes(composed(form, arrays_of(form)))
        outcome(vitfn.load, good)
    for path in sorted(Path(folder).iterdir()):
        source, sink = os.pipe()
        if not (child := os.fork()):
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30),) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (20, 21))
            with watch("nothing") as report:
                report |= {"read": outcome(read, path), "load": outcome(vitfn.load, path)}
                report["adapt"] = outcome(lambda path: vitfn.load(path, CONFIG), path)
            os.write(sink, json.dumps(report).encode())
            os._exit(0)
        os.close(sink)
        with os.fdopen(source, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        reports[path.name] = json.loads(text) if text else {"killed": signal.Signals(status & 127).name}
    good.unlink()
    return reports


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("probed") / "hostile"
    folder.mkdir()
    for name, content in (REFUSED | HARMLESS).items():
        (folder / name).write_bytes(content() if callable(content) else content)
    before = {*folder.parent.rglob("*"), *Path().iterdir()}
    reports = isolated("probe", folder)
    assert {*folder.parent.rglob("*"), *Path().iterdir()} == before
    return reports


@linux
@pytest.mark.parametrize(
    ("name", "must"),
    [*((name, ("refused: ",)) for name in REFUSED), *((name, ("refused: ", "read")) for name in HARMLESS)],
    ids=[*REFUSED, *HARMLESS],
)
def test_a_hostile_file_is_refused_or_harmless(probed, name, must):
    report = probed[name]
    assert "killed" not in report
    assert report["load"].startswith(must)
    assert report["adapt"].startswith(must)
    assert report["read"].startswith(("refused: ", "read"))
    assert report["seen"] == []
    assert report["megabytes"] < 300


# What is written is whole, or not there

both_written = pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])


def test_a_written_file_is_read_back_and_by_others(tmp_path):
    path = tmp_path / "a.safetensors"
    vitfn.save(path, PARAMS, CONFIG, ["a", "b", "c"])
    assert_same(tree.flatten(vitfn.load(path)), tree.flatten(PARAMS))
    assert weights.describe(path) == (CONFIG, ("a", "b", "c"), True)
    assert_same(load_file(path), TIMM)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"  # which transformers asks for


@both_written
def test_arrays_are_written_in_float32_wherever_they_lie(tmp_path, name):
    arrays = relatives(TIMM) | {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    write_file(tmp_path / name, arrays.items())
    with open_file(tmp_path / name) as file:
        assert set(file.dtypes.values()) == {"float32"}
    assert_same(read(tmp_path / name), arrays)


@both_written
def test_arrays_that_are_the_same_tensor_are_written_each(tmp_path, name):
    leaf = torch.ones(8)
    write_file(tmp_path / name, [("a", leaf), ("b", leaf)])
    assert_same(read(tmp_path / name), {"a": leaf, "b": leaf})


@both_written
def test_the_same_tree_is_the_same_bytes(tmp_path, name):
    found = set()
    for _ in range(20):
        vitfn.save(tmp_path / name, PARAMS, CONFIG)
        found.add((tmp_path / name).read_bytes())
    assert len(found) == 1


@both_written
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_midway_leaves_what_was_there(tmp_path, name, old):
    def arrays():
        yield "a", torch.ones(1000)
        raise KeyError("the second array")

    if old:
        (tmp_path / name).write_bytes(old)
    with pytest.raises(KeyError):
        write_file(tmp_path / name, arrays())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({name: old} if old else {})


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a", "a.NPZ", "a.safetensors.gz", ".npz"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    message = refusal(lambda path: vitfn.save(path, PARAMS, CONFIG), tmp_path / name)
    assert "expected one of npz, safetensors" in message
    assert refusal(lambda path: write_file(path, iter(TIMM.items())), tmp_path / name) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_writer_of_safetensors_leaves_a_whole_file(tmp_path):
    """As test_archive has it of npz: ten writers killed midway, and every time the file is one version."""
    imports = "from vitfn.archive import Archive, write_archive"
    assert imports in KILLS
    ours = "from vitfn.containers import open_file as Archive, write_file as write_archive"
    code = textwrap.dedent(KILLS.replace(imports, ours))
    command = [sys.executable, "-c", code, tmp_path / "a.safetensors"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    midway, versions = map(int, done.stdout.split())
    assert midway >= 10
    assert versions >= 2
