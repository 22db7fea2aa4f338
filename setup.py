"""The packages of the wheel: all of vitfn, and flags/ as vitfn/flagfiles, which pyproject.toml alone cannot say."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vitfn", "vitfn.*"]), "vitfn.flagfiles"],
    package_dir={"vitfn.flagfiles": "flags"},
)
