"""The sdist and the wheel: what is in them, what they say, and a run of the installed command outside of the clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

from vitfn import flagfile, train
from vitfn.errors import InputError

FLAGFILES = sorted(path.name for path in (ROOT / "flags").iterdir())
DATA = ["py.typed", "published.csv", "imagenet1k.txt"]
SOURCES = ["LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "requirements.txt", "setup.py"]
EXTRAS = {"export", "report", "randaugment", "hub", "all"}


# --- flagfiles by name


@pytest.fixture(params=["clone", "installed"])
def folder(request, tmp_path, monkeypatch) -> Path:
    """The working folder, an empty one, with the flagfiles where a clone or an installation has them."""
    if request.param == "installed":
        shutil.copytree(ROOT / "flags", tmp_path / "flagfiles")
        monkeypatch.setattr(flagfile, "FOLDER", tmp_path / "flagfiles")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return Path()


@pytest.mark.parametrize("name", ["quickstart", "quickstart.flags", "flags/quickstart.flags", "./flags/quickstart"])
def test_a_flagfile_is_found_by_its_name_from_any_folder(folder, name):
    assert Path(flagfile.find(name)) == flagfile.FOLDER / "quickstart.flags"


def test_a_file_that_is_there_comes_first_and_a_folder_does_not(folder):
    (folder / "quickstart").mkdir()  # as --output_dir=. leaves
    assert Path(flagfile.find("quickstart")) == flagfile.FOLDER / "quickstart.flags"
    (folder / "quickstart.flags").touch()
    assert flagfile.find("quickstart.flags") == "quickstart.flags"


@pytest.mark.parametrize("name", ["quick", "other/quickstart.flags", "/flags/quickstart.flags", "../flags/quickstart"])
def test_an_unknown_name_is_one_line_with_those_there_are(folder, name, capsys):
    with pytest.raises(InputError, match="quickstart"):
        flagfile.find(name)
    assert train.main(["train", f"--flagfile={name}"]) == 2
    names = ", ".join(sorted(name.removesuffix(".flags") for name in FLAGFILES))
    expected = f"a file of flags or the name of one of vitfn's: {names}"
    assert capsys.readouterr() == ("", f"vitfn: --flagfile={name}: found no such file, expected {expected}\n")


def test_a_folder_is_no_flagfile(folder):
    (folder / "mine").mkdir()
    with pytest.raises(InputError, match="--flagfile=mine: found a folder, expected a file"):
        flagfile.find("mine")


def test_a_flagfile_may_name_another_by_its_name(folder):
    (folder / "mine.flags").write_text("# digits, but shorter\n--flagfile=quickstart\n--num_steps=7\n")
    argv = flagfile.FlagValues().read_flags_from_files(["--flagfile", "mine.flags", "--seed=1"])
    assert {"--dataset=digits", "--num_steps=800"} < set(argv)
    assert argv[-2:] == ["--num_steps=7", "--seed=1"]


def test_no_flagfile_is_none():
    assert flagfile.FlagValues().read_flags_from_files(["--flagfile=", "--seed=1"]) == ["--seed=1"]


# --- the sdist and the wheel


class Built(NamedTuple):
    """An sdist, the wheel made of it, and what the builds printed."""

    sdist: Path
    wheel: Path
    printed: str

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return message_from_bytes(archive.read(name))


def python(*arguments, cwd: Path, **variables: str) -> str:
    """What a Python prints that does not see the clone, has no settings of its own, and succeeds."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """From a copy of the clone, since builds write beside the sources."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        shutil.copy(ROOT / name, clone)
    for name in ("flags", "tests", "vitfn"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    printed = python("-c", code, out, cwd=clone)
    (sdist,) = out.iterdir()
    wheel = ["-m", "pip", "wheel", "--verbose", "--no-deps", "--no-index", "--no-build-isolation"]
    printed += python(*wheel, f"--wheel-dir={out}", sdist, cwd=out)
    return Built(sdist, *out.glob("*.whl"), printed)


@pytest.mark.slow
def test_the_builds_warn_of_nothing(built):
    assert not re.findall(r".*(?:warning|deprecat).*", built.printed, re.I)


@pytest.mark.slow
def test_the_sdist_has_the_sources_and_no_tests(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SOURCES, *(f"flags/{name}" for name in FLAGFILES)} <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
def test_the_wheel_has_every_module_flagfile_and_table_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vitfn").rglob("*.py")}
    assert names == modules | {f"vitfn/flagfiles/{name}" for name in FLAGFILES} | {f"vitfn/{name}" for name in DATA}


@pytest.mark.slow
def test_the_metadata_say_license_python_and_extras(built):
    metadata = built.metadata()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    required = metadata.get_all("Requires-Dist")
    core = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in required if "extra ==" not in line] == core
    # An extra and the tests mean the same versions.
    tested = (ROOT / "requirements-dev.txt").read_text().splitlines()
    for line in required:
        name, _, extra = line.partition("; extra == ")
        assert extra.strip("\"'") in ("", "hub", "all") or name in tested, line


@pytest.mark.slow
def test_the_installed_wheel_trains_outside_of_the_clone(built, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    python("-m", "pip", "install", "--no-deps", "--no-index", f"--target={site}", built.wheel, cwd=empty)
    where = "import vitfn, vitfn.flagfile as f; print(vitfn.__file__, f.FOLDER, sep='\\n')"
    found = python("-c", where, cwd=empty, PYTHONPATH=str(site)).splitlines()
    assert list(map(Path, found)) == [site / "vitfn/__init__.py", site / "vitfn/flagfiles"]
    flags = ["--num_steps=2", "--eval_every=2", "--device=cpu", "--compile=off", f"--output_dir={tmp_path / 'output'}"]
    python("-m", "vitfn.train", "--flagfile=quickstart", *flags, cwd=empty, PYTHONPATH=str(site))
    assert (tmp_path / "output/quickstart/model.npz").exists()
    assert not list(empty.iterdir())
