"""The table of devices: what 'auto' finds, and what is said of a device that is not there."""

import dataclasses
import logging
import re
import subprocess
import sys

import pytest
import torch
from absl.flags import FlagValues
from conftest import ROOT

from vitfn import device, flags
from vitfn.compile import FORMS
from vitfn.errors import InputError
from vitfn.logits import PRECISIONS


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A function that makes CUDA present or absent in the table."""

    def pretend(present: bool) -> None:
        row = dataclasses.replace(
            device.DEVICES["cuda"], missing=lambda: "" if present else "torch sees no such device"
        )
        monkeypatch.setitem(device.DEVICES, "cuda", row)

    return pretend


def test_auto_prefers_cuda(pretend_cuda):
    pretend_cuda(True)
    assert device.find("auto").name == "cuda"


def test_auto_without_cuda_is_the_cpu(pretend_cuda):
    pretend_cuda(False)
    assert device.find("auto").name == "cpu"


def test_the_cpu_can_be_asked_for_beside_cuda(pretend_cuda):
    pretend_cuda(True)
    assert device.find("cpu").name == "cpu"


def test_auto_is_what_torch_sees():
    assert device.find("auto").name == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_device_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"--device: found 'tpu', expected one of auto, sdaa, cuda, cpu"):
        device.find("tpu")


def test_an_absent_device_is_named_with_those_present(pretend_cuda):
    pretend_cuda(False)
    with pytest.raises(InputError, match=r"--device: found 'cuda'.*expected one of auto, cpu$"):
        device.find("cuda")


@pytest.mark.parametrize("name", device.DEVICES)
def test_a_row_s_choices_exist(name):
    """What 'auto' stands for is something that can also be asked for by name."""
    row = device.DEVICES[name]
    assert row.name == name
    assert row.precision in PRECISIONS
    assert row.compile in FORMS
    assert isinstance(row.missing(), str)


@pytest.mark.parametrize(("name", "precision"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_auto_precision(name, precision):
    assert device.DEVICES[name].precision == precision


# --- a package that brings a device, which need not work


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """A function: installs a torch_sdaa that does what the given code says."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(code: str) -> None:
        (tmp_path / "torch_sdaa").mkdir()
        (tmp_path / "torch_sdaa/__init__.py").write_text(code)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_sdaa"]:
        del sys.modules[name]
    if hasattr(torch, "sdaa"):
        del torch.sdaa


CARDS = """
import types, torch
print("Host IP: 10.0.0.1")
torch.sdaa = types.SimpleNamespace(is_available=lambda: {0} > 0, device_count=lambda: {0}, set_device=id)
"""


def test_without_the_package_nothing_is_imported_and_the_error_says_so():
    device.find("auto")
    with pytest.raises(
        InputError, match=r"--device: found 'sdaa', .*torch_sdaa is not installed; expected one of auto"
    ):
        device.find("sdaa")
    assert "torch_sdaa" not in sys.modules


def test_auto_prefers_a_card(vendor, pretend_cuda):
    pretend_cuda(True)
    vendor(CARDS.format(4))
    assert device.find("auto").name == device.find("sdaa").name == "sdaa"


@pytest.mark.parametrize(
    ("code", "variables", "reason"),
    [
        ("raise OSError('libsdaart.so: cannot open')", {}, "torch_sdaa failed: OSError: libsdaart.so: cannot open"),
        ("import torch; torch.sdaa = None", {}, "torch_sdaa failed: AttributeError"),
        (CARDS.format(0), {}, "torch_sdaa sees no card"),
        (CARDS.format(0), {"SDAA_VISIBLE_DEVICES": "-1"}, "torch_sdaa sees no card (SDAA_VISIBLE_DEVICES=-1)"),
        (
            CARDS.format(4),
            {"TORCH_SDAA_ALIGN_NV_DEVICE": "off"},
            "TORCH_SDAA_ALIGN_NV_DEVICE: found 'off', expected a100",
        ),
    ],
)
def test_auto_says_why_it_passes_over_what_is_installed(vendor, monkeypatch, caplog, code, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    vendor(code)
    with caplog.at_level(logging.WARNING, "vitfn"):
        assert device.find("auto").name != "sdaa"
    assert [record.message for record in caplog.records if reason in record.message]
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        device.find("sdaa")
    assert "\n" not in str(caught.value)


def test_a_process_too_many_is_told_how_many_devices_there_are(vendor):
    vendor(CARDS.format(2))
    row = device.find("sdaa")
    device.select(row, 1)
    with pytest.raises(InputError, match=r"--device=sdaa: found 2 of them, too few for process 2"):
        device.select(row, 2)


def test_what_a_device_lacks_is_not_known_of_it(vendor):
    vendor(CARDS.format(1))
    row = device.find("sdaa")
    assert device.peak_memory(row) is None
    assert "device_name" not in device.facts(row)


def test_variables_that_change_a_device_are_noted(monkeypatch):
    monkeypatch.setenv("TORCH_SDAA_AUTOLOAD", "cuda_migrate")
    monkeypatch.setenv("SDAA_VISIBLE_DEVICES", "0,1")
    noted = device.facts(device.DEVICES["sdaa"])["environment"]
    assert {"SDAA_VISIBLE_DEVICES": "0,1", "TORCH_SDAA_AUTOLOAD": "cuda_migrate"}.items() <= noted.items()
    assert all(name.startswith(("SDAA_", "TORCH_SDAA_", "TECO_")) for name in noted)


def test_an_emulated_precision_is_warned_of_and_others_are_not(caplog):
    row = device.DEVICES["sdaa"]
    with caplog.at_level(logging.WARNING, "vitfn"):
        assert [device.resolved_precision(row, asked) for asked in ("auto", "float32", "float16")] == [
            "float16",
            "float32",
            "float16",
        ]
        assert not caplog.records
        assert device.resolved_precision(row, "bfloat16") == "bfloat16"
    assert "--precision=bfloat16 on sdaa: the matrix unit takes float16" in caplog.text


PRINTING = """
import ctypes
print("by Python")
ctypes.CDLL(None).puts(b"by C")
"""


def test_a_banner_does_not_reach_stdout(tmp_path):
    """Neither that of a package probed for, nor that of one that torch loads by itself; Python's or C's."""
    (tmp_path / "torch_sdaa").mkdir()
    (tmp_path / "torch_sdaa/__init__.py").write_text(PRINTING + CARDS.format(1))
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata, sys, types\n"
        "original = metadata.entry_points\n"
        "def entry_points(**wanted):\n"
        "    if wanted.get('group') == 'torch.backends':\n"
        "        return [metadata.EntryPoint('sdaa', 'autoloaded:load', 'torch.backends')]\n"
        "    return original(**wanted)\n"
        "metadata.entry_points = entry_points\n"
    )
    (tmp_path / "autoloaded.py").write_text("def load():" + PRINTING.replace("\n", "\n    "))
    code = "from vitfn import device; print(device.find('sdaa').name)"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "sdaa\n", done.stderr
    assert done.stderr.count("by Python") == done.stderr.count("by C") == 2


# --- the table is the only place


def test_nothing_else_names_a_device_or_its_libraries():
    for path in (ROOT / "vitfn").rglob("*.py"):
        found = re.findall(r"\w*(?:sdaa|cuda|tccl|nccl)\w*", path.read_text(), re.IGNORECASE)
        assert path.name == "device.py" or not found, f"{path}: {found}"


def test_help_texts_are_built_from_the_table(monkeypatch):
    row = dataclasses.replace(device.DEVICES["cpu"], name="abacus", precision="bfloat16", compile="off")
    monkeypatch.setitem(device.DEVICES, "abacus", row)
    flags.device_flags(fv := FlagValues())
    assert "abacus" in fv["device"].help
    assert "bfloat16 on abacus" in fv["precision"].help
    assert "off on abacus" in fv["compile"].help
