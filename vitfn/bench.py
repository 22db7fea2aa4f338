"""Measures a model: python -m vitfn.bench --model_type=ViT-Ti_16 --train_batch_size=16 [--what=train,eval] [--out=DIR]

Speed, utilisation and memory of the train and the eval step, the input pipeline, compiling, and a breakdown by part and
operator. Takes the flags of vitfn.train, a recipe's --flagfile too, with --dataset=digits and batches of 16 where they
are not given; weights and images are random, and what is not a step's is ignored. Of several things to measure each
has a process to itself.
"""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from absl.flags import FlagValues

from vitfn import __version__, bench_measures, bench_table, device, flags, operators, vit, workload
from vitfn.command import run_command
from vitfn.errors import InputError, RunError
from vitfn.files import replacing
from vitfn.workload import Workload

WHAT = ("train", "eval", "input", "compile", "parts")  # compile consists of trains
log = logging.getLogger("vitfn")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""

    def bench(fv: FlagValues) -> int:
        return command(fv, argv[1:])

    return run_command(bench, argv, *flags.TRAIN, flags.bench_flags, _other_defaults)


def _other_defaults(fv: FlagValues) -> None:
    for name, value in (("dataset", "digits"), ("train_batch_size", 16), ("pretrained_dir", "")):
        fv.set_default(name, value)


def command(fv: FlagValues, argv: list[str]) -> int:
    """The command; `argv` are its flags as they were given."""
    asked = fv.what.split(",")
    if unknown := [what for what in asked if what not in WHAT]:
        raise InputError(f"--what: found {unknown[0]!r}, expected some of {','.join(WHAT)}")
    work = workload.from_flags(fv)
    if fv.out:
        Path(fv.out).mkdir(parents=True, exist_ok=True)
    if len(asked) == 1 and asked != ["compile"]:
        log.info("measuring %s", asked[0])
        results = {asked[0]: bench_measures.MEASURES[asked[0]](work)}
    else:
        results, code = _apart(asked, argv)
        if code:  # of a process that has said why
            return code
    report = _heading(work, argv) | results
    if {"input", "train"} <= results.keys():
        share = results["input"]["milliseconds"]["median"] / results["train"]["milliseconds"]["median"]
        report["input"]["share_of_train_step"] = share
    if fv.out:
        with replacing(Path(fv.out) / "bench.json") as file:
            file.write(json.dumps(report, indent=2).encode() + b"\n")
        if "parts" in report:
            rows = [operators.Operator(**row) for row in report["parts"]["operators"]]
            operators.write_csv(Path(fv.out) / "profile.csv", rows)
    print(bench_table.table(report))
    return 0


def _apart(asked: list[str], argv: list[str]) -> tuple[dict[str, Any], int]:
    """What was measured, each by a process of its own, and the exit code of the first that fails, else 0."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, what, more, environment in _processes(asked, folder):
            out = Path(folder) / name
            words = [sys.executable, "-m", "vitfn.bench", *argv, *more, f"--what={what}", f"--out={out}"]
            code = subprocess.run(words, env=os.environ | environment, stdout=subprocess.DEVNULL).returncode
            if code < 0:
                raise RunError(f"--what={what}: signal {-code} ended its process; is there too little memory?")
            if code:
                return {}, code
            results[name] = json.loads((out / "bench.json").read_text())[what]
    if "cold" in results:
        cold, warm = results.pop("cold"), results.pop("warm")
        waits = {name: each["first_seconds"] - each["milliseconds"]["median"] / 1000
                 for name, each in (("cold", cold), ("warm", warm))}  # fmt: skip
        results["compile"] = {"form": cold["form"], "seconds": waits}
    return results, 0


def _processes(asked: list[str], folder: str) -> Iterator[tuple[str, str, list[str], dict[str, str]]]:
    """Name, what to measure, more flags and environment of each process."""
    for what in asked:
        if what != "compile":
            yield what, what, [], {}
            continue
        for name in ("cold", "warm"):  # caches: empty, and as the process before left them
            log.info("compiling, with %s caches:", name)
            yield name, "train", ["--rounds=3"], {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "caches")}


def _heading(work: Workload, argv: list[str]) -> dict[str, Any]:
    """What was measured, where, and with what."""
    config = work.config
    return {
        "command": shlex.join(["python", "-m", "vitfn.bench", *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": config.name,
            "parameters": sum(torch.Size(shape).numel() for shape in vit.shapes(config).values()),
            "image_size": list(config.image_hw),
            "tokens": config.num_tokens,
            "dropout_rate": config.dropout_rate,
        },
        "optimizer": work.fv.optimizer,
        "device": work.row.name,
        "precision": work.precision,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            **device.facts(work.row),
        },
        "versions": {"vitfn": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
