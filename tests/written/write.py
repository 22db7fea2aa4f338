"""What wrote the files here, run once at the commit that README.md names: python tests/written/write.py"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import vitfn
from vitfn import weights

HERE = Path(__file__).parent
SIZES = {"patch_size": 4, "image_size": 16, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}
NAMES = ("ant", "bee", "cat")


def sample(config: vitfn.ViTConfig) -> torch.Tensor:
    """One image (1, C, H, W), the same wherever it is made."""
    count = config.channels * config.image_hw[0] * config.image_hw[1]
    return (torch.arange(count) * 37 % 101 / 50 - 1).reshape(1, config.channels, *config.image_hw)


def model(**fields) -> tuple[vitfn.tree.Tree, vitfn.ViTConfig]:
    config = vitfn.ViTConfig(**(SIZES | {"num_classes": 3} | fields))
    generator = torch.Generator().manual_seed(0)
    return vitfn.tree.map(
        lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), vitfn.init(config)
    ), config


def write_weights() -> None:
    kinds = {
        "original": ({}, ".npz"),
        "linen": ({"classifier": "gap"}, ".npz"),
        "big_vision": ({"classifier": "map", "posemb": "sincos2d"}, ".npz"),
        "big_vision_scan": ({"mean": (0.4, 0.5, 0.6), "std": 0.2}, ".npz"),
        "timm": ({"gelu": "erf", "classifier": "map"}, ".safetensors"),
        "huggingface": ({"gelu": "erf", "layer_norm_eps": 1e-12}, ".safetensors"),
        "huggingface5": ({"gelu": "erf", "layer_norm_eps": 1e-12, "num_classes": 0}, ".safetensors"),
        "torchvision": ({"gelu": "erf", "representation_size": 12}, ".safetensors"),
        "seed": ({"gelu": "erf", "image_size": (16, 24)}, ".npz"),
    }
    for layout, (fields, suffix) in kinds.items():
        params, config = model(**fields)
        names = NAMES if config.num_classes else None
        weights.save(HERE / f"{layout}{suffix}", params, config, names, layout)
    resnet = {"num_layers": [1], "width_factor": 0.5}
    params, config = model(resnet=resnet, patch_size=1, image_size=16)
    weights.save(HERE / "hybrid.npz", params, config, NAMES)


def write_folded() -> None:
    """A DINOv2 file with LayerScale, as transformers names it, made ours: the scales are folded into the kernels."""
    params, config = model(gelu="erf", num_classes=0)
    weights.save(HERE / "own.safetensors", params, config, layout="huggingface")
    state = load_file(HERE / "own.safetensors")
    for old, new in {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
        "attention.mlp.fc2": "attention.output.dense",
    }.items():
        state = {name.replace(old, new): leaf for name, leaf in state.items()}
    for i in range(config.num_layers):
        for scale in (1, 2):
            state[f"encoder.layer.{i}.layer_scale{scale}.lambda1"] = torch.linspace(0.5, 1.5, config.hidden_size)
    save_file(state, HERE / "dinov2.safetensors")
    (HERE / "own.safetensors").unlink()
    subprocess.run(
        [sys.executable, "-m", "vitfn.convert", "dinov2.safetensors", "folded.npz", "--assume=num_heads=2"],
        check=True,
        cwd=HERE,
    )
    (HERE / "dinov2.safetensors").unlink()


def run_flags(name: str) -> list[str]:
    """Those of both runs, in the current folder."""
    return [
        "--output_dir=.", f"--name={name}", "--dataset=digits", "--pretrained_dir=", "--model_type=mu/4",
        "--img_size=8", "--train_batch_size=16", "--num_steps=100000", "--warmup_steps=2", "--dropout_rate=0.5",
        "--momentum_dtype=bfloat16", "--ema=0.9", "--device=cpu", "--compile=off", "--eval_every=20",
        "--keep_checkpoints=1", "--num_workers=0", "--checkpoint_every=20",
    ]  # fmt: skip


def write_run(name: str, *command: str, more: tuple[str, ...] = ()) -> None:
    """A run that was stopped by SIGTERM after an evaluation: its checkpoint, its best weights, its metrics."""
    run = subprocess.Popen([*command, "-m", "vitfn.train", *run_flags(name), *more], cwd=HERE)
    while not ((HERE / name / "best.npz").exists() and list((HERE / name / "checkpoints").glob("step_*"))):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    run.wait()


def outputs() -> dict[str, list[float]]:
    """The logits of each file of weights."""
    found = {}
    for path in sorted([*HERE.glob("*.npz"), *HERE.glob("*.safetensors"), *HERE.glob("*/best.npz")]):
        config = weights.describe(path).config
        found[str(path.relative_to(HERE))] = vitfn.apply(weights.load(path), sample(config), config)[0].tolist()
    return found


if __name__ == "__main__":
    write_weights()
    write_folded()
    write_run("stopped", sys.executable)
    write_run(
        "sharded", str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2", more=("--mesh=shard=2",)
    )
    (HERE / "outputs.json").write_text(json.dumps(outputs(), indent=1) + "\n")
