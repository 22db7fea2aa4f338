"""The records of peers.py as markdown tables and as a plot."""

import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WARMUP = 2  # steps of each contender that compile, or meet cold memory: they are not counted
MARKERS = ("<!-- peers -->", "<!-- /peers -->")
LABELS = {"timm": "timm, eager", "timm compiled": "timm, compiled", "Hugging Face": "Hugging Face, eager"}
LABELS |= {"torchvision": "torchvision, eager", "Flax": "Flax and optax, jit"}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
ON_GPU = (
    "python benchmarks/peers.py B/16:256 L/16:128 --device cuda --precision bfloat16 --what train,eval,memory --write"
)
COLOURS = {"train": "#0072b2", "eval": "#d55e00"}  # Okabe and Ito's blue and vermilion, which every eye tells apart


def key(record: dict) -> tuple:
    """What a record is about: a later one with the same key takes its place."""
    return tuple(record[field] for field in ("what", "model", "layers", "batch", "device", "precision"))


def counted(record: dict, name: str) -> list[float]:
    """The seconds of a contender's steps after those that warm up."""
    return record["contenders"][name]["seconds"][WARMUP:]


def ratios(record: dict, name: str) -> list[float]:
    """vitfn's seconds divided by the contender's, within each round."""
    return [ours / theirs for ours, theirs in zip(counted(record, "vitfn"), counted(record, name), strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower one, the median, the upper one."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def spread(values: list[float], digits: int) -> str:
    low, median, high = quartiles(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def disagreement(record: dict) -> float:
    """The largest relative difference between others' losses and vitfn's, over all steps; torchvision left out."""
    ours = record["contenders"]["vitfn"]["losses"]
    others = (found["losses"] for name, found in record["contenders"].items() if name != "torchvision")
    return max(abs(loss / our - 1) for losses in others for loss, our in zip(losses, ours, strict=True))


def title(record: dict) -> str:
    return f"{record['model']}, batch {record['batch']}"


def label(name: str) -> str:
    return LABELS.get(name, name)


def step_rows(record: dict) -> Iterable[list[str]]:
    """The fastest of the others, by their medians, in bold."""
    medians = {name: statistics.median(counted(record, name)) for name in record["contenders"]}
    best = min((name for name in medians if name != "vitfn"), key=medians.__getitem__, default=None)
    for name, median in medians.items():
        ratio = "1" if name == "vitfn" else spread(ratios(record, name), 3)
        milliseconds = spread([1000 * seconds for seconds in counted(record, name)], 1)
        ratio = f"**{ratio}**" if name == best else ratio
        yield [title(record), label(name), milliseconds, f"{record['batch'] / median:.1f}", ratio]


def memory_rows(record: dict) -> Iterable[list[str]]:
    ours = record["contenders"]["vitfn"]
    for name, found in record["contenders"].items():
        cells = []
        for which in ("peak", "steady"):
            measured = found[which] > 0  # JAX's memory on a GPU is not
            cells += [f"{found[which] / 1e6:.0f}", f"{ours[which] / found[which]:.2f}"] if measured else ["", ""]
        yield [title(record), label(name), *cells]


def first_rows(record: dict) -> Iterable[list[str]]:
    ours = statistics.median(record["contenders"]["vitfn"]["cold"])
    for name, found in record["contenders"].items():
        cold, warm = (statistics.median(found[caches]) for caches in ("cold", "warm"))
        seconds = [
            f"{statistics.median(found[c]):.1f} ({min(found[c]):.1f} to {max(found[c]):.1f})" for c in ("cold", "warm")
        ]
        compiles = cold > 3  # else all of it is noise
        cells = [f"{warm / cold:.2f}", f"{ours / cold:.2f}"] if compiles else ["", ""]
        yield [f"{title(record)}, {record['layers']} layers", label(name), *seconds, *cells]


def table(head: str, rows: Iterable[list[str]]) -> str:
    cells = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


STEP = "model | contender | milliseconds | images/s | vitfn / contender"
MEMORY = "model | contender | peak, MB | vitfn / contender | peak of later steps, MB | vitfn / contender"
FIRST = "model | contender | cold, s | warm, s | warm / cold | vitfn / contender, cold"
TABLES = (  # of which records, with what rows under what head, and what it says before
    ("train", step_rows, STEP, "Train step. Median and quartiles; the ratios are taken within each round."),
    ("eval", step_rows, STEP, "Evaluation step, likewise."),
    ("train", memory_rows, MEMORY, "Memory of training, above what is resident after the imports."),
    ("first", first_rows, FIRST, "Waiting for the first train step beyond a steady one: median, and all between."),
)


def conditions(records: list[dict]) -> str:
    """Where, when and with what; how far the losses agree; who was left out."""
    found = []
    for record in records:
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        found.append(f"{record['machine']}, {record['date']}: {versions}.")
    measured = [record for record in records if record["what"] != "first"]
    if measured:
        worst = max(map(disagreement, measured))
        found.append(f"The losses of all contenders but torchvision agree within {worst:.0e} in all steps.")
    for record in records:
        found += [f"{label(name)} left out: {reason}." for name, reason in record["left_out"].items()]
    return "\n".join(dict.fromkeys(found))


def groups(records: list[dict]) -> Iterable[tuple[str, list[dict]]]:
    """The records of each device and precision, by what to call them."""

    def kind(record: dict) -> str:
        return f"{DEVICES[record['device']]}, {record['precision']}"

    return [(name, list(members)) for name, members in itertools.groupby(sorted(records, key=kind), kind)]


def tables(records: list[dict]) -> str:
    """The markdown between README's markers."""
    parts = []
    for name, members in groups(records):
        parts += [f"### {name}", conditions(members)]
        for what, rows, head, says in TABLES:
            if lines := [line for record in members if record["what"] == what for line in rows(record)]:
                parts += [says, table(head, lines)]
    if not any(record["device"] != "cpu" for record in records):
        parts += ["### GPU, bfloat16", f"Not measured. On a machine with one:\n\n    {ON_GPU}"]
    return "\n\n".join(parts)


def draw(axes: "Axes", records: list[dict]) -> None:
    """Bars of each contender's time divided by vitfn's, for the records of one model."""
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    height = 0.8 / len(records)
    for place, record in enumerate(records):
        for row, name in enumerate(names):
            if name not in record["contenders"]:
                continue
            low, median, high = quartiles([1 / ratio for ratio in ratios(record, name)])
            y = row + (place - (len(records) - 1) / 2) * height
            bar = {"color": COLOURS[record["what"]], "label": record["what"] if row == 0 else None}
            axes.barh(y, median, 0.9 * height, xerr=[[median - low], [high - median]], ecolor="black", **bar)
            axes.text(high + 0.03, y, f"{median:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), map(label, names))
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.set_title(f"{title(records[0])} ({DEVICES[records[0]['device']]}, {records[0]['precision']})", fontsize=10)


def save_plot(records: list[dict], path: Path) -> None:
    """A picture with a panel for each model; none where no step was measured."""
    from matplotlib.figure import Figure

    panels: dict[tuple, list[dict]] = {}
    for record in records:
        if record["what"] != "first":
            panels.setdefault(key(record)[1:], []).append(record)
    if not panels:
        return
    figure = Figure(figsize=(7, 0.6 + 2.6 * len(panels)), layout="constrained")
    for axes, members in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.values(), strict=True):
        draw(axes, members)
        axes.legend(loc="upper right", fontsize=8)
    figure.supxlabel("time of a step, divided by vitfn's in the same round: median and quartiles", fontsize=10)
    figure.savefig(path, dpi=160)


def write(text: str, plot: Path, readme: Path) -> None:
    """Puts the tables between the README's markers, and the plot beside it."""
    before, rest = readme.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    picture = ""
    if plot.exists():
        (readme.parent / plot.name).write_bytes(plot.read_bytes())
        picture = f"![Time of a step, divided by vitfn's]({plot.name})\n\n"
    readme.write_text(f"{before}{MARKERS[0]}\n{picture}{text}\n{MARKERS[1]}{after}")
