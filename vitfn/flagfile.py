"""Finds a flagfile by its name: those of flags/ are part of vitfn, in a clone and installed."""

import os
from pathlib import Path

from absl import flags

from vitfn.errors import InputError

_HERE = Path(__file__)
_INSTALLED = _HERE.with_name("flagfiles")  # as setup.py puts flags/ into a wheel
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _HERE.parents[1] / "flags"


class FlagValues(flags.FlagValues):
    """absl's, whose flagfiles, and the flagfiles that these name, are found by `find`."""

    def _get_flag_file_lines(self, filename, parsed_file_stack=None):  # the one place where absl opens either
        return super()._get_flag_file_lines(find(filename), parsed_file_stack)


def find(name: str) -> str:
    """The path of a flagfile: `name` where that is a file, else the one of vitfn's own that it names.

    A name of vitfn's own may go without `.flags`, and with `flags/` before it, in any folder. No name is left as it is.
    Raises InputError, which lists the names there are.
    """
    is_folder = os.path.isdir(name)
    if not name or (os.path.exists(name) and not is_folder):  # a pipe too
        return name
    own = {path.stem: path for path in FOLDER.glob("*.flags")}
    path = Path(name)
    stem = path.name.removesuffix(".flags")
    if path.parent in (Path(), Path("flags")) and stem in own:
        return str(own[stem])
    raise InputError(
        f"--flagfile={name}: found {'a folder' if is_folder else 'no such file'}, expected a file of flags or the name "
        f"of one of vitfn's: {', '.join(sorted(own))}"
    )
