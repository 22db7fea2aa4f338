"""The same work by vitfn, timm, Hugging Face, torchvision and Flax, interleaved: python benchmarks/peers.py --help

benchmarks/README.md says what is measured, and how. Each contender is a process (peers_worker.py) that does a step when
it is asked to; this one asks them in turn.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers_report
import torch
from peers_report import WARMUP
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # this clone's vitfn

import vitfn  # noqa: E402

CONTENDERS = ("vitfn", "timm", "timm compiled", "Hugging Face", "torchvision", "Flax")
PACKAGES = ("torch", "timm", "transformers", "torchvision", "jax", "flax", "optax")
QUESTIONS = ("train", "eval", "memory", "first")
DEEPER = 4  # times the layers, for what the first step of a deep model takes
Ask = Callable[[str], dict]


@contextlib.contextmanager
def prepared(model: str, batch: int, layers: int | None, options: argparse.Namespace) -> Iterator[dict]:
    """A job without its question, whose folder holds the weights that all begin with, in everybody's layout."""
    config = vitfn.get_config(model, dropout_rate=0.0, **({"num_layers": layers} if layers else {}))
    params = vitfn.init(config)
    params["head"]["kernel"].normal_(0, 0.02, generator=torch.Generator().manual_seed(0))  # or all losses are log K
    with tempfile.TemporaryDirectory() as folder:
        vitfn.save(f"{folder}/original.npz", params, config)
        for layout in ("timm", "huggingface5", "torchvision"):
            vitfn.save(f"{folder}/{layout}.safetensors", params, config, layout=layout)
        yield {
            "config": dataclasses.asdict(config),
            "batch": batch,
            "device": options.device,
            "precision": options.precision,
            "threads": str(options.threads),
            "folder": folder,
        }


@contextlib.contextmanager
def worker(contender: str, job: dict, cache: str) -> Iterator[Ask]:
    """A process with the contender, which has built its step; `ask('')` reads what it says first."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": job["threads"],
        "NPROC": job["threads"],  # what XLA takes for the number of cores
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "JAX_PLATFORMS": job["device"],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, str(HERE / "peers_worker.py"), contender, json.dumps(job)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said, **pipes) as process:
        questions, answers = process.stdin, process.stdout
        assert questions
        assert answers

        def ask(question: str) -> dict:
            if question:
                with contextlib.suppress(BrokenPipeError):
                    print(question, file=questions, flush=True)
            if answer := answers.readline():
                return json.loads(answer)
            said.seek(0)
            raise SystemExit(f"{contender}: its process ended with {process.wait()}\n{said.read()[-2000:]}")

        try:
            yield ask
        except BaseException:
            process.kill()
            raise
        questions.close()  # the worker ends


def steps(job: dict, contenders: list[str], rounds: int) -> tuple[dict[str, dict], dict[str, str]]:
    """Each contender's seconds and losses, round by round, and memory; and who is left out, with the reason.

    All are asked in turn, so that what else the machine does meets all, and each round begins with another one.
    """
    found: dict[str, dict] = {}
    asks: dict[str, Ask] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as workers:
        for name in contenders:
            ask = workers.enter_context(worker(name, job, cache))
            if reason := ask("").get("left_out"):
                left_out[name] = reason
            else:
                asks[name], found[name] = ask, {"seconds": [], "losses": []}
        with tqdm(total=rounds * len(asks), desc=f"{job['config']['name']}, {job['what']}") as progress:
            for place in range(rounds):
                names = list(asks)
                for name in names[place % len(names) :] + names[: place % len(names)]:
                    answer = asks[name]("step")
                    found[name]["seconds"].append(answer["seconds"])
                    found[name]["losses"].append(answer["loss"])
                    progress.update()
                if place + 1 == WARMUP:
                    for ask in asks.values():
                        ask("settle")
        for name, ask in asks.items():
            found[name] |= ask("memory")
    return found, left_out


def wait(contender: str, job: dict, cache: str) -> dict:
    """Seconds from a step that is built to its first result, beyond those of a steady one, in a new process."""
    with worker(contender, job, cache) as ask:
        answer = ask("")
        if "left_out" in answer:
            return answer
        first, *steady = (ask("step")["seconds"] for _ in range(4))
    return {"seconds": first - statistics.median(steady)}


def first(job: dict, contenders: list[str], repeats: int) -> tuple[dict[str, dict], dict[str, str]]:
    """Each contender's waits with empty caches ('cold') and in a second process with the same ones ('warm')."""
    found: dict[str, dict] = {name: {"cold": [], "warm": []} for name in contenders}
    left_out: dict[str, str] = {}
    config = job["config"]
    progress = tqdm(total=repeats * len(contenders) * 2, desc=f"{config['name']}, {config['num_layers']} layers, first")
    with progress:
        for _ in range(repeats):
            for name in contenders:
                with tempfile.TemporaryDirectory() as cache:
                    for caches in ("cold", "warm"):
                        answer = wait(name, job, cache)
                        progress.update()
                        if "left_out" in answer:
                            left_out[name] = answer["left_out"]
                        else:
                            found[name][caches].append(answer["seconds"])
    return {name: waits for name, waits in found.items() if name not in left_out}, left_out


def machine(device: str, threads: int) -> str:
    """In words: the processor and its cores, or the accelerator."""
    if device != "cpu":
        return getattr(torch, device).get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}, {threads} threads"


def facts(device: str, threads: int) -> dict:
    """Where and when a record was made, and with what."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    versions["vitfn"] = commit.stdout.strip() or vitfn.__version__
    return {"machine": machine(device, threads), "date": datetime.date.today().isoformat(), "versions": versions}


def measure(options: argparse.Namespace, keep: Callable[[dict], None]) -> None:
    """Gives `keep` a record for each question and model."""
    contenders, models = options.contenders, options.models

    def record(job: dict, what: str, measured: tuple[dict[str, dict], dict[str, str]]) -> None:
        found, left_out = measured
        for name, reason in left_out.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        what_of = {"what": what, "model": job["config"]["name"], "layers": job["config"]["num_layers"]}
        what_of |= {field: job[field] for field in ("batch", "device", "precision")}
        keep({**what_of, **facts(options.device, options.threads), "left_out": left_out, "contenders": found})

    for model, batch in models:
        with prepared(model, batch, options.layers, options) as job:
            for what in ("train", "eval"):
                if what in options.what or (what == "train" and "memory" in options.what):
                    record(job, what, steps({**job, "what": what}, contenders, options.rounds))
    if "first" in options.what:
        for model, batch in dict.fromkeys((models[0], models[-1])):
            with prepared(model, batch, options.layers, options) as job:
                record(job, "first", first({**job, "what": "train"}, contenders, options.repeats))
                layers = job["config"]["num_layers"]
        model, batch = models[0]
        with prepared(model, batch, DEEPER * layers, options) as job:
            record(job, "first", first({**job, "what": "train"}, ["vitfn"], options.repeats))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    def model(text: str) -> tuple[str, int]:
        name, _, batch = text.rpartition(":")
        return name, int(batch)

    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("models", nargs="*", type=model, metavar="MODEL:BATCH", help="default: Ti/16:16 S/16:8 B/16:4")
    parser.add_argument("--what", type=several, default=list(QUESTIONS), help=f"of {','.join(QUESTIONS)}: all of them")
    parser.add_argument("--contenders", type=several, default=list(CONTENDERS), help=f"of {','.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=9, help=f"steps of each, of which {WARMUP} warm up: 9")
    parser.add_argument("--repeats", type=int, default=3, help="of each wait for a first result: 3")
    parser.add_argument("--layers", type=int, help="instead of the model's own number of them")
    parser.add_argument("--threads", type=int, default=2, help="of each contender on a CPU: 2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="by autocast: float32")
    parser.add_argument("--out", type=Path, default=Path("output/peers"), help="a folder, which keeps earlier records")
    parser.add_argument("--write", action="store_true", help="put tables and plot into benchmarks/README.md")
    options = parser.parse_args(arguments)
    options.models = options.models or [("Ti/16", 16), ("S/16", 8), ("B/16", 4)]
    for field, known in (("what", QUESTIONS), ("contenders", CONTENDERS)):
        if unknown := set(getattr(options, field)) - {*known, ""}:
            parser.error(f"--{field}: found {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    options.contenders = [name for name in CONTENDERS if name in {"vitfn", *options.contenders}]
    if options.rounds < WARMUP + 2:
        parser.error(f"--rounds: found {options.rounds}, expected at least {WARMUP + 2}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "records.json"
    found = {peers_report.key(record): record for record in (json.loads(path.read_text()) if path.exists() else [])}

    def keep(record: dict) -> None:
        found[peers_report.key(record)] = record
        path.write_text(json.dumps(list(found.values()), indent=1))

    measure(options, keep)
    records = list(found.values())
    text = peers_report.tables(records)
    (options.out / "tables.md").write_text(text)
    print(text)
    peers_report.save_plot(records, options.out / "peers.png")
    if options.write:
        peers_report.write(text, options.out / "peers.png", HERE / "README.md")


if __name__ == "__main__":
    main()
