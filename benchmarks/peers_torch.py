"""The contenders of peers.py in PyTorch, vitfn and the others: each makes the step of a job, which returns the loss."""

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peers_job import CLIP, MOMENTUM, RATE, TOTAL, batch
from safetensors.torch import load_file
from torch import Tensor, nn

Step = Callable[[], float]


def data(job: SimpleNamespace) -> tuple[Tensor, Tensor]:
    images, labels = batch(job)
    return torch.from_numpy(images).to(job.device), torch.from_numpy(labels).long().to(job.device)


def vitfn_step(job: SimpleNamespace) -> Step:
    import vitfn
    from vitfn import tree

    config, together = vitfn.ViTConfig(**vars(job.config)), data(job)
    params = tree.map(lambda leaf: leaf.to(job.device), vitfn.load(f"{job.folder}/original.npz", config))

    def evaluate() -> float:
        metrics = eval_step(params, together)
        metrics["correct"].item()
        return metrics["loss"].item() / job.batch

    if job.what == "eval":
        eval_step = vitfn.make_eval_step(config, precision=job.precision)
        return evaluate
    optimizer = vitfn.sgd(vitfn.warmup_cosine(RATE, TOTAL), MOMENTUM)
    train_step = vitfn.make_train_step(config, optimizer, max_grad_norm=CLIP, precision=job.precision)
    state = vitfn.TrainState(0, params, optimizer.init(params))

    def train() -> float:
        nonlocal state
        state, metrics = train_step(state, together)
        return metrics["loss"].item()

    return train


def module_step(
    make: Callable[[SimpleNamespace], nn.Module], layout: str, compiled: bool, job: SimpleNamespace
) -> Step:
    """Of an nn.Module, as its owner's training script has it: torch.compile of the model alone, and torch.optim."""
    images, labels = data(job)
    model = make(job.config).train(job.what == "train")
    model.load_state_dict(load_file(f"{job.folder}/{layout}.safetensors"))
    model.to(job.device)
    forward = torch.compile(model) if compiled else model
    half = functools.partial(torch.autocast, job.device, torch.bfloat16)
    precision = half if job.precision == "bfloat16" else contextlib.nullcontext

    def loss_and_logits() -> tuple[Tensor, Tensor]:
        with precision():
            result = forward(images)
        logits = getattr(result, "logits", result).float()
        return F.cross_entropy(logits, labels), logits

    @torch.inference_mode()
    def evaluate() -> float:
        loss, logits = loss_and_logits()
        (logits.argmax(-1) == labels).sum().item()
        return loss.item()

    if job.what == "eval":
        return evaluate
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL)

    def train() -> float:
        loss, _ = loss_and_logits()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return train


@functools.cache  # which keeps the library, whose end would be its operators' end
def import_torchvision() -> torch.library.Library | None:
    """timm and torchvision itself import it."""
    try:
        importlib.import_module("torchvision.models")
    except RuntimeError:  # its own operators, built for CUDA, cannot be loaded beside a torch for the CPU
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision.models")
        return library
    return None


def timm_model(config: SimpleNamespace) -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        embed_dim=config.hidden_size,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.hidden_size,
        act_layer="gelu_tanh",
    )


def huggingface_model(config: SimpleNamespace) -> nn.Module:
    import transformers

    fields = ("image_size", "patch_size", "hidden_size", "layer_norm_eps")
    theirs = transformers.ViTConfig(
        **{field: getattr(config, field) for field in fields},
        num_labels=config.num_classes,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        hidden_act="gelu_pytorch_tanh",
    )
    return transformers.ViTForImageClassification(theirs)


def torchvision_model(config: SimpleNamespace) -> nn.Module:
    """With the exact GELU, since no argument chooses another."""
    import torchvision

    fields = ("image_size", "patch_size", "num_layers", "num_heads", "mlp_dim", "num_classes")
    same = {field: getattr(config, field) for field in fields}
    return torchvision.models.VisionTransformer(**same, hidden_dim=config.hidden_size)
