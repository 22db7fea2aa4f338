"""The commands' flags, defined once: each command builds FlagValues of its own from these groups.

python -m vitfn.flags prints the table of vitfn.train's, as it stands in README.md.
"""

import re
from collections.abc import Callable, Iterable

from absl import flags

from vitfn.compile import FORMS
from vitfn.config import model_names
from vitfn.data import DATASETS
from vitfn.data.crops import SAMPLERS
from vitfn.device import DEVICES
from vitfn.flagtypes import BatchParser, Definitions, PairParser, SizeParser
from vitfn.logits import PRECISIONS
from vitfn.losses import LOSSES
from vitfn.parallel import TIMEOUT
from vitfn.remat import KINDS as REMATS
from vitfn.weights import LAYOUTS


def data_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.enum(
        "dataset",
        "cifar10",
        list(DATASETS),
        "What to train and evaluate on; folder: --data_dir has train/ and val/ with a folder of images for each class, "
        "or such folders alone; list: it is, or has, train and val as .csv (image,label) or .jsonl.",
    )
    define.string("data_dir", "data", "Folder with the dataset's files; digits needs none.")
    define.bool("download", False, "Fetch CIFAR into --data_dir if it is not there.")
    define.float(
        "val_fraction",
        0.1,
        "Part of each class that is held out for evaluation, between 0 and 1, where a folder or list has no val.",
        0,
        1,
    )
    define.float(
        "train_fraction",
        1.0,
        "Part of the training images that is trained on, the first in the dataset's order, above 0 to 1, not for a "
        "folder, whose order is that of its classes.",
        0,
        1,
    )
    define.integer(
        "num_workers",
        2,
        "Processes that decode image files ahead of the step; 0: this one, and nothing is ahead.",
        lower_bound=0,
    )
    define.enum(
        "bad_images",
        "fail",
        ["fail", "skip"],
        "What a torn or foreign image file does: end the run, or be named and left out.",
    )
    define.integer("eval_batch_size", 64, "Images per evaluation batch.", lower_bound=1)


def augment_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.float(
        "crop_min",
        0.05,
        "Least part of an image's area that a random crop keeps, 0 to 1; 1 keeps all of a square one.",
        0,
        1,
    )
    define.enum(
        "crop",
        "torchvision",
        list(SAMPLERS),
        "Whose sampler draws the crops: log-uniform ratios with antialiasing, or TensorFlow's.",
    )
    define.bool("flip", False, "Mirror half of the training images left to right.")
    define.custom(
        PairParser(),
        "randaugment",
        None,
        "RandAugment: operations an image and their magnitude, 0 to 10, as in 2,10 (needs kornia); default: none.",
    )
    define.float("erasing", 0.0, "Probability of erasing a random rectangle of an image, 0 to 1.", 0, 1)
    define.float("mixup", 0.0, "Alpha of mixup's Beta distribution, above 0; 0: off.", lower_bound=0)
    define.float(
        "cutmix",
        0.0,
        "Alpha of cutmix's Beta distribution, above 0; 0: off; with --mixup each takes half of the steps.",
        lower_bound=0,
    )


def model_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string(
        "model_type",
        "ViT-B_16",
        f"One of {', '.join(model_names())}, or big_vision's (g/14); B/16 is short for ViT-B_16.",
    )
    define.string(
        "pretrained_dir",
        "checkpoint/ViT-B_16.npz",
        "File of weights to start from (a file, in spite of the name): npz, safetensors or torch, in any layout that "
        "vitfn.convert reads; empty: start from random weights.",
    )
    define.custom(SizeParser(), "img_size", 224, "Size of the model's images, in pixels: one side, or HEIGHTxWIDTH.")
    define.integer(
        "channels",
        3,
        "Channels that image files are decoded to: 1 grey, 3 RGB, 4 RGBA; another number takes .npy files of it.",
        lower_bound=1,
    )
    define.enum("head", "zero", ["zero", "keep"], "Start from a classification head of zeros, or keep the file's.")
    define.float(
        "dropout_rate",
        None,
        "Probability of dropping an activation, 0 to below 1; default: as published for the model.",
        0,
        1,
    )
    define.enum("gelu", None, ["tanh", "erf"], "Form of the GELU; default: as in the file of weights, else tanh.")


def device_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string("device", "auto", f"One of {', '.join(DEVICES)}; auto: the first of them that is there.")
    define.enum(
        "precision",
        "auto",
        ["auto", *PRECISIONS],
        "Arithmetic: float32, or autocast to bfloat16 or float16; auto: "
        + ", ".join(f"{row.precision} on {row.name}" for row in DEVICES.values())
        + ".",
    )
    define.enum(
        "compile",
        "auto",
        ["auto", *FORMS],
        "What is compiled: the step as one graph, one encoder block that all layers share, or nothing; auto: "
        + ", ".join(f"{row.compile} on {row.name}" for row in DEVICES.values())
        + ".",
    )
    define.bool(
        "compile_fallback",
        True,
        "Where compiling fails, say so and go on with one block compiled, or nothing; false: end the run, exit code 1.",
    )


def run_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string("name", None, "Name of the run; its files go to <output_dir>/<name>.")
    define.string("output_dir", "output", "Folder for runs.")
    define.bool(
        "resume",
        False,
        "Go on with the run where its last checkpoint stands, to the same bits; begin it where there is none.",
    )
    define.integer(
        "eval_every", 100, "Updates between evaluations, of which there is always one at the end.", lower_bound=1
    )
    define.integer(
        "checkpoint_every",
        100,
        "Updates between checkpoints, of which there is always one at the end; 0: only then.",
        lower_bound=0,
    )
    define.integer("keep_checkpoints", 2, "Newest checkpoints to keep; the best weights are kept besides.", 1)
    define.bool("report", True, "Write report.html at the end (its pictures need matplotlib).")
    define.bool("tensorboard", False, "Write the metrics for TensorBoard too.")
    define.bool(
        "tcap_log",
        False,
        "Print a line for each step on stdout as Tecorigin's ModelZoo wants it: the first device's loss and images/s.",
    )


def train_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.integer("train_batch_size", 512, "Images per update, over all processes and parts.", lower_bound=1)
    define.integer(
        "num_steps",
        10000,
        "Updates to make; 0: only evaluate, with the file's own head, and save no model.npz.",
        lower_bound=0,
    )
    define.integer("seed", 42, "Seed of all randomness, any integer.")
    define.integer(
        "gradient_accumulation_steps",
        1,
        "Equal parts that a batch is split into, to save memory; the result is the same.",
        1,
    )
    define.enum(
        "remat",
        "none",
        [*REMATS, "auto"],
        "What of each encoder block is computed again in backward, to save memory, not for --compile=step: nothing, "
        "the attention branch (of a Ti/16 on a CPU 0.64 of what eager blocks keep, for 1.08 of the time) or the block "
        "(0.10 for 1.14); auto: the first of them that by docs/scaling.md's plan fits in 0.9 of the device's free "
        "memory.",
    )
    define.bool("fp16", False, "The same as --precision=float16.")
    define.string(
        "fp16_opt_level",
        "O2",
        "Apex's levels O0 to O3 (or 00 to 03), accepted for the seed's command lines: with --fp16 each means autocast "
        "with float32 weights, without it nothing.",
    )
    define.float("loss_scale", 0, "Factor of the loss under float16; 0: one that adapts itself.", lower_bound=0)
    define.integer(
        "local_rank",
        -1,
        "Number of this process on its machine, from 0, as older launchers pass it; -1: as torchrun sets it.",
        -1,
    )
    define.string(
        "mesh",
        "",
        "Processes that hold copies times processes that share one, as in data=2,shard=4, one of them if the other "
        "follows from their number; default: data alone.",
    )
    define.string(
        "placement",
        "sharded",
        "What the processes of a shard divide of kernels and embeddings: sharded (parameters and optimizer state), "
        "optimizer (its state alone) or replicated (nothing); or REGEX=KIND;REGEX=KIND;... for whole path names, of "
        "which the first that matches decides.",
    )
    define.integer(
        "timeout",
        TIMEOUT,
        "Seconds, at least 1, that a process waits for the others before the run ends and names who is lost; first "
        "compiles, and what one process writes or downloads, may differ by minutes.",
        1,
    )


def recipe_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.enum("optimizer", "sgd", ["sgd", "adamw"], "SGD with momentum 0.9, or AdamW.")
    define.float("learning_rate", 0.03, "Peak learning rate: the factor of an update, 0 or more.", lower_bound=0)
    define.integer("warmup_steps", 500, "Updates over which the rate rises from 0.", lower_bound=0)
    define.enum(
        "decay_type",
        "cosine",
        ["cosine", "linear"],
        "How the rate falls after warm-up: to 0 along half a cosine, or in a line to 1e-5 (--rate_index=seed: to 0).",
    )
    define.enum(
        "rate_index",
        "google",
        ["google", "seed"],
        "Whether update t, counted from 0, takes the rate at t or, as the seed's, at t + 1.",
    )
    define.float("weight_decay", 0.0, "Weight decay, a factor, 0 or more; --decay_rule says of what.", lower_bound=0)
    define.enum(
        "decay_rule",
        "torch",
        ["torch", "big_vision"],
        "torch: with sgd an L2 penalty, with adamw decoupled, times the rate; big_vision: decoupled, times the rate's "
        "share of its peak.",
    )
    define.string(
        "decay_on",
        None,
        "Regular expression over whole path names: what decays; default: everything, with --decay_rule=big_vision "
        "'.*/kernel'.",
    )
    define.float("max_grad_norm", 1.0, "Global norm that gradients are clipped to, above 0.")
    define.enum(
        "momentum_dtype",
        "float32",
        ["float32", "bfloat16"],
        "How sgd stores its momentum, or adamw its first moment; Google's is bfloat16.",
    )
    define.float(
        "layer_decay", 1.0, "Factor of the learning rate for each layer below the head, above 0 to 1; 1: none.", 0, 1
    )
    define.string(
        "freeze",
        "",
        "Regular expression over whole path names: what is not trained; '(?!head/).*' is linear probing; default: "
        "nothing.",
    )
    define.float(
        "ema",
        0.0,
        "Decay of an average of the weights, which is what is then evaluated and saved, 0 to below 1; 0: none.",
        0,
        1,
    )
    define.enum("loss", None, list(LOSSES), "Loss; default: softmax, or sigmoid where images have several labels.")
    define.float("label_smoothing", 0.0, "Part of a label's weight that all classes share, 0 to 1.", 0, 1)
    define.float(
        "stochastic_depth",
        0.0,
        "Probability of dropping a branch of the last block, 0 to below 1, falling linearly to 0 at the first.",
        0,
        1,
    )


def evaluate_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.enum(
        "split",
        "test",
        ["test", "train", "all"],
        "Images to evaluate: those held out (val or test), those for training, or both; default: test.",
    )
    define.string(
        "out",
        "",
        "Folder for evaluation.json, per_class.csv, confusion.csv and the pictures; default: beside the run, "
        "<run>/evaluation, or for a file none.",
    )


def crop_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.float(
        "eval_crop",
        0.0,
        "Evaluate a centre crop of this part of the shorter side, 0.1 to 1, as published accuracies assume (0.875, "
        "0.9); 0: the whole image, its sides resized independently, as Google does.",
        0,
        1,
    )
    define.enum(
        "eval_interpolation", "bilinear", ["bilinear", "bicubic"], "How --eval_crop resizes (with antialiasing)."
    )


def predict_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.integer("top", 5, "Number of likeliest classes to give of an image, at least 1.", lower_bound=1)
    define.enum(
        "format",
        "table",
        ["table", "csv", "jsonl"],
        "What stdout gets: a table to read, a CSV row for each class of each image, or a JSON object for each image.",
    )
    define.integer("batch_size", 64, "Images per batch.", lower_bound=1)
    define.integer(
        "num_workers", 2, "Processes that decode image files ahead of the model; 0: this one.", lower_bound=0
    )


def labels_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string(
        "labels",
        "",
        "Text file with the classes' names, one a line, in the model's order; default: the model's own names, of 1,000 "
        "classes without names ImageNet-1k's, else numbers.",
    )


def attention_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string("out", "attention", "Folder for index.html and its pictures, which replace those of an earlier call.")
    define.string("class_name", None, "Name of the class whose relevance is drawn; default: the likeliest one's.")


def convert_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.enum(
        "to", None, list(LAYOUTS), "Names and shapes to write; default: original in an npz file, timm in safetensors."
    )
    define.custom(
        SizeParser(),
        "img_size",
        None,
        "Resize the positions to images of this size in pixels: one side, or HEIGHTxWIDTH; default: as they are.",
    )
    define.integer(
        "num_classes",
        None,
        "Replace a head of another number of classes by zeros; 0: write no head; default: keep it.",
        lower_bound=0,
    )
    define.enum("pre_logits", "keep", ["keep", "drop"], "What to do with a pre_logits layer.")
    define.integer(
        "channels", None, "Adapt the first layer to so many input channels; default: as it is.", lower_bound=1
    )


def export_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.integer(
        "opset",
        12,
        "Version of ONNX's operators (of .onnx only), any integer from 12 to 17: most engines take 12; 17 has "
        "LayerNormalization.",
        12,
        17,
    )
    define.custom(BatchParser(), "batch", 1, "Images per batch, at least 1, or dynamic: any number.")
    define.enum("precision", "float32", ["float32", "float16"], "Of the weights, the input and the output.")


def compare_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string("plot", "", "Draw the curves to this file, whose suffix names the format; default: none.")
    define.float(
        "limit",
        0.01,
        "Largest unsigned mean relative error that passes (a fraction); beyond it the exit code is 1.",
        lower_bound=0,
    )


def assume_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string(
        "assume",
        "",
        "What the file does not state: fields of the config, as in num_heads=3,gelu=tanh,mean=[0.4,0.5,0.6],"
        "image_size=192x256.",
    )


def bench_flags(fv: flags.FlagValues) -> None:
    define = Definitions(fv)
    define.string(
        "what",
        "train,eval,input,compile,parts",
        "What to measure, some of: train and eval (a step), input (training batches alone), compile (what the first "
        "train step takes longer, with cold and with warm caches), parts (forward, backward and update; operators).",
    )
    define.integer("rounds", 20, "Number of timed rounds, of at least 0.1 seconds each, at least 3.", lower_bound=3)
    define.float(
        "seconds", 60.0, "Seconds after which there are no more rounds, once there are 3; 0 or more.", lower_bound=0
    )
    define.string("out", "", "Folder for bench.json and profile.csv; default: none.")


TRAIN = (run_flags, train_flags, recipe_flags, augment_flags, data_flags, crop_flags, model_flags, device_flags)


def table(groups: Iterable[Callable[[flags.FlagValues], None]]) -> str:
    """The flags of some groups in their order, as a Markdown table: name, default and meaning."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for group in groups:
        group(fv := flags.FlagValues())
        for name in fv:
            default = fv[name].default_as_str
            shown = f"`{default[1:-1]}`" if default and default != "''" else ""
            rows.append(f"| `--{name}` | {shown} | {_escaped(fv[name].help)} |")
    return "\n".join(rows)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", text)


if __name__ == "__main__":
    print(table(TRAIN))
