"""What all commands share: flags parsed, errors in one line, exit codes."""

import logging
import os
import sys
from collections.abc import Callable

from absl import flags

from vitfn.errors import InputError, RunError, one_line
from vitfn.flagfile import FlagValues
from vitfn.parallel import process_name

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def run_command(
    command: Callable[..., int | None],
    argv: list[str],
    *groups: Callable[[flags.FlagValues], None],
    arguments: tuple[str, ...] = (),
) -> int:
    """Parses `argv` and runs the command on the flags and arguments; returns the exit code.

    Of `arguments` the last may end in '...': one or more of it, which the command takes as `*args`.
    Bad input is one line on stderr and code 2, a run that cannot go on one line and code 1.
    """
    fv = FlagValues()
    flags.DEFINE_bool("help", False, "Show all flags and exit.", short_name="h", flag_values=fv)
    flags.DEFINE_string(
        "flagfile",
        "",
        "File of flags, one a line, that take this one's place; the name alone finds one of vitfn's, as in quickstart.",
        flag_values=fv,
    )
    for group in groups:
        group(fv)
    name = process_name()
    logging.basicConfig(format=f"{name}: %(message)s", stream=sys.stderr)
    logging.getLogger("vitfn").setLevel(logging.INFO)
    try:
        extra = _parse(fv, argv)
        if fv.help:
            print(sys.modules[command.__module__].__doc__, fv.get_help(include_special_flags=False), sep="\n")
            return 0
        several = bool(arguments) and arguments[-1].endswith("...")
        if len(extra) < len(arguments) or (len(extra) > len(arguments) and not several):
            expected = f"the arguments {' '.join(arguments)}" if arguments else "--flag=value"
            raise InputError(f"found {' '.join(extra) or 'no arguments'}, expected {expected}")
        code = command(fv, *extra)
        sys.stdout.flush()
    except (flags.Error, InputError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code or 0


def _parse(fv: flags.FlagValues, argv: list[str]) -> list[str]:
    """What is left of `argv` beside the flags."""
    try:
        return fv(argv)[1:]
    except ValueError as error:  # of --noflag=value
        raise InputError(str(error)) from None
