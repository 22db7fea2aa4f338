"""Archives of arrays: what np.savez writes is read right, what is damaged or hostile is refused in one line."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vitfn import archive
from vitfn.archive import Archive
from vitfn.errors import InputError
from vitfn.files import replacing

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "head/kernel": RANDOM.standard_normal((3, 4), dtype=np.float32),
    "head/bias": RANDOM.standard_normal(4, dtype=np.float32),
    "cls": RANDOM.standard_normal((1, 1, 5), dtype=np.float32),
}


def tensors(arrays: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def write_archive(path, arrays: dict[str, torch.Tensor], comment: bytes = b"") -> None:
    archive.write_archive(path, arrays.items(), comment)


def read(path) -> dict[str, torch.Tensor]:
    with Archive(path) as file:
        return {name: file.read(name)[0] for name in file.shapes}


def assert_refused(message: str, path) -> None:
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1


def refusal(path) -> str:
    """The message with which a file is refused, on opening or on reading."""
    with pytest.raises(InputError) as error:
        read(path)
    assert_refused(str(error.value), path)
    return str(error.value)


def assert_refused_or_same(path, arrays: dict) -> bool:
    """Whether a damaged file is read nevertheless, and then to the right numbers; any other exception is one."""
    try:
        found = read(path)
    except InputError as error:
        message = str(error)
    else:
        assert_same(found, arrays)
        return True
    assert_refused(message, path)
    return False


def assert_same(found: dict[str, torch.Tensor], arrays: dict) -> None:
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == array.shape
        assert found[name].numpy().tobytes() == np.ascontiguousarray(array, dtype="<f4").tobytes(), name


def write_member(path: Path, data: bytes, name: str = "a.npy", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, data)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


# Reading and writing


@pytest.mark.parametrize("writer", ["vitfn", "savez", "savez_compressed"])
def test_what_is_written_is_read(tmp_path, writer):
    path = tmp_path / "a.npz"
    write_archive(path, tensors(ARRAYS)) if writer == "vitfn" else getattr(np, writer)(path, **ARRAYS)
    assert_same(read(path), ARRAYS)
    with Archive(str(path)) as file:
        assert file.shapes == {name: array.shape for name, array in ARRAYS.items()}
        assert list(file.shapes) == list(ARRAYS)
        assert file.comment == b""


def test_numpy_reads_what_is_written(tmp_path):
    write_archive(tmp_path / "a.npz", tensors(ARRAYS), b"a comment")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert found.files == list(ARRAYS)
        assert_same(tensors(dict(found)), ARRAYS)
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        assert file.testzip() is None
        assert file.comment == b"a comment"
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)])
def test_any_shape_makes_the_round_trip(tmp_path, shape):
    array = RANDOM.standard_normal(shape).astype(np.float32)
    write_archive(tmp_path / "a.npz", {"a": torch.from_numpy(np.asarray(array))})
    assert_same(read(tmp_path / "a.npz"), {"a": np.asarray(array)})


def test_an_array_of_several_chunks_makes_the_round_trip(tmp_path):
    array = RANDOM.standard_normal(700_001, dtype=np.float32)  # 2.7 MiB, read 1 MiB at a time
    write_archive(tmp_path / "a.npz", {"a": torch.from_numpy(array)})
    assert_same(read(tmp_path / "a.npz"), {"a": array})


def test_every_bit_pattern_makes_the_round_trip(tmp_path):
    array = np.array([0x7F800000, 0xFF800000, 0x7FC00001, 0x80000000, 1], np.uint32).view(np.float32)
    write_archive(tmp_path / "a.npz", {"a": torch.from_numpy(array)})
    assert_same(read(tmp_path / "a.npz"), {"a": array})


def test_leaves_are_written_in_float32_whatever_their_layout(tmp_path):
    leaf = torch.arange(6.0).reshape(2, 3)
    write_archive(tmp_path / "a.npz", {"t": leaf.T, "half": leaf.bfloat16(), "grad": leaf.clone().requires_grad_()})
    found = read(tmp_path / "a.npz")
    assert torch.equal(found["t"], leaf.T)
    assert torch.equal(found["half"], leaf)
    assert torch.equal(found["grad"], leaf)


def test_the_same_arrays_are_the_same_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_archive(tmp_path / name, tensors(ARRAYS), b"comment")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # not the hour of writing


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_every_kind_of_float_is_read_as_float32(tmp_path, dtype, order, writer):
    arrays = {name: np.array(array, dtype, order=order) for name, array in ARRAYS.items()}
    writer(tmp_path / "a.npz", **arrays)
    assert_same(read(tmp_path / "a.npz"), {name: array.astype(np.float32) for name, array in arrays.items()})


def test_a_fortran_ordered_array_of_four_dimensions_is_read_right(tmp_path):
    array = np.asfortranarray(RANDOM.standard_normal((2, 3, 4, 5)).astype(np.float32))
    np.savez(tmp_path / "a.npz", a=array)
    assert_same(read(tmp_path / "a.npz"), {"a": array})


def test_version_2_of_the_npy_format_is_read(tmp_path):
    member = io.BytesIO()
    np.lib.format.write_array(member, ARRAYS["head/kernel"], version=(2, 0))
    path = write_member(tmp_path / "a.npz", member.getvalue())
    assert_same(read(path), {"a": ARRAYS["head/kernel"]})


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_leaves_own_aligned_contiguous_writable_memory(tmp_path, dtype, order):
    sizes = {f"{i}": (i, 3) for i in range(1, 20)}
    np.savez(tmp_path / "a.npz", **{name: np.ones(shape, dtype, order=order) for name, shape in sizes.items()})
    leaves = read(tmp_path / "a.npz")
    for leaf in leaves.values():
        assert leaf.data_ptr() % 64 == 0
        assert leaf.is_contiguous()
        assert leaf.untyped_storage().nbytes() == 4 * leaf.numel()
        leaf.zero_()
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves.values()}) == len(leaves)
    assert all(array.min() == 1 for array in read(tmp_path / "a.npz").values())


# What is not an archive of numbers


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_object_arrays_are_refused_and_nothing_is_executed(tmp_path):
    made = tmp_path / "made"
    np.savez(tmp_path / "a.npz", a=np.array([Bomb(made)], dtype=object))
    assert re.search(r": a: found an array of Python objects, expected floating-point", refusal(tmp_path / "a.npz"))
    assert not made.exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:  # the bomb is live
        file["a"]
    assert made.exists()


def test_a_pickle_in_the_place_of_an_array_is_refused_and_not_executed(tmp_path):
    made = tmp_path / "made"
    refusal(write_member(tmp_path / "a.npz", pickle.dumps(Bomb(made))))
    assert not made.exists()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "U3", "V3", "datetime64[s]"])
def test_arrays_of_other_than_floats_are_refused(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", good=ARRAYS["cls"], **{"head/bias": np.zeros(3, dtype)})
    assert re.search(r"head/bias: found an array of .*, expected floating-point numbers", refusal(tmp_path / "a.npz"))


def test_structured_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3, [("x", "<f4"), ("y", "<f4")]))
    assert "expected floating-point numbers" in refusal(tmp_path / "a.npz")


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file or directory" in refusal(tmp_path / "absent.npz")


def test_a_folder_is_refused(tmp_path):
    assert "Is a directory" in refusal(tmp_path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 412815506\n".format("0" * 64).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes that are no ZIP archive"),
        (b"<!DOCTYPE html>\n<html><body>403</body></html>\n", "a web page.*download the file again"),
        (b"\n  <HTML>\n</HTML>", "a web page"),
        (b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (LFS, "a git-LFS pointer.*git lfs pull"),
        (b"just some text\nof two lines\n", "28 bytes that are no ZIP archive"),
        (bytes(range(256)) * 8, "2,048 bytes that are no ZIP archive"),
        (npy(ARRAYS["cls"]), "no ZIP archive"),
    ],
)
def test_what_is_no_archive_is_refused_by_what_it_is(tmp_path, content, says):
    (tmp_path / "a.npz").write_bytes(content)
    assert re.search(says, refusal(tmp_path / "a.npz"))


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    write_archive(tmp_path / "a.npz", tensors(ARRAYS))
    whole = (tmp_path / "a.npz").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        message = refusal(tmp_path / "cut.npz")
        assert length < 2 or f"a ZIP archive cut off after {length:,} bytes" in message


def test_a_file_cut_off_in_its_comment_is_refused(tmp_path):
    """The comment holds the config: a model without it may be another."""
    write_archive(tmp_path / "a.npz", tensors(ARRAYS), b'{"vitfn": {}}')
    whole = (tmp_path / "a.npz").read_bytes()
    for length in range(len(whole) - 13, len(whole)):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        refusal(tmp_path / "cut.npz")


def test_a_flipped_byte_anywhere_in_a_member_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=ARRAYS["head/kernel"])
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        (info,) = file.infolist()
    start = 30 + sum(struct.unpack_from("<HH", whole, 26))  # the local header, the name and the extra field
    for place in range(start, start + info.compress_size):
        for mask in (0x01, 0x80, 0xFF):
            damaged = whole.copy()
            damaged[place] ^= mask
            (tmp_path / "bad.npz").write_bytes(damaged)
            assert "bad.npz: a: " in refusal(tmp_path / "bad.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 1, 1024, 100_000, 262_144 - 32, 262_144, 600_000])
def test_a_wrong_checksum_is_refused_whatever_the_size(tmp_path, compression, size):
    path = write_member(tmp_path / "a.npz", npy(np.ones(size, np.float32)), compression=compression)
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(b"PK\x01\x02") + 16] ^= 1
    path.write_bytes(whole)
    assert "CRC" in refusal(path)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_a_flipped_byte_anywhere_in_the_file_is_refused_or_harmless(tmp_path, writer):
    writer(tmp_path / "a.npz", **ARRAYS)
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    for place in range(len(whole)):
        damaged = whole.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "bad.npz").write_bytes(damaged)
        assert_refused_or_same(tmp_path / "bad.npz", ARRAYS)


def test_a_member_that_is_no_npy_file_is_refused(tmp_path):
    """Else a damaged name, 'head/kernel.npx', would be a file without a head."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("cls.npy", npy(ARRAYS["cls"]))
        file.writestr("head/kernel.npx", npy(ARRAYS["head/kernel"]))
    assert "head/kernel.npx" in refusal(tmp_path / "a.npz")


def test_a_line_break_in_a_name_stays_out_of_the_message(tmp_path):
    refusal(write_member(tmp_path / "a.npz", b"no array", name="a\nb.npy"))


def test_a_member_of_too_few_or_too_many_bytes_is_refused(tmp_path):
    data = npy(np.ones(100, np.float32))
    for wrong in (data[:-4], data + bytes(4), data[:-1], data + b"\n"):
        message = refusal(write_member(tmp_path / "a.npz", wrong))
        assert f"found {len(wrong) - 128} bytes, expected 400 for (100,)" in message


def test_a_member_shorter_than_the_directory_says_is_refused(tmp_path):
    """Its CRC is right, and the missing numbers would be whatever the memory held."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1000,)})
    data = header.getvalue() + np.ones(100, "<f4").tobytes()
    path = write_member(tmp_path / "a.npz", data, compression=zipfile.ZIP_DEFLATED)
    whole = bytearray(path.read_bytes())
    struct.pack_into("<I", whole, whole.index(b"PK\x01\x02") + 24, len(header.getvalue()) + 4000)
    path.write_bytes(whole)
    refusal(path)


@pytest.mark.parametrize(
    "shape", ["(-1, -100)", "(10**9, 10**9)", "(100.0,)", "'abc'", "(1,) * 10**6", "(100, 10**30)"]
)
def test_an_absurd_shape_is_refused(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(400)
    refusal(write_member(tmp_path / "a.npz", member))


def test_an_archive_without_arrays_is_refused(tmp_path):
    """As what is left of one whose directory is damaged."""
    np.savez(tmp_path / "a.npz")
    refusal(tmp_path / "a.npz")


def test_an_encrypted_member_is_refused(tmp_path):
    path = write_member(tmp_path / "a.npz", npy(ARRAYS["cls"]))
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    assert "encrypted" in refusal(path)


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """One to three injuries: cut off, bits flipped, a piece copied elsewhere, bytes put in or left out."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        place, length = int(random.integers(len(data))), int(random.integers(1, 40))
        match random.integers(8):
            case 0:
                data = data[: place + 1]
            case 1:
                data[place:place] = random.bytes(length)
            case 2:
                del data[place : place + length]
                data += b"\0"
            case 3 | 4:
                source = int(random.integers(len(data)))
                piece = data[source : source + length]
                data[place : place + len(piece)] = piece
            case _:
                data[place] ^= 1 << int(random.integers(8))
    return bytes(data)


@pytest.mark.parametrize("writer", ["vitfn", "savez", "savez_compressed"])
def test_200_mutated_files_are_refused_or_read_right(tmp_path, writer):
    path, random, correct = tmp_path / "a.npz", np.random.default_rng(1), 0
    write_archive(path, tensors(ARRAYS)) if writer == "vitfn" else getattr(np, writer)(path, **ARRAYS)
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(mutate(whole, random))
        correct += assert_refused_or_same(path, ARRAYS)
    assert 0 < correct < 100


# Whole or not at all


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_leaves_what_was_there(tmp_path, existing):
    path = tmp_path / "a.npz"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(AttributeError):
        write_archive(path, {**tensors(ARRAYS), "bad": object()})  # type: ignore[dict-item]
    assert [file.name for file in tmp_path.iterdir()] == (["a.npz"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path, interruption):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write():
        with replacing(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"
            raise interruption

    with pytest.raises(interruption):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old and longer")
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


KILLS = """
    import os, random, signal, sys, time
    from pathlib import Path

    import torch
    from vitfn.archive import Archive, write_archive

    def write(path, version):
        write_archive(path, ((f"{i}", torch.full((10_000,), float(version))) for i in range(40)))

    random.seed(0)
    path, midway, versions = Path(sys.argv[1]), 0, set()
    write(path, 0)
    for attempt in range(200):
        child = os.fork()
        if not child:
            try:
                for version in range(1, 10_000):
                    write(path, version)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.002, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for temporary in path.parent.glob(".*.tmp"):
            midway += 1
            temporary.unlink()
        with Archive(path) as archive:
            leaves = [archive.read(f"{i}")[0] for i in range(40)]
        (version,) = set(torch.cat(leaves).tolist())
        versions.add(version)
        if midway >= 10 and len(versions) >= 2:
            break
    print(midway, len(versions))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """Ten writers killed midway; each time the file is one version from its first array to its last."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), tmp_path / "a.npz"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    midway, versions = map(int, done.stdout.split())
    assert midway >= 10
    assert versions >= 2
