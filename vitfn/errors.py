"""The exceptions that mean: what is at fault is the input, or the world, not the program."""

from collections.abc import Sequence


class RunError(RuntimeError):
    """A run cannot go on, though its input is right: no space, numbers that are not finite. One line, exit code 1."""


def printable(text: str) -> str:
    """A text as a line that shows: names in foreign files hold any character, a terminal's commands too."""
    return "".join(character if character.isprintable() else "?" for character in text)


class InputError(ValueError):
    """A flag, file or argument is wrong. The message is one line: what it is, what was found, what was expected.

    Commands print it to stderr and exit with code 2; a library caller sees an ordinary ValueError.
    """

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.splitlines())))


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(text: object, most: int | None = None) -> str:
    """A text, or an error's, without its line breaks, cut to so many characters."""
    return " ".join(str(text).split())[:most]
