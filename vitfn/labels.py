"""What a model's classes are called."""

from pathlib import Path

from vitfn.errors import InputError
from vitfn.weights import Description

_IMAGENET_1K = Path(__file__).with_name("imagenet1k.txt")  # a name a line, in the order of the sorted WordNet ids


def class_names(described: Description, path: str, file: str = "") -> tuple[str, ...]:
    """The names of the classes of the model at `path`: those of a `file`, one a line, else the model's own.

    A model of 1,000 classes without names is taken to be of ImageNet-1k; another one's classes are numbered. Raises
    InputError for a file with another number of names than the model has classes.
    """
    count = described.config.num_classes
    if file:
        try:
            names = tuple(Path(file).read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise InputError(
                f"--labels={file}: found bytes that are no UTF-8, expected a class's name a line"
            ) from None
        if len(names) != count:
            raise InputError(f"--labels={file}: found {len(names):,} lines, expected the {count:,} classes of {path}")
        return names
    if described.class_names:
        return described.class_names
    if count == 1000:
        return tuple(_IMAGENET_1K.read_text(encoding="utf-8").splitlines())
    return tuple(f"class {i}" for i in range(count))
