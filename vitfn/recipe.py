"""From flags to what the library takes: the model, the optimizer, the loss, the augmentation, the evaluation's crop."""

import dataclasses
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from absl.flags import FlagValues
from torch import Tensor

from vitfn import device, meshes, optim, plan, schedules, vit
from vitfn.adapt import with_channels
from vitfn.config import ViTConfig, get_config
from vitfn.data import Dataset, load
from vitfn.data.augment import Augmentation
from vitfn.data.crops import resize, resize_and_crop
from vitfn.device import Device
from vitfn.errors import InputError
from vitfn.losses import LOSSES, Loss
from vitfn.meshes import Mesh
from vitfn.preprocessing import Preprocessing
from vitfn.remat import KINDS

_PATHS = "Transformer/encoderblock_0/..., head/bias"
_OPT_LEVELS = re.compile(r"[O0][0-3]")  # Apex's; the seed's command line has a zero for the letter
log = logging.getLogger("vitfn")


def check(fv: FlagValues, row: Device, processes: int = 1) -> None:
    """Raises InputError for flags that are wrong, contradict each other, or ask for uneven shares of a batch."""
    if fv.fp16:
        if fv.precision not in ("auto", "float16"):
            raise InputError(f"--fp16 and --precision={fv.precision} contradict each other; expected one of them")
        fv["precision"].value = "float16"
    if not _OPT_LEVELS.fullmatch(fv.fp16_opt_level):
        raise InputError(f"--fp16_opt_level: found {fv.fp16_opt_level!r}, expected O0, O1, O2 or O3")
    if fv.loss_scale and (row.precision if fv.precision == "auto" else fv.precision) != "float16":
        raise InputError(f"--loss_scale={fv.loss_scale:g} scales nothing: expected --precision=float16 with it")
    for name in ("max_grad_norm", "layer_decay", "train_fraction"):
        if (value := getattr(fv, name)) <= 0:
            raise InputError(f"--{name}: found {value}, expected a number above 0")
    if fv.ema == 1:
        raise InputError("--ema: found 1, which keeps the weights of the start; expected a number below 1")
    if fv.channels != 3 and fv.dataset not in ("folder", "list"):
        raise InputError(f"--channels={fv.channels} is for --dataset=folder or list; found {fv.dataset}, which has 3")
    if fv.train_fraction < 1 and fv.dataset == "folder":
        raise InputError(
            f"--train_fraction: found {fv.train_fraction}, which leaves out a folder's last classes; expected 1"
        )
    check_eval_crop(fv)
    if fv.train_batch_size % ((parts := fv.gradient_accumulation_steps) * processes):
        among = f" times {processes} processes" if processes > 1 else ""
        raise InputError(
            f"--train_batch_size: found {fv.train_batch_size}, expected a multiple of "
            f"--gradient_accumulation_steps={parts}{among}"
        )
    shards, kinds = meshes.sizes(fv.mesh, processes)["shard"], [kind for _, kind in meshes.rules(fv.placement)]
    if shards > 1 and "sharded" in kinds and fv.compile == "step":
        raise InputError(
            f"--compile=step: one graph cannot gather the parameters of --mesh={fv.mesh}, expected block or off, or "
            "--placement=optimizer"
        )
    if fv.remat != "none" and fv.compile == "step":
        raise InputError(f"--remat={fv.remat} --compile=step: one graph cannot compute again, expected block or off")
    for name in ("freeze", "decay_on"):
        try:
            re.compile(pattern := getattr(fv, name) or "")
        except re.error as error:
            raise InputError(f"--{name}={pattern}: expected a regular expression, found: {error}") from None
    if fv.randaugment and not (fv.randaugment[0] >= 1 and 0 <= fv.randaugment[1] <= 10):
        count, magnitude = fv.randaugment
        raise InputError(f"--randaugment: found {count},{magnitude}, expected at least 1 operation and 0 to 10")


def take(fv: FlagValues, run: dict[str, Any]) -> None:
    """Gives the flags that were not given the values they had in a run."""
    for name in fv:
        if name in run and not fv[name].present:
            fv[name].value = run[name]


def check_eval_crop(fv: FlagValues) -> None:
    """Raises InputError for flags of the evaluation's crop that mean nothing, or a picture without bounds."""
    if 0 < fv.eval_crop < 0.1:
        raise InputError(f"--eval_crop: found {fv.eval_crop}, expected 0, or a part from 0.1 to 1")
    if fv.eval_interpolation != "bilinear" and not fv.eval_crop:
        raise InputError(f"--eval_interpolation={fv.eval_interpolation} resizes for a crop: expected --eval_crop too")


def model(fv: FlagValues, own: ViTConfig | None) -> ViTConfig:
    """The model by the flags, for any dataset; what they leave open is as in the file of weights, or else Google's."""
    overrides: dict[str, Any] = {"image_size": fv.img_size, "stochastic_depth_rate": fv.stochastic_depth}
    if own:
        fields = ["gelu", "layer_norm_eps", "channels", "mean", "std", "posemb", "posemb_resize"]
        if not fv.model_type.endswith("-gap-norep"):
            fields.append("classifier")
        overrides |= {name: getattr(own, name) for name in fields}
    overrides |= {name: fv[name].value for name in ("gelu", "dropout_rate") if fv[name].value is not None}
    try:
        return get_config(fv.model_type, **overrides)
    except InputError as error:
        size = "x".join(map(str, fv.img_size)) if isinstance(fv.img_size, tuple) else fv.img_size
        raise InputError(f"--model_type={fv.model_type} --img_size={size}: {error}") from None


def optimizer(fv: FlagValues, config: ViTConfig) -> optim.Optimizer:
    """The optimizer, with its schedule, weight decay, layer-wise rates, frozen leaves and average."""
    if fv.decay_type == "cosine":
        schedule = schedules.warmup_cosine(fv.learning_rate, fv.num_steps, fv.warmup_steps)
    else:
        floor = 0.0 if fv.rate_index == "seed" else 1e-5
        schedule = schedules.warmup_linear(fv.learning_rate, fv.num_steps, fv.warmup_steps, floor)
    if fv.rate_index == "seed":
        schedule = schedules.one_ahead(schedule)
    options: dict[str, Any] = {}
    decay_on = ".*"
    if fv.decay_rule == "big_vision":
        decay_on, peak = ".*/kernel", fv.learning_rate or 1.0
        options["decay_schedule"] = lambda step: schedule(step) / peak
    rates = optim.layer_decay(config.num_layers, fv.layer_decay) if fv.layer_decay < 1 else ()
    rules = optim.Rules(fv.freeze, fv.decay_on if fv.decay_on is not None else decay_on, rates)
    trained = [rules.trains(path) for path in vit.shapes(config)]
    if not any(trained) or (fv.freeze and all(trained)):
        found = "no leaf" if all(trained) else "every leaf"
        raise InputError(f"--freeze={fv.freeze}: matches {found} as a whole, expected some; paths are like {_PATHS}")
    if fv.decay_on is not None and not any(map(rules.decays, vit.shapes(config))):
        raise InputError(
            f"--decay_on={fv.decay_on}: matches no leaf as a whole, expected some; paths are like {_PATHS}"
        )
    make, stored = (optim.sgd, "momentum_dtype") if fv.optimizer == "sgd" else (optim.adamw, "mu_dtype")
    options[stored] = getattr(torch, fv.momentum_dtype)
    made = make(schedule, weight_decay=fv.weight_decay, rules=rules, **options)
    return optim.with_ema(made, fv.ema) if fv.ema else made


def remat(fv: FlagValues, row: Device, config: ViTConfig, precision: str, mesh: Mesh) -> str:
    """What is recomputed; 'auto' is the first kind whose planned peak fits into what the device has free now.

    The same in all processes of a mesh, which ask for it together.
    """
    if fv.remat != "auto":
        return fv.remat
    free = [size for size in mesh.ranks.gather(device.free_memory(row)) if size is not None]
    if not free:
        return "none"
    peaks = {
        kind: plan.memory(
            config,
            fv.train_batch_size // mesh.ranks.count // fv.gradient_accumulation_steps,
            optimizer=fv.optimizer,
            half=precision != "float32",
            remat=kind,
            parts=fv.gradient_accumulation_steps,
            average=fv.ema > 0,
            mesh=mesh,
            overlaps=row.overlaps,
        ).peak
        for kind in KINDS
    }
    chosen = next((kind for kind, peak in peaks.items() if peak <= plan.USABLE * min(free)), "")
    if not chosen:
        log.warning(
            "--remat=auto: even block needs %.1f GB of the %.1f GB that are free: expected a smaller "
            "--train_batch_size or more --gradient_accumulation_steps",
            peaks["block"] / 1e9,
            min(free) / 1e9,
        )
    elif chosen != "none":
        log.info(
            "--remat=auto is %s: it needs %.1f GB of the %.1f GB that are free, none %.1f GB",
            chosen,
            peaks[chosen] / 1e9,
            min(free) / 1e9,
            peaks["none"] / 1e9,
        )
    return chosen or KINDS[-1]


def loss_name(name: str | None, several_labels: bool) -> str:
    """The loss by its flag, or by the labels; softmax does not go with several an image."""
    if name == "softmax" and several_labels:
        raise InputError("--loss=softmax: the images have several labels, expected sigmoid")
    return name or ("sigmoid" if several_labels else "softmax")


def loss(name: str | None, several_labels: bool) -> Loss:
    """The loss of this name."""
    return LOSSES[loss_name(name, several_labels)]


def augmentation(fv: FlagValues) -> Augmentation:
    """What is done to training images."""
    return Augmentation(fv.crop_min, fv.crop, fv.flip, fv.randaugment, fv.erasing, fv.mixup, fv.cutmix)


def fit_for_evaluation(
    fv: FlagValues, config: ViTConfig, stated: Preprocessing | None = None
) -> Callable[[Tensor], Tensor]:
    """How images become of the model's size to be evaluated, as is `stated` of it unless a flag says; picklable."""
    if stated and not (fv["eval_crop"].present or fv["eval_interpolation"].present):
        return partial(resize_and_crop, size=config.image_hw, **stated._asdict())
    if not fv.eval_crop:
        return partial(resize, size=config.image_hw)
    return partial(resize_and_crop, size=config.image_hw, fraction=fv.eval_crop, interpolation=fv.eval_interpolation)


def dataset(fv: FlagValues, channels: int, seed: int) -> Dataset:
    """The dataset that the flags name, with images of so many channels, split by the run's seed."""
    return load(
        fv.dataset,
        fv.data_dir,
        fv.download,
        channels=channels,
        val_fraction=fv.val_fraction,
        seed=seed,
        train_fraction=fv.train_fraction,
    )


def for_data(config: ViTConfig, num_classes: int, channels: int) -> ViTConfig:
    """The model for a dataset's classes and channels."""
    try:
        return dataclasses.replace(with_channels(config, channels), num_classes=num_classes)
    except InputError as error:
        raise InputError(f"--channels={channels}: {error}") from None
