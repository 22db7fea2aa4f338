"""torch is imported here first, with stdout kept clean: extensions that it loads by itself may print a banner there."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What is printed in here, by Python or by C code, goes to stderr: stdout is for data."""
    try:
        stdout = os.dup(1)
    except OSError:  # closed: nothing can be printed
        yield
        return
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows' C library has no such name
            ctypes.CDLL(None).fflush(None)  # C's own buffer would be written to stdout later
        os.dup2(stdout, 1)
        os.close(stdout)


if "torch" not in sys.modules:
    with stdout_to_stderr():
        import torch  # noqa: F401
