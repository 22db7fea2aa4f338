"""Runs a page's snippets one after the other, in this folder and one Python session: python tests/snippets.py < JSON

Takes (language, text, where) of each; prints what each of them printed, as JSON, or ends with the first that fails.
"""

import contextlib
import io
import json
import subprocess
import sys
from typing import Any


def run(language: str, text: str, where: str, session: dict[str, Any]) -> str:
    """What a snippet prints on stdout."""
    if language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{where}: exit code {done.returncode}")
        return done.stdout
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, where, "exec"), session)
    return printed.getvalue()


if __name__ == "__main__":
    session: dict[str, Any] = {"__name__": "__main__"}
    print(json.dumps([run(*snippet, session) for snippet in json.load(sys.stdin)]))
