"""Which of a file's arrays are a model's, and in whose names."""

import re

from vitfn import foreign, google
from vitfn.containers import File
from vitfn.errors import InputError, few
from vitfn.layout import Layout

_PREFIXES = ("", "params/", "params/img/", "opt/target/")  # of the model in Google's files, the likeliest first
# Of several copies of a model in a file, the one that its owner's own code evaluates: timm's averaged weights, DINO's
# teacher, I-JEPA's target; DeiT's and MoCo's own as they were trained.
_PREFERRED = {
    "state_dict_ema": -1,
    "teacher": -1,
    "target_encoder": -1,
    "student": 1,
    "model_ema": 1,
    "momentum_encoder": 1,
}


def recognise(file: File, subtree: str, path: str) -> tuple[Layout, str, tuple[str, ...]]:
    """The layout of a file's names, the prefix of those that are the model's, and those of other models like it."""
    names = file.shapes
    subtrees = (subtree, f"{subtree[:-1]}.", f"params/{subtree}", f"opt/target/{subtree}")
    root = next((root for root in subtrees if any(name.startswith(root) for name in names)), None) if subtree else ""
    candidates: list[tuple[int, Layout, str, list[str]]] = []
    for layout in (google.ORIGINAL, *foreign.LAYOUTS, *foreign.READ_ONLY):
        anchors = (re.fullmatch(layout.anchor, name) for name in names if root is not None and name.startswith(root))
        prefixes = {root + match[1].removeprefix(root) for match in anchors if match and root is not None}
        if prefixes:
            prefix, *others = sorted(prefixes, key=lambda found: _rank(found.removeprefix(root or "")))
            known = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
            count = sum(bool(layout.paths(name, names[prefix + name])) for name in known)
            candidates.append((count, layout, prefix, others))
    if not candidates:
        listed, where = few(sorted(names)), f" under {subtree}" if subtree else ""
        keys = {name.partition("/")[0] for name in names if file.kind == "torch" and "/" in name}
        listed = listed if not keys or subtree else f"under the keys {few(sorted(keys), 5)}: {listed}"
        raise InputError(f"{path}: found arrays ({listed}) that are not a plain Vision Transformer's{where}")
    _, layout, prefix, others = max(candidates, key=lambda candidate: candidate[0])
    if layout is google.ORIGINAL:
        layout = google.which({name.removeprefix(prefix) for name in names if name.startswith(prefix)})
        others = []  # of an optimizer, whose tree has the same names
    return layout, prefix, tuple(others)


def _rank(prefix: str) -> tuple[int, int, int, str]:
    """Which of several models in a file comes first: Google's, then by `_PREFERRED`, then the one on top."""
    words = re.split(r"[./]", prefix)
    place = _PREFIXES.index(prefix) if prefix in _PREFIXES else len(_PREFIXES)
    return place, sum(_PREFERRED.get(word, 0) for word in words), len(words), prefix
