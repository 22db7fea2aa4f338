"""Google's published files of weights: what each holds, and where the same weights are today (published.csv).

Sizes follow from the shapes and the npz format. Accuracies are in per cent, from google-research/vision_transformer's
README: of what was fine-tuned from a file (at 384 px, without dropout), or of the file itself.
`python -m vitfn.published` prints the table of weights/README.md.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitfn.config import ViTConfig, get_config
from vitfn.vit import shapes


class Published(NamedTuple):
    """A published file; `source` is the repository on Hugging Face's hub that has the same weights."""

    file: str
    config: ViTConfig
    zero_head: bool
    accuracy: str
    source: str

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, shapes(self.config).values()))


def published() -> Iterator[Published]:
    """Every row of the table."""
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        for row in csv.DictReader(file):
            fields = {
                name: int(row[name]) for name in ("image_size", "num_classes", "representation_size") if row[name]
            }
            config = get_config(row["model"], **fields)
            yield Published(row["file"], config, row["head"] == "zero", row["accuracy"], row["source"])


def npz_bytes(config: ViTConfig) -> int:
    """The size of the model's npz file under the original names, as numpy writes it: float32 numbers and headers."""
    per_array = 30 + 20 + 128 + 46  # the member's header, its 64-bit sizes, the array's header, the directory's entry
    names = sum(2 * len(f"{path}.npy") for path in shapes(config))
    return sum(4 * math.prod(shape) + per_array for shape in shapes(config).values()) + names + 22


def table() -> Iterator[str]:
    """The table in Markdown, line by line."""
    yield "| file | px | classes | arrays | parameters | bytes | accuracy, % | the same weights |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in published():
        config = row.config
        classes = f"{config.num_classes:,}" + (", zero head, pre_logits" if row.zero_head else "")
        yield (
            f"| {row.file} | {config.image_size} | {classes} | {len(shapes(config))} | {row.parameters:,} | "
            f"{npz_bytes(config):,} | {row.accuracy} | {row.source} |"
        )


if __name__ == "__main__":
    print("\n".join(table()))
