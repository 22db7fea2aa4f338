# BSD 3- Clause License Copyright (c) 2023, Tecorigin Co., Ltd. All rights
# reserved.
# Redistribution and use in source and binary forms, with or without
# modification, are permitted provided that the following conditions are met:
# Redistributions of source code must retain the above copyright notice,
# this list of conditions and the following disclaimer.
# Redistributions in binary form must reproduce the above copyright notice,
# this list of conditions and the following disclaimer in the documentation
# and/or other materials provided with the distribution.
# Neither the name of the copyright holder nor the names of its contributors
# may be used to endorse or promote products derived from this software
# without specific prior written permission.
#
# THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
# AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
# IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE
# ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE
# LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR
# CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF
# SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS
# INTERRUPTION)
# HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT,
# STRICT LIABILITY,OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE)  ARISING IN ANY
# WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY
# OF SUCH DAMAGE.
"""The ModelZoo's arguments, and the command line of vitfn.train that they mean."""

import argparse
import sys

MODELS = {"vit": "ViT-B_16", "vit_base": "ViT-B_16", "vit_large": "ViT-L_16", "vit_huge": "ViT-H_14"}
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_438}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; `extra` has what follows `--`, for vitfn.train. Exits with 2 and one line where they are wrong."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if reason := _refusal(args):
        parser.exit(2, f"{parser.prog}: {reason}\n")
    return args


def command(args: argparse.Namespace) -> list[str]:
    """What is run, as a list of words: one process by itself, more of them under torch.distributed.run."""
    processes = args.nproc_per_node * args.nnode
    batch = args.batch_size * processes  # vitfn's is that of all processes
    steps = args.step if args.step > 0 else max(1, args.epoch * TRAINING_IMAGES[args.dataset] // batch)
    launcher = [
        "torch.distributed.run",
        f"--nproc_per_node={args.nproc_per_node}",
        f"--nnodes={args.nnode}",
        f"--node_rank={args.node_rank}",
        f"--master_addr={args.master_addr}",
        f"--master_port={args.master_port}",
        "-m",
    ]
    flags = {
        "name": args.name,
        "model_type": MODELS.get(args.model_name.lower(), args.model_name),
        "dataset": args.dataset,
        "data_dir": args.dataset_path,
        "img_size": args.img_size,
        "pretrained_dir": args.pretrained_dir,
        "train_batch_size": batch,
        "num_steps": steps,
        "eval_every": steps if args.step > 0 else max(1, steps // args.epoch),
        "warmup_steps": args.warm_up if args.warm_up >= 0 else None,
        "learning_rate": args.lr,
        "optimizer": args.optimizer,
        "num_workers": args.num_workers,
        "device": args.device,
        "precision": "auto" if args.autocast else "float32",
        "compile": "auto" if args.compile else "off",
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    words = [sys.executable, "-m", *(launcher if processes > 1 else []), "vitfn.train", *given, "--tcap_log"]
    return [*words, *args.extra]


def _refusal(args: argparse.Namespace) -> str:
    """Why vitfn cannot do what is asked for; empty where it can."""
    for name in ("batch_size", "nproc_per_node", "nnode", "epoch"):
        if (found := getattr(args, name)) < 1:
            return f"--{name}: found {found}, expected a number from 1"
    if not 0 <= args.node_rank < args.nnode:
        return f"--node_rank: found {args.node_rank}, expected 0 to {args.nnode - 1}, below --nnode"
    if args.step < 1 and args.dataset not in TRAINING_IMAGES:
        return f"--epoch: the size of --dataset={args.dataset} is not known here; expected --step=N instead"
    if args.nnode > 1 and not args.name:
        return "--nnode: more than one machine needs the same --name=NAME on all of them; found none"
    for name in ("profiler", "precision_align", "mlperf_mode"):
        if getattr(args, name):
            return f"--{name}: found True, which vitfn does not have; expected False"
    if args.early_stop >= 0:
        return f"--early_stop: found {args.early_stop}, which vitfn does not have; expected --step=N instead"
    if args.resume:
        return f"--resume: found {args.resume}; expected --name=NAME of the run to go on with, and '-- --resume'"
    return ""


def _boolean(text: str) -> bool:
    """'True' or 'False', as the ModelZoo's commands have it."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")
    return text.lower() == "true"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a Vision Transformer by vitfn.train.",
        epilog="What follows -- goes to vitfn.train as it is; `python -m vitfn.train --help` lists its flags.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name", required=True, help="vit (ViT-B_16), vit_large, vit_huge, or a --model_type of vitfn")
    add("--epoch", type=int, default=1, help="passes over the training images")
    add("--step", type=int, default=-1, help="updates to make; above 0 it takes the place of --epoch")
    add("--batch_size", "--bs", type=int, required=True, help="images an update, of one device")
    add("--dataset_path", required=True, help="folder with the dataset's files")
    add("--dataset", default="cifar10", help="cifar10, cifar100, digits (needs no files), folder or list")
    add("--nproc_per_node", type=int, default=1, help="processes, and so devices, of a machine; a card has 4 devices")
    add("--nnode", type=int, default=1, help="machines")
    add("--node_rank", type=int, default=0, help="number of this machine, from 0")
    add("--master_addr", default="127.0.0.1", help="address of machine 0")
    add("--master_port", type=int, default=29500, help="a free port of machine 0")
    add("--lr", "--learning-rate", type=float, required=True, help="peak learning rate")
    add("--warm_up", type=int, default=-1, help="updates over which the rate rises; -1: vitfn's 500")
    add("--optimizer", default="sgd", help="sgd or adamw")
    add("--num_workers", type=int, default=2, help="processes that decode image files")
    add("--device", required=True, choices=("cpu", "cuda", "sdaa"), help="what to train on")
    add("--autocast", type=_boolean, default=False, help="True: the device's half precision; False: float32")
    add("--grad_scale", type=_boolean, default=False, help="accepted: float16 is always scaled, float32 never")
    add("--compile", type=_boolean, default=False, help="True: torch.compile, one block of it")
    add("--img_size", default="224", help="side of the model's images, in pixels, or HEIGHTxWIDTH")
    add("--pretrained_dir", help="file of weights; empty: random ones; default: checkpoint/ViT-B_16.npz")
    add("--name", default="", help="the run's folder in output/; default: the model and the time")
    add("--reference", default="", help="curve to compare with; default: cuda.log, if it is there")
    add("--resume", help="refused; --name=NAME -- --resume goes on with a run")
    add("--early_stop", type=int, default=-1, help="refused")
    for name in ("profiler", "precision_align", "mlperf_mode"):
        add(f"--{name}", type=_boolean, default=False, help="refused if True")
    for name in ("profiler_path", "precision_align_cuda_path", "precision_align_log_path"):
        add(f"--{name}", help="accepted; belongs to what is refused")
    return parser
