"""The table of devices: what 'auto' finds, and what is said of a device that is not there."""

import dataclasses

import pytest
import torch

from vitfn import device
from vitfn.compile import FORMS
from vitfn.errors import InputError
from vitfn.step import PRECISIONS


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A function that makes CUDA present or absent in the table."""

    def pretend(present: bool) -> None:
        row = dataclasses.replace(device.DEVICES["cuda"], available=lambda: present)
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
    with pytest.raises(InputError, match=r"--device: found 'tpu', expected one of auto, cuda, cpu"):
        device.find("tpu")


def test_an_absent_device_is_named_with_those_present(pretend_cuda):
    pretend_cuda(False)
    with pytest.raises(InputError, match=r"--device: found 'cuda'.*expected one of auto, cpu$"):
        device.find("cuda")


@pytest.mark.parametrize("name", device.DEVICES)
def test_a_row_s_choices_exist(name):
    """What 'auto' stands for is something that can also be asked for by name."""
    row = device.DEVICES[name]
    assert row.name == torch.device(name).type
    assert row.precision in PRECISIONS
    assert row.compile in FORMS
    assert isinstance(row.available(), bool)


@pytest.mark.parametrize(("name", "precision"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_auto_precision(name, precision):
    assert device.DEVICES[name].precision == precision
