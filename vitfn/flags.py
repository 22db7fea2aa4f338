"""The commands' flags, defined once: each command builds FlagValues of its own from these groups."""

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from vitfn.compile import FORMS
from vitfn.config import ViTConfig, model_names
from vitfn.data import DATASETS
from vitfn.device import DEVICES
from vitfn.errors import InputError
from vitfn.step import PRECISIONS
from vitfn.weights import LAYOUTS

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
NOT_SETTINGS = ("help", "h", "flagfile")


class _SizeParser(flags.ArgumentParser):
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


def data_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_enum("dataset", "cifar10", list(DATASETS), "What to train and evaluate on.", flag_values=fv)
    flags.DEFINE_string("data_dir", "data", "Folder with the dataset's files; digits needs none.", flag_values=fv)
    flags.DEFINE_bool("download", False, "Fetch the dataset into --data_dir if it is not there.", flag_values=fv)
    flags.DEFINE_integer("eval_batch_size", 64, "Images per evaluation batch.", lower_bound=1, flag_values=fv)


def model_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model_type",
        "ViT-B_16",
        f"One of {', '.join(model_names())}, or big_vision's (g/14); B/16 is short for ViT-B_16.",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "pretrained_dir",
        "checkpoint/ViT-B_16.npz",
        "File of weights to start from (a file, in spite of the name): npz, safetensors or torch, in any layout that "
        "vitfn.convert reads; empty: start from random weights.",
        flag_values=fv,
    )
    flags.DEFINE(
        _SizeParser(),
        "img_size",
        224,
        "Size of the model's images, in pixels: one side, or HEIGHTxWIDTH.",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "head",
        "zero",
        ["zero", "keep"],
        "Start from a classification head of zeros, or keep the file's.",
        flag_values=fv,
    )
    flags.DEFINE_float(
        "dropout_rate",
        None,
        "Probability of dropping an activation; default: as published for the model.",
        0,
        1,
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "gelu",
        None,
        ["tanh", "erf"],
        "Form of the GELU; default: as in the file of weights, else tanh.",
        flag_values=fv,
    )


def device_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "device", "auto", f"One of {', '.join(DEVICES)}; auto: the first of them that is there.", flag_values=fv
    )
    flags.DEFINE_enum(
        "precision",
        "auto",
        ["auto", *PRECISIONS],
        "Arithmetic: float32, or autocast to bfloat16 or float16; auto: "
        + ", ".join(f"{row.precision} on {row.name}" for row in DEVICES.values())
        + ".",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "compile",
        "auto",
        ["auto", *FORMS],
        "What is compiled: the step as one graph, one encoder block that all layers share, or nothing; auto: "
        + ", ".join(f"{row.compile} on {row.name}" for row in DEVICES.values())
        + ".",
        flag_values=fv,
    )


def train_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string("name", None, "Name of the run; its files go to <output_dir>/<name>.", flag_values=fv)
    flags.DEFINE_string("output_dir", "output", "Folder for runs.", flag_values=fv)
    flags.DEFINE_integer("train_batch_size", 512, "Images per update, over everything.", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer(
        "num_steps",
        10000,
        "Updates to make; 0: only evaluate, with the file's own head, and save no model.npz.",
        lower_bound=0,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "eval_every",
        100,
        "Updates between evaluations, of which there is always one at the end.",
        lower_bound=1,
        flag_values=fv,
    )
    flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adamw"], "SGD with momentum 0.9, or AdamW.", flag_values=fv)
    flags.DEFINE_float("learning_rate", 0.03, "Peak learning rate.", lower_bound=0, flag_values=fv)
    flags.DEFINE_float(
        "weight_decay",
        0.0,
        "Weight decay: with sgd an L2 penalty, with adamw decoupled, times the rate.",
        lower_bound=0,
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "decay_type",
        "cosine",
        ["cosine", "linear"],
        "How the rate falls after warm-up: to 0, or in a line to 1e-5.",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "warmup_steps", 500, "Updates over which the rate rises from 0.", lower_bound=0, flag_values=fv
    )
    flags.DEFINE_float("max_grad_norm", 1.0, "Global norm that gradients are clipped to.", flag_values=fv)
    flags.DEFINE_integer("seed", 42, "Seed of all randomness.", flag_values=fv)
    flags.DEFINE_float(
        "crop_min", 0.05, "Least part of an image's area that a random crop keeps, 0 to 1.", 0, 1, flag_values=fv
    )
    flags.DEFINE_bool("flip", False, "Mirror half of the training images left to right.", flag_values=fv)
    flags.DEFINE_bool("fp16", False, "The same as --precision=float16.", flag_values=fv)
    flags.DEFINE_string(
        "fp16_opt_level", "O2", "Accepted for the seed's command lines; means nothing here.", flag_values=fv
    )
    flags.DEFINE_float("loss_scale", 0, "Loss scale under float16: not built yet, only 0 is accepted.", flag_values=fv)
    flags.DEFINE_integer(
        "gradient_accumulation_steps",
        1,
        "Parts a batch is split into: not built yet, only 1 is accepted.",
        1,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "local_rank",
        -1,
        "Rank of this process on its machine: several are not built yet, only -1 and 0 are accepted.",
        -1,
        flag_values=fv,
    )


def convert_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "to",
        None,
        list(LAYOUTS),
        "Names and shapes to write; default: original in an npz file, timm in safetensors.",
        flag_values=fv,
    )
    flags.DEFINE(
        _SizeParser(),
        "img_size",
        None,
        "Resize the positions to images of this size in pixels: one side, or HEIGHTxWIDTH.",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "num_classes",
        None,
        "Replace a head of another number of classes by zeros; 0: write no head.",
        lower_bound=0,
        flag_values=fv,
    )
    flags.DEFINE_enum("pre_logits", "keep", ["keep", "drop"], "What to do with a pre_logits layer.", flag_values=fv)
    flags.DEFINE_integer(
        "channels", None, "Adapt the first layer to so many input channels.", lower_bound=1, flag_values=fv
    )


def compare_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string("plot", "", "Draw the curves to this file, whose suffix names the format.", flag_values=fv)
    flags.DEFINE_float(
        "limit",
        0.01,
        "Largest unsigned mean relative error that passes (a fraction); beyond it the exit code is 1.",
        lower_bound=0,
        flag_values=fv,
    )


def assume_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "assume",
        "",
        "What the file does not state: fields of the config, as in num_heads=3,gelu=tanh,mean=[0.4,0.5,0.6],"
        "image_size=192x256.",
        flag_values=fv,
    )


def parse_assumed(assumed: str) -> dict[str, Any]:
    """'num_heads=3,gelu=tanh' -> fields of a ViTConfig."""
    known = {field.name for field in dataclasses.fields(ViTConfig)} - {"resnet", "name"}
    parsed: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", assumed) if assumed else ():  # a list's commas are its own
        name, equals, value = item.partition("=")
        if not equals or name not in known:
            raise InputError(f"--assume: found {item!r}, expected FIELD=VALUE with one of {', '.join(sorted(known))}")
        try:
            parsed[name] = _SizeParser().parse(value) if name == "image_size" else json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def run_command(
    command: Callable[..., int | None],
    argv: list[str],
    *groups: Callable[[flags.FlagValues], None],
    arguments: tuple[str, ...] = (),
) -> int:
    """Parses `argv` and runs the command on the flags and arguments; returns the exit code.

    Bad input is one line on stderr and code 2.
    """
    fv = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show all flags and exit.", short_name="h", flag_values=fv)
    flags.DEFINE_string("flagfile", "", "File of flags, one a line, that take this one's place.", flag_values=fv)
    for group in groups:
        group(fv)
    logging.basicConfig(format="vitfn: %(message)s", stream=sys.stderr)
    logging.getLogger("vitfn").setLevel(logging.INFO)
    try:
        extra = fv(argv)[1:]
        if fv.help:
            print(sys.modules[command.__module__].__doc__, fv.get_help(include_special_flags=False), sep="\n")
            return 0
        if len(extra) != len(arguments):
            expected = f"the arguments {' '.join(arguments)}" if arguments else "--flag=value"
            raise InputError(f"found {' '.join(extra) or 'no arguments'}, expected {expected}")
        code = command(fv, *extra)
        sys.stdout.flush()
    except (flags.Error, InputError) as error:
        print("vitfn: " + " ".join(str(error).split()), file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"vitfn: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("vitfn: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code or 0
