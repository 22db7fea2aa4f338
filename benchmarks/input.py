"""What batches cost: crops in memory and of files against torchvision's, and the share of training spent waiting.

    python benchmarks/input.py crops             # images/s of 32-pixel images cropped to 224, flipped and normalised
    python benchmarks/input.py files             # the same of 400 JPEGs of 500x375
    python benchmarks/input.py waiting [ROUNDS]  # of ViT-Ti_16's steps of 16, from memory and from the JPEGs
    python benchmarks/input.py predict [ROUNDS]  # images/s of vitfn.predict's loop, 1,000 JPEGs, and of its model alone

Contenders alternate; each has all cores, as threads or as workers. It needs torchvision (requirements-peers.txt).
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import vitfn
from vitfn.data import Files, Split
from vitfn.data.augment import Augmentation, augment, crop
from vitfn.data.batches import training_batches
from vitfn.data.crops import resize
from vitfn.predict import predict

CONFIG, WHAT = vitfn.get_config("Ti/16"), Augmentation(flip=True)
ROUNDS, IMAGES, WORKERS = 11, 1024, 2  # images of a round
FILES, HEIGHT, WIDTH = 400, 375, 500
STEPS, BATCH = 24, 16


# --- contenders: each is a function that prepares IMAGES images and gives their number


def ours(data: Split | Files, batch: int, workers: int = 0) -> Callable[[], int]:
    """As vitfn.train has them; processes that decode are started before the clock is."""
    options = {"batch_size": batch, "seed": 0, "start": 0, "stop": 10**6, "device": "cpu", "workers": workers}
    cropped = enumerate(training_batches(data, partial(crop, config_size=(224, 224), augmentation=WHAT), **options))

    def prepare() -> int:
        images = (augment(*b, CONFIG, seed=0, step=step, augmentation=WHAT, donate=True)[0] for step, b in cropped)
        return sum(len(x) for x in islice(images, IMAGES // batch))

    return prepare


class Items:
    """Images one by one through `transform`, as torchvision's datasets have them."""

    def __init__(self, items: list, transform: Callable) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> torch.Tensor:
        item = self.items[i % len(self.items)]
        if isinstance(item, str):
            with Image.open(item) as file:
                item = file.convert("RGB")
        return self.transform(item)


def loader(items: list, transform: Callable, batch: int) -> Callable[[], int]:
    """torch's DataLoader, whose workers live from round to round."""
    batches = DataLoader(Items(items, transform), batch, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: sum(len(x) for x in batches)


def torchvision_transforms() -> tuple[Callable, Callable]:
    """The same work by torchvision: of PIL images (v1) and of tensors (v2)."""
    operators = torch.library.Library("torchvision", "FRAGMENT")  # beside a torch of the CPU's it lacks them
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor d, Tensor s, float t) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # it has them
            operators.define(schema)
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    torchvision_transforms.operators = operators  # they live as long as this
    least, half = {"scale": (WHAT.crop_min, 1.0)}, ((0.5,) * 3, (0.5,) * 3)
    pictures = [v1.RandomResizedCrop(224, **least), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(*half)]
    tensors = [
        v2.RandomResizedCrop(224, **least, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*half),
    ]
    return v1.Compose(pictures), v2.Compose(tensors)


def whole_batches(images: torch.Tensor, transform: Callable, batch: int) -> Callable[[], int]:
    """All images of a batch have the same crop: less than what is asked for."""
    return lambda: sum(len(transform(images[torch.randperm(len(images))[:batch]])) for _ in range(IMAGES // batch))


# --- tables


def compare(title: str, contenders: dict[str, Callable[[], int]], rounds: int = ROUNDS) -> None:
    """Rates, and the first contender's over each other's in the same round: medians and quartiles."""
    for prepare in contenders.values():
        prepare()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, prepare in contenders.items():
            started = time.perf_counter()
            rates[name].append(prepare() / (time.perf_counter() - started))
    first = next(iter(rates.values()))
    print(f"\n{title}, {torch.get_num_threads()} threads or {WORKERS} workers, {rounds} rounds")
    print(f"{'':<44}{'images/s':>10}   quartiles      ours / this, quartiles")
    for name, values in rates.items():
        low, median, high = statistics.quantiles(values, n=4)
        small, ratio, large = statistics.quantiles([a / b for a, b in zip(first, values, strict=True)], n=4)
        print(f"{name:<44}{median:>10.0f}   {low:>5.0f} to {high:<5.0f} {ratio:>6.2f}, {small:.2f} to {large:.2f}")


def crops() -> None:
    """The images are noise: what they show costs nothing here."""
    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    of_pictures, of_tensors = torchvision_transforms()
    for batch in (64, 16):
        contenders = {
            "vitfn, in this process": ours(Split(images, torch.zeros(5000, dtype=torch.long)), batch),
            "torchvision v1 on PIL images, workers": loader(pictures, of_pictures, batch),
            "torchvision v2 on tensors, workers": loader(list(images), of_tensors, batch),
            "torchvision v2, one crop for a whole batch": whole_batches(images, of_tensors, batch),
        }
        compare(f"32x32 to 224x224, batch {batch}", contenders)


def photo(number: int) -> Image.Image:
    """Noise of all scales, most of it coarse and grey, as in photos; and of single pixels, as from a sensor."""
    source = torch.Generator().manual_seed(number)
    levels = torch.randn(1, 3, HEIGHT, WIDTH, generator=source) * 0.35
    for octave in range(7):
        cells = 3 << octave, 4 << octave
        noise = torch.randn(1, 1, *cells, generator=source) + 0.3 * torch.randn(1, 3, *cells, generator=source)
        levels += 0.6**octave * F.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")
    pixels = (120 + 55 * levels[0] / levels.std()).clamp(0, 255).byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0)))


def write_photos(root: Path) -> list[str]:
    """400 JPEGs of quality 90 in folders of ten classes; their paths."""
    paths = [root / f"class{i % 10}" / f"{i}.jpg" for i in range(FILES)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path, quality=90)
    print(f"{FILES} JPEGs of {WIDTH}x{HEIGHT}, {sum(path.stat().st_size for path in paths) / FILES / 1000:.0f} kB each")
    return [str(path) for path in paths]


def files() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder))
        data, (of_pictures, _) = Files(tuple(paths), torch.zeros(FILES, dtype=torch.long), 3), torchvision_transforms()
        contenders = {
            "vitfn, workers": ours(data, BATCH, WORKERS),
            "vitfn, in this process, one thread": ours(data, BATCH),
            "torchvision v1, workers": loader(paths, of_pictures, BATCH),
        }
        compare(f"JPEGs to 224x224, batch {BATCH}", contenders)


def predicting(rounds: int) -> None:
    """Not compiled, as the command does it."""
    step, params = vitfn.make_predict_step(CONFIG, compile="off"), vitfn.init(CONFIG)
    batch = (torch.randn(64, 3, 224, 224),)
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple((3 * write_photos(Path(folder)))[:1000])

        def of_files(workers: int) -> int:
            each = predict(step, params, paths, CONFIG, 64, fit=partial(resize, size=(224, 224)), workers=workers)
            return sum(len(places) for places, _ in each)

        contenders = {
            "the model alone": lambda: sum(len(step(params, batch)) for _ in range(8)),
            **{f"of files, {workers} workers": partial(of_files, workers) for workers in (2, 1, 0)},
        }
        compare("ViT-Ti_16 at 224, batches of 64", contenders, rounds)


def trained(folder: Path, name: str, *flags: str) -> tuple[float, float]:
    """Seconds a step of ViT-Ti_16, and the share of it spent waiting: the loop's own, without the first step."""
    command = [sys.executable, "-m", "vitfn.train", f"--name={name}", f"--output_dir={folder}", *flags]
    command += ["--model_type=ViT-Ti_16", f"--train_batch_size={BATCH}", f"--num_steps={STEPS}", "--warmup_steps=2"]
    command += ["--pretrained_dir=", "--flip", "--noreport", f"--eval_batch_size={BATCH}", "--device=cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.getcwd()})
    logged = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in logged if "train/loss" in row][1:]
    seconds = [BATCH / row["train/images_per_second"] for row in rows]
    waited = [row["train/waiting"] * s for row, s in zip(rows, seconds, strict=True)]
    return sum(seconds) / len(rows), sum(waited) / sum(seconds)


def waiting(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_photos(folder / "photos")
        held_out = f"--val_fraction={BATCH / FILES}"
        photos = ("--dataset=folder", f"--data_dir={folder / 'photos'}", held_out)
        contenders = {
            "in memory (digits, 32x32)": ("--dataset=digits",),
            "JPEGs, 2 workers": (*photos, "--num_workers=2"),
            "JPEGs, 1 worker": (*photos, "--num_workers=1"),
            "JPEGs, in this process": (*photos, "--num_workers=0"),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for place_in_order in range(rounds):
            for i, (name, flags) in enumerate(contenders.items()):
                found[name].append(trained(folder, f"{place_in_order}-{i}", *flags))
        print(f"\nViT-Ti_16 at 224, batch {BATCH}, {STEPS} steps, {rounds} runs of each")
        print(f"{'':<28}{'ms a step':>10}{'of memory':>12}   waiting, least to most")
        for name, runs in found.items():
            seconds, shares = zip(*runs, strict=True)
            slower = [s / m for s, (m, _) in zip(seconds, found["in memory (digits, 32x32)"], strict=True)]
            print(
                f"{name:<28}{1000 * statistics.median(seconds):>10.0f}{statistics.median(slower):>12.2f}"
                f"   {statistics.median(shares):.1%}, {min(shares):.1%} to {max(shares):.1%}"
            )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["crops"]:
            crops()
        case ["files"]:
            files()
        case ["waiting", *rounds]:
            waiting(int(rounds[0]) if rounds else 3)
        case ["predict", *rounds]:
            predicting(int(rounds[0]) if rounds else 3)
        case _:
            sys.exit(__doc__)
