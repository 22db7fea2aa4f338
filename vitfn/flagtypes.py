"""How the values of flags are read, and a short way to define a flag."""

import dataclasses
import json
import math
import re
from functools import partial
from typing import Any

from absl import flags

from vitfn.config import ViTConfig
from vitfn.errors import InputError


class _NumberParser(flags.FloatParser):
    """absl's lets nan and inf pass its bounds."""

    def convert(self, argument: float | str) -> float:
        if not math.isfinite(value := float(argument)):
            raise ValueError("expected a finite number")
        return value


class Definitions:
    """absl's functions that define a flag, for one FlagValues."""

    def __init__(self, fv: flags.FlagValues):
        self.string = partial(flags.DEFINE_string, flag_values=fv)
        self.bool = partial(flags.DEFINE_bool, flag_values=fv)
        self.integer = partial(flags.DEFINE_integer, flag_values=fv)
        self.enum = partial(flags.DEFINE_enum, flag_values=fv)
        self.custom = partial(flags.DEFINE, flag_values=fv)

    def float(
        self, name: str, default: float | None, help: str, lower_bound: float | None = None, upper: float | None = None
    ) -> None:
        self.custom(_NumberParser(lower_bound, upper), name, default, help)


class SizeParser(flags.ArgumentParser):
    """'224' -> 224, '192x256' -> (192, 256)."""

    syntactic_help = "pixels, or HEIGHTxWIDTH"

    def parse(self, argument: int | tuple[int, int] | str) -> int | tuple[int, int]:
        if not isinstance(argument, str):
            return argument
        try:
            sides = tuple(int(side) for side in argument.lower().split("x"))
        except ValueError:
            sides = ()
        if len(sides) == 1:
            return sides[0]
        if len(sides) == 2:
            return sides
        raise ValueError(f"expected {self.syntactic_help}")


class PairParser(flags.ArgumentParser):
    """'2,10' -> (2, 10)."""

    syntactic_help = "two integers, as in 2,10"

    def parse(self, argument: tuple[int, int] | str) -> tuple[int, int]:
        if not isinstance(argument, str):
            return argument
        try:
            first, second = (int(part) for part in argument.split(","))
        except ValueError:
            raise ValueError(f"expected {self.syntactic_help}") from None
        return first, second


class BatchParser(flags.ArgumentParser):
    """'8' -> 8, 'dynamic' -> 'dynamic'."""

    syntactic_help = "an integer of at least 1, or dynamic"

    def parse(self, argument: int | str) -> int | str:
        if argument == "dynamic":
            return argument
        try:
            number = int(argument)
        except ValueError:
            number = 0
        if number < 1:
            raise ValueError(f"expected {self.syntactic_help}")
        return number


def parse_assumed(assumed: str) -> dict[str, Any]:
    """'num_heads=3,gelu=tanh' -> fields of a ViTConfig."""
    known = {field.name for field in dataclasses.fields(ViTConfig)} - {"resnet", "name"}
    parsed: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", assumed) if assumed else ():  # a list's commas are its own
        name, equals, value = item.partition("=")
        if not equals or name not in known:
            raise InputError(f"--assume: found {item!r}, expected FIELD=VALUE with one of {', '.join(sorted(known))}")
        try:
            parsed[name] = SizeParser().parse(value) if name == "image_size" else json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed
