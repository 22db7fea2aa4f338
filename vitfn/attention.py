"""What a model looks at in an image: python -m vitfn.attention MODEL IMAGE [--out=DIR]

MODEL is a run's directory or a file of weights. Writes one page, index.html, and its pictures: attention rollout, what
speaks for a class (of a model with a head), each block's and each head's attention, how far heads look, and the model's
position embeddings and patch filters. Needs matplotlib.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl.flags import FlagValues
from torch import Tensor

from vitfn import attention_figures as drawn
from vitfn import figures, flags, maps, page, recipe, weights
from vitfn.command import run_command
from vitfn.config import ViTConfig
from vitfn.data.augment import normalise
from vitfn.data.images import decode
from vitfn.errors import InputError, printable
from vitfn.eval_step import probabilities
from vitfn.predict import Guess, classifier, likeliest
from vitfn.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 5  # likeliest classes on the page


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    groups = (flags.attention_flags, flags.labels_flags, flags.crop_flags)
    return run_command(command, argv, *groups, arguments=("MODEL", "IMAGE"))


def command(fv: FlagValues, model: str, image: str) -> None:
    """The command."""
    figures.blank(1)  # matplotlib is there
    path, config, names, multi_label, preprocessing = classifier(fv, model, needs_head=False)
    if fv.class_name is not None and fv.class_name not in names:
        some = f"one of {len(names):,}: {', '.join(names[:_SHOWN])}, ..." if names else "none: the model has no head"
        raise InputError(f"--class_name: found {fv.class_name!r}, expected {some}")
    pixels = recipe.fit_for_evaluation(fv, config, preprocessing)(decode(image, config.channels)[None])  # (1, C, H, W)
    params = weights.load(path)
    label = None if fv.class_name is None else names.index(fv.class_name)
    found = maps.explain(params, normalise(pixels, config), config, label)
    guesses = likeliest(probabilities(found.logits[0], multi_label), names, _SHOWN) if names else []
    out = Path(fv.out)
    out.mkdir(parents=True, exist_ok=True)
    body = [_guesses(guesses)] if guesses else []
    name = fv.class_name or (guesses[0].name if guesses else "")
    for file, title, text, figure in pictures(params, pixels[0], config, found, name):
        figures.save(figure, out / file)
        address = figures.png_uri((out / file).read_bytes())
        body.append(
            f'<h2>{page.text(title)}</h2><p>{page.text(text)}</p><img alt="{page.text(title)}" src="{address}">'
        )
    subtitle = (
        f"{config.name}, {path}: {config.num_layers} blocks, {config.num_heads} heads, patches of {_patch(config)}"
    )
    page.write(out / "index.html", f"What the model sees in {Path(image).name}", subtitle, (), "\n".join(body))
    print(f"{'page':<12} {out / 'index.html'}")
    for guess in guesses:
        print(f"{guess.probability:>12.2%} {printable(guess.name)}")


def _patch(config: ViTConfig) -> str:
    return "x".join(str(side // n) for side, n in zip(config.image_hw, config.grid, strict=True)) + " pixels"


def _guesses(guesses: list[Guess]) -> str:
    return page.table(("class", "probability"), ((g.name, f"{g.probability:.2%}") for g in guesses), "words")


def pictures(
    params: Tree, image: Tensor, config: ViTConfig, found: maps.Explained, name: str
) -> Iterator[tuple[str, str, str, "Figure"]]:
    """Each picture's file name, title, explanation and figure, for an image's pixels (C, H, W), 0 to 255.

    `found` is that image's alone, for the class of this name. A model without classes has no relevance.
    """
    _, seen, gradients, part = found  # (1, K), twice (L, 1, H, N, N), (1, N)
    part = part[:, None]  # (1, 1, N)
    of_image = maps.on_grid((part @ maps.rollout(seen))[0, 0], config)  # (h, w)
    yield (
        "rollout.png",
        "Attention rollout",
        "How much of each patch would be in the result, if values passed through attention and residual branches "
        "alone (Abnar and Zuidema, 2020), whatever the class.",
        drawn.overlay_figure(image, of_image, "attention rollout"),
    )
    if gradients is not None:
        of_class = maps.on_grid((part @ maps.relevance(seen, gradients))[0, 0], config)
        yield (
            "relevance.png",
            f"What speaks for {printable(name)}",
            "Attention weighted by the gradient of this class's logit (Chefer et al., 2021).",
            drawn.overlay_figure(image, of_class, f"relevance for {printable(name)}"),
        )
    of_heads = maps.on_grid((part @ seen[:, 0])[:, :, 0], config)  # (L, H, h, w)
    yield (
        "layers.png",
        "Attention by block",
        "Where the token or tokens that become the result look, the mean over the heads of each block.",
        drawn.layers_figure(image, of_heads.mean(1)),
    )
    yield (
        "heads.png",
        "Attention by head",
        "The same for each head, every one in its own scale.",
        drawn.heads_figure(of_heads),
    )
    yield (
        "distances.png",
        "How far heads look",
        "Mean distance between a patch and those it attends to in this image, a point for each head.",
        drawn.distances_figure(maps.distances(seen, config)),
    )
    yield (
        "positions.png",
        "Position embeddings",
        "Cosine similarity of each patch's position embedding with all others'. Of the model, not of the image.",
        drawn.positions_figure(maps.position_similarity(params, config)),
    )
    yield (
        "filters.png",
        "Patch embedding",
        "The first principal components of its filters. Of the model, not of the image.",
        drawn.filters_figure(maps.filters(params)),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
