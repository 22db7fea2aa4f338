"""Datasets: digits, CIFAR from its archive or folder (and from hostile ones), and the download."""

import gzip
import hashlib
import io
import logging
import pickle
import struct
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vitfn.data import cifar, load
from vitfn.data.download import download_file
from vitfn.errors import InputError

ARCHIVE = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
TRAIN = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)], "cifar100": ["train"]}
TEST = {"cifar10": "test_batch", "cifar100": "test"}
LABELS = {"cifar10": b"labels", "cifar100": b"fine_labels"}
CLASSES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": [f"class_{i}" for i in range(100)],
}


# --- CIFAR's files as Python 2 and its numpy pickled them (protocol 2), written by hand


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    """function(*args), and then __setstate__(state) where there is one."""

    function: Any
    args: tuple
    state: tuple | None = None


def _opcodes(value: Any) -> bytes:
    match value:
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, args, state):
            built = b"" if state is None else _opcodes(state) + b"b"
            return _opcodes(function) + _opcodes(args) + b"R" + built
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes() if len(value) < 256:  # a str of Python 2
            return b"U" + bytes([len(value)]) + value
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case str():  # its unicode
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(_opcodes, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_opcodes(k) + _opcodes(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            return _opcodes(array_call(value.shape, "u1", value.tobytes("A"), value.flags.f_contiguous))
    raise TypeError(type(value))


def array_call(shape: tuple, code: str, data: Any, fortran_order: bool = False) -> Call:
    dtype = Call(Global("numpy", "dtype"), (code.encode(), 0, 1), (3, b"|", None, None, None, -1, -1, 0))
    reconstruct = Global("numpy.core.multiarray", "_reconstruct")
    return Call(reconstruct, (Global("numpy", "ndarray"), (0,), b"b"), (1, shape, dtype, fortran_order, data))


def py2_pickle(value: Any) -> bytes:
    return b"\x80\x02" + _opcodes(value) + b"."


def cifar_contents(name: str = "cifar10", per_batch: int = 3) -> dict[str, Any]:
    """What each file of a small CIFAR holds: random pixels and labels."""
    random = np.random.default_rng(7)
    contents: dict[str, Any] = {}
    for member in [*TRAIN[name], TEST[name]]:
        contents[member] = {
            b"batch_label": f"{member} of many".encode(),
            LABELS[name]: random.integers(0, len(CLASSES[name]), per_batch).tolist(),
            b"data": random.integers(0, 256, (per_batch, 3072), np.uint8),
            b"filenames": [f"{member}_{i}.png".encode() for i in range(per_batch)],
        }
        if name == "cifar100":
            contents[member][b"coarse_labels"] = [0] * per_batch
    names = [n.encode() for n in CLASSES[name]]
    contents |= (
        {"batches.meta": {b"num_cases_per_batch": per_batch, b"label_names": names, b"num_vis": 3072}}
        if name == "cifar10"
        else {"meta": {b"fine_label_names": names, b"coarse_label_names": [b"thing"]}}
    )
    return contents


def cifar_files(contents: dict[str, Any]) -> dict[str, bytes]:
    return {member: value if isinstance(value, bytes) else py2_pickle(value) for member, value in contents.items()}


def write_cifar(data_dir: Path, contents: dict[str, Any], name: str = "cifar10") -> Path:
    """The archive of these files, where `load` looks for it; a member that is bytes is written as it is."""
    data_dir.mkdir(exist_ok=True)
    with tarfile.open(data_dir / ARCHIVE[name], "w:gz") as tar:
        for member, data in cifar_files(contents).items():
            info = tarfile.TarInfo(f"{FOLDER[name]}/{member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return data_dir / ARCHIVE[name]


def write_cifar_folder(data_dir: Path, contents: dict[str, Any], name: str = "cifar10") -> Path:
    (data_dir / FOLDER[name]).mkdir(parents=True)
    for member, data in cifar_files(contents).items():
        (data_dir / FOLDER[name] / member).write_bytes(data)
    return data_dir / FOLDER[name]


def refusal(data_dir: Path, name: str = "cifar10") -> str:
    """The message of the InputError that loading ends with, which is one line."""
    with pytest.raises(InputError) as caught:
        load(name, str(data_dir))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def everything_under(path: Path) -> set[Path]:
    return set(path.rglob("*"))


# --- digits


def test_digits_are_split_by_index_modulo_five():
    source = load_digits()
    train, test, names = load("digits")
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    assert names == tuple("0123456789")
    np.testing.assert_array_equal(test.labels, source.target[4::5])
    np.testing.assert_array_equal(train.labels, np.delete(source.target, np.s_[4::5]))
    assert train.labels.dtype == test.labels.dtype == torch.int64


def test_digits_images_are_grey_levels_enlarged_to_32_pixels():
    """Bilinear with half-pixel centres, by numpy in float64, to half a grey level."""
    train, test, _ = load("digits")
    assert train.images.shape == (1438, 3, 32, 32)
    assert test.images.shape == (359, 3, 32, 32)
    assert train.images.dtype == test.images.dtype == torch.uint8
    enlarge = np.array([np.interp((np.arange(32) + 0.5) / 4 - 0.5, np.arange(8), pixel) for pixel in np.eye(8)])
    exact = enlarge.T @ (load_digits().images[4::5] * (255 / 16)) @ enlarge  # grey levels are 0 to 16
    assert np.abs(test.images.numpy() - exact[:, None]).max() < 0.5 + 1e-4
    assert int(test.images.max()) > 240
    assert int(test.images.min()) == 0


def test_an_unknown_dataset_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"mnist.*digits, cifar10, cifar100"):
        load("mnist")


# --- CIFAR


def test_numpy_reads_the_same_from_these_pickles():
    """The hand-written dialect is what numpy itself takes for its own."""
    contents = cifar_contents()["data_batch_1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core is an old name
        read = pickle.loads(py2_pickle(contents), encoding="bytes")
    assert read.keys() == contents.keys()
    assert read[b"labels"] == contents[b"labels"]
    np.testing.assert_array_equal(read[b"data"], contents[b"data"])


@pytest.mark.parametrize("write", [write_cifar, write_cifar_folder])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_back_exactly(tmp_path, name, write):
    contents = cifar_contents(name)
    write(tmp_path / "data", contents, name)
    train, test, class_names = load(name, str(tmp_path / "data"))
    pixels = np.concatenate([contents[member][b"data"] for member in TRAIN[name]])
    np.testing.assert_array_equal(train.images, pixels.reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(train.labels, [y for member in TRAIN[name] for y in contents[member][LABELS[name]]])
    np.testing.assert_array_equal(test.images, contents[TEST[name]][b"data"].reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(test.labels, contents[TEST[name]][LABELS[name]])
    assert class_names == tuple(CLASSES[name])
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)


def test_cifar_in_fortran_order_comes_back_exactly(tmp_path):
    contents = cifar_contents()
    pixels = contents["test_batch"][b"data"]
    contents["test_batch"][b"data"] = np.asfortranarray(pixels)
    write_cifar(tmp_path, contents)
    np.testing.assert_array_equal(load("cifar10", str(tmp_path)).test.images, pixels.reshape(-1, 3, 32, 32))


def test_cifar_images_can_be_written_to(tmp_path):
    write_cifar(tmp_path, cifar_contents())
    test = load("cifar10", str(tmp_path)).test
    test.images.fill_(3)
    assert int(test.images.sum()) == 3 * test.images.numel()


@pytest.mark.parametrize(("fraction", "count"), [(1, 15), (0.98, 15), (0.9, 14), (0.5, 8), (1e-9, 1)])
def test_the_first_part_of_the_training_images_is_taken(tmp_path, fraction, count):
    """As TensorFlow rounds its train[:98%], and never none; 0.98 of CIFAR's 50,000 are 49,000."""
    write_cifar(tmp_path, cifar_contents())
    (train, test, _), whole = load("cifar10", str(tmp_path), train_fraction=fraction), load("cifar10", str(tmp_path))
    assert torch.equal(train.images, whole.train.images[:count])
    assert torch.equal(train.labels, whole.train.labels[:count])
    assert torch.equal(test.images, whole.test.images)
    assert round(0.98 * 50_000) == 49_000


def test_cifar_archive_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, cifar_contents())
    before = everything_under(tmp_path)
    load("cifar10", str(tmp_path))
    assert everything_under(tmp_path) == before


def test_real_cifar(cifar_dir, caplog):
    train, test, names = load("cifar10", str(cifar_dir))
    assert train.images.shape == (4660, 3, 32, 32)
    assert test.images.shape == (846, 3, 32, 32)
    assert names == tuple(CLASSES["cifar10"])
    assert torch.bincount(train.labels).tolist() == pytest.approx([466] * 10, rel=0.15)
    assert 110 < float(train.images.float().mean()) < 130  # the whole set's is 120.7
    found = hashlib.md5((cifar_dir / ARCHIVE["cifar10"]).read_bytes()).hexdigest()
    assert any(found in r.message and "c58f30108f718f92721af3b95e74349a" in r.message for r in caplog.records)


def test_real_cifar_is_what_numpy_reads(cifar_dir):
    with tarfile.open(cifar_dir / ARCHIVE["cifar10"]) as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = tar.extractfile("cifar-10-batches-py/test_batch")
        batch = pickle.loads(file.read(), encoding="bytes")  # type: ignore[union-attr]
    test = load("cifar10", str(cifar_dir)).test
    np.testing.assert_array_equal(test.images.flatten(1), batch[b"data"])
    np.testing.assert_array_equal(test.labels, batch[b"labels"])


def test_class_names_that_python_3_pickled_in_protocol_2(tmp_path):
    """There bytes are a call of _codecs.encode; archives made today hold them."""
    contents = cifar_contents()
    encode = Global("_codecs", "encode")
    meta = py2_pickle({"label_names": CLASSES["cifar10"]})
    key = _opcodes("label_names")
    contents["batches.meta"] = meta.replace(key, _opcodes(Call(encode, ("label_names", "latin1"))))
    assert pickle.loads(contents["batches.meta"]) == {b"label_names": CLASSES["cifar10"]}
    write_cifar(tmp_path, contents)
    assert load("cifar10", str(tmp_path)).class_names == tuple(CLASSES["cifar10"])


def test_an_archive_of_another_md5_is_a_warning_with_both_sums(tmp_path, caplog):
    archive = write_cifar(tmp_path, cifar_contents())
    load("cifar10", str(tmp_path))
    (record,) = [r for r in caplog.records if r.name == "vitfn"]
    assert record.levelno == logging.WARNING
    for part in (str(archive), hashlib.md5(archive.read_bytes()).hexdigest(), "c58f30108f718f92721af3b95e74349a"):
        assert part in record.message


def test_unpacked_files_of_another_md5_are_warnings_with_both_sums(tmp_path, caplog):
    folder = write_cifar_folder(tmp_path, cifar_contents("cifar100"), "cifar100")
    load("cifar100", str(tmp_path))
    official = {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    }
    messages = [r.message for r in caplog.records if r.name == "vitfn"]
    assert len(messages) == 3
    for member, md5 in official.items():
        found = hashlib.md5((folder / member).read_bytes()).hexdigest()
        assert any(str(folder / member) in m and md5 in m and found in m for m in messages)


@pytest.mark.parametrize(
    ("name", "size", "md5"),
    [
        ("cifar10", "170,498,071", "c58f30108f718f92721af3b95e74349a"),
        ("cifar100", "169,001,437", "eb9058c3a382ffc7106e4002c42a8d85"),
    ],
)
def test_absent_cifar_is_told_how_to_get(tmp_path, name, size, md5):
    message = refusal(tmp_path, name)
    for part in (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE[name]}", size, md5, "--download", str(tmp_path)):
        assert part in message


def _nested_reduce(marker: str) -> Any:
    """A call hidden among the arguments of a permitted one."""
    dtype = Call(Global("numpy", "dtype"), (Call(Global("os", "system"), (f"touch {marker}",)), 0, 1))
    return {b"labels": [0], b"data": Call(Global("numpy.core.multiarray", "_reconstruct"), ([dtype],))}


FOREIGN = {
    "os.system": lambda marker: Call(Global("os", "system"), (f"touch {marker}",)),
    "posix.system": lambda marker: {b"labels": Call(Global("posix", "system"), (f"touch {marker}",))},
    "builtins.eval": lambda marker: Call(Global("builtins", "eval"), (f"open({marker!r}, 'w').close()",)),
    "builtins.exec": lambda marker: [Call(Global("__builtin__", "exec"), (f"open({marker!r}, 'w')",))],
    "builtins.open": lambda marker: Call(Global("io", "open"), (marker, "w")),
    "numpy.core.multiarray.scalar": lambda marker: {
        b"labels": [Call(Global("numpy.core.multiarray", "scalar"), (Global("numpy", "dtype"), b"\1"))]
    },
    "nested reduce": _nested_reduce,
}


@pytest.mark.parametrize("member", ["data_batch_2", "batches.meta"])
@pytest.mark.parametrize("call", FOREIGN)
def test_foreign_pickles_are_refused_and_run_nothing(tmp_path, call, member):
    marker = tmp_path / "executed"
    archive = write_cifar(tmp_path, cifar_contents() | {member: FOREIGN[call](str(marker))})
    message = refusal(tmp_path)
    assert f"{archive}/{member}" in message
    assert "refusing" in message
    assert not marker.exists()


def test_these_foreign_pickles_do_run_when_unpickled_plainly(tmp_path):
    """So that the test above can fail."""
    for i, call in enumerate(["os.system", "posix.system", "builtins.eval"]):
        marker = tmp_path / f"executed{i}"
        pickle.loads(py2_pickle(FOREIGN[call](str(marker))))
        assert marker.exists()


def test_a_refused_name_with_line_breaks_stays_one_line(tmp_path):
    text = b"X" + struct.pack("<I", 5) + b"o\ns\nx" + b"X" + struct.pack("<I", 1) + b"f"
    write_cifar(tmp_path, cifar_contents() | {"data_batch_1": b"\x80\x04" + text + b"\x93."})
    assert "data_batch_1" in refusal(tmp_path)


def _with(key: bytes, value: Any) -> bytes:
    return py2_pickle(cifar_contents()["data_batch_3"] | {key: value})


WRONG_MEMBERS = {
    "cut off": lambda: py2_pickle(cifar_contents()["data_batch_3"])[:5000],
    "empty": lambda: b"",
    "text": lambda: b"<!DOCTYPE html>",
    "a list": lambda: py2_pickle([1, 2]),
    "no labels": lambda: py2_pickle({b"data": np.zeros((1, 3072), np.uint8)}),
    "a label too many": lambda: _with(b"labels", [0, 1, 2, 3]),
    "a label too large": lambda: _with(b"labels", [0, 10, 2]),
    "a label below 0": lambda: _with(b"labels", [0, -1, 2]),
    "labels of text": lambda: _with(b"labels", [b"cat", b"dog", b"cat"]),
    "no array": lambda: _with(b"data", b"\0" * 9216),
    "another shape": lambda: _with(b"data", np.zeros((3, 3071), np.uint8)),
    "an array of objects": lambda: _with(b"data", array_call((3, 3072), "O8", [b"x"] * 9216)),
    "an array of floats": lambda: _with(b"data", array_call((3, 3072), "f8", b"\0" * 8 * 9216)),
    "a number for pixels": lambda: _with(b"data", array_call((3, 3072), "u1", 9216)),
    "too few pixels": lambda: _with(b"data", array_call((3, 3072), "u1", b"\0" * 9215)),
}


@pytest.mark.parametrize("wrong", WRONG_MEMBERS)
def test_a_member_that_is_not_cifar_s_is_named(tmp_path, wrong):
    archive = write_cifar(tmp_path, cifar_contents() | {"data_batch_3": WRONG_MEMBERS[wrong]()})
    message = refusal(tmp_path)
    assert f"{archive}/data_batch_3" in message
    assert "fetch it again" in message


@pytest.mark.parametrize("write", [write_cifar, write_cifar_folder])
@pytest.mark.parametrize("member", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_missing_member_is_named(tmp_path, member, write):
    contents = cifar_contents()
    del contents[member]
    where = write(tmp_path / "data", contents)
    assert refusal(tmp_path / "data") == f"{where / member}: missing"


def test_an_archive_cut_off_anywhere_is_refused(tmp_path):
    archive = write_cifar(tmp_path, cifar_contents())
    whole = archive.read_bytes()
    for part in (0.02, 0.3, 0.7, 0.95):
        archive.write_bytes(whole[: int(part * len(whole))])
        assert str(archive) in refusal(tmp_path)


@pytest.mark.parametrize("levels", [4, 256])
def test_an_archive_with_a_changed_byte_is_refused(tmp_path, levels):
    """A gzip has a checksum of what it holds; pixels that do not compress (256 levels) show no damage otherwise."""
    contents = cifar_contents()
    for member in [*TRAIN["cifar10"], TEST["cifar10"]]:
        contents[member][b"data"] //= 256 // levels
    archive = write_cifar(tmp_path, contents)
    whole = archive.read_bytes()
    for part in np.linspace(0.1, 0.9, 9):
        damaged = bytearray(whole)
        damaged[int(part * len(whole))] ^= 0x55
        archive.write_bytes(damaged)
        assert str(archive) in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html>" * 100,
        gzip.compress(b"no tar" * 1000),
        gzip.compress(b"")[:10] + b"\xff" * 2000,
    ],
    ids=["empty", "not a gzip", "not a tar", "nothing but a gzip's head"],
)
def test_what_is_not_an_archive_is_refused(tmp_path, data):
    archive = tmp_path / ARCHIVE["cifar10"]
    archive.write_bytes(data)
    message = refusal(tmp_path)
    assert str(archive) in message
    assert "170,498,071" in message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_refused(tmp_path, kind):
    archive = tmp_path / ARCHIVE["cifar10"]
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/batches.meta")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert str(archive) in refusal(tmp_path)


# --- download


BODY = bytes(range(256)) * 4000  # 1 MB
BODY_MD5 = hashlib.md5(BODY).hexdigest()


class Server(NamedTuple):
    """A web server on this machine; `ranges` are the Range headers it was sent, None for a request without."""

    url: str
    ranges: list[str | None]
    modes: dict[str, Any]


@pytest.fixture
def server(monkeypatch):
    """Serves BODY; modes: `no_ranges`; `cut`, how many bytes to send before the connection breaks; `chunked`; `code`.

    A break heals itself: the next request is served whole.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ranges: list[str | None] = []
    modes: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            wanted = self.headers["Range"]
            ranges.append(wanted)
            if "code" in modes:
                self.send_error(modes["code"])
                return
            start = 0
            if wanted and not modes.get("no_ranges"):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
            else:
                self.send_response(200)
            body = BODY[start:]
            cut = modes.pop("cut", None)
            self.send_header("Connection", "close")
            if modes.get("chunked"):
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(f"{len(body):x}\r\n".encode() + body[:cut])
                if cut is None:
                    self.wfile.write(b"\r\n0\r\n\r\n")
            else:
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Server(f"http://127.0.0.1:{httpd.server_port}/cifar-10-python.tar.gz", ranges, modes)
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_a_download_arrives_whole(tmp_path, server):
    path = tmp_path / "new" / "file"
    download_file(server.url, path, len(BODY), BODY_MD5)
    assert path.read_bytes() == BODY
    assert everything_under(tmp_path) == {path.parent, path}
    assert server.ranges == [None]


def test_a_download_shows_a_bar(tmp_path, server, capsys):
    download_file(server.url, tmp_path / "the_file", len(BODY), BODY_MD5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "the_file" in err
    assert "100%" in err


def test_a_download_goes_on_from_its_part(tmp_path, server):
    path = tmp_path / "file"
    part_of(path).write_bytes(BODY[:300_001])
    download_file(server.url, path, len(BODY), BODY_MD5)
    assert server.ranges == ["bytes=300001-"]
    assert path.read_bytes() == BODY
    assert not part_of(path).exists()


def test_a_download_starts_over_where_the_server_knows_no_ranges(tmp_path, server):
    path = tmp_path / "file"
    part_of(path).write_bytes(BODY[:300_001])
    server.modes["no_ranges"] = True
    download_file(server.url, path, len(BODY), BODY_MD5)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("chunked", [False, True])
def test_a_broken_download_says_so_and_is_resumed(tmp_path, server, chunked):
    path = tmp_path / "file"
    server.modes.update(cut=600_000, chunked=chunked)
    with pytest.raises(InputError, match=r"--download.*goes on from there"):
        download_file(server.url, path, len(BODY), BODY_MD5)
    assert not path.exists()
    have = part_of(path).stat().st_size
    assert 0 < have <= 600_000
    assert part_of(path).read_bytes() == BODY[:have]
    download_file(server.url, path, len(BODY), BODY_MD5)
    assert server.ranges == [None, f"bytes={have}-"]
    assert path.read_bytes() == BODY


def test_a_download_of_another_md5_leaves_no_file(tmp_path, server):
    path = tmp_path / "file"
    with pytest.raises(InputError) as caught:
        download_file(server.url, path, len(BODY), "0" * 32)
    for part in (server.url, BODY_MD5, "0" * 32):
        assert part in str(caught.value)
    assert everything_under(tmp_path) == set()


def test_a_whole_part_needs_no_network(tmp_path):
    path = tmp_path / "file"
    part_of(path).write_bytes(BODY)
    download_file("http://127.0.0.1:9/nothing", path, len(BODY), BODY_MD5)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("code", [404, 503])
def test_an_http_error_is_named(tmp_path, server, code):
    server.modes["code"] = code
    with pytest.raises(InputError, match=f"{server.url}.*{code}"):
        download_file(server.url, tmp_path / "file", len(BODY), BODY_MD5)
    assert not (tmp_path / "file").exists()


def test_no_server_is_an_input_error(tmp_path, server):
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1/"):
        download_file("http://127.0.0.1:1/file", tmp_path / "file", len(BODY), BODY_MD5)


def test_download_fetches_an_absent_archive_only(tmp_path, monkeypatch):
    fetched = []

    def fetch(url, path, size, md5):
        fetched.append((url, path, size, md5))
        write_cifar(path.parent, cifar_contents())

    monkeypatch.setattr(cifar, "download_file", fetch)
    for _ in range(2):
        assert len(load("cifar10", str(tmp_path / "data"), download=True).train.labels) == 15
    (tmp_path / "unpacked").mkdir()
    write_cifar_folder(tmp_path / "unpacked", cifar_contents())
    load("cifar10", str(tmp_path / "unpacked"), download=True)
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    official = (170498071, "c58f30108f718f92721af3b95e74349a")
    assert fetched == [(url, tmp_path / "data" / ARCHIVE["cifar10"], *official)]
