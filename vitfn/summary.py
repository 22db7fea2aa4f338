"""What a finished run says: a table on stdout and report.html."""

import torch
from torch import Tensor

from vitfn import report
from vitfn.data import Dataset, Files
from vitfn.data.images import decode
from vitfn.fit import Outcome
from vitfn.metrics import Predictions
from vitfn.run import RunDirectory

_SAMPLES = 24  # images in the report


def table(directory: RunDirectory, dataset: Dataset, outcome: Outcome, peak_memory: int | None) -> str:
    """The run in a few lines; what was set is read back from its config.json. `peak_memory` is in bytes, if known."""
    metrics, config = outcome.metrics, directory.read_config() or {}
    model, resolved, batch = config["model"], config["resolved"], config["train_batch_size"]
    start = config["pretrained_dir"] or "random weights"
    steps = [step for step in resolved["compile"].values() if step["form"]]
    form = steps[0]["form"] if steps else "off"
    failed = "".join(f", {failed} failed" for failed in (steps[0]["failures"] if steps else ()))
    rows = {
        "model": f"{model['name']}, {model['parameters']:,} parameters, from {start}",
        "data": f"{config['dataset']}, {dataset.train.size:,} training and {dataset.test.size:,} test images",
        "device": f"{resolved['device']}, {resolved['precision']}, compile={form}{failed}",
    }
    if (processes := resolved["processes"]) > 1:
        rows["devices"] = f"{processes}, {resolved['device_batch_size']} images of a batch each, {resolved['mesh']}"
    if outcome.updates:
        others = (outcome.updates - 1) * batch / outcome.other_seconds if outcome.updates > 1 else 0
        rows["steps"] = (
            f"{outcome.updates:,} of {batch} images; the first took {outcome.first_seconds:.1f} s, "
            f"the others {outcome.other_seconds:.1f} s, of which {outcome.waiting:.1%} waiting for data "
            f"({others:.1f} images/s" + (f", {others / processes:.1f} on each device)" if processes > 1 else ")")
        )
        if peak_memory:
            rows["peak memory"] = f"{peak_memory / 2**20:,.0f} MiB of the device" + (
                ", of each" if processes > 1 else ""
            )
        rows["train loss"] = f"{metrics['train/loss']:.4f}"
    rows["test loss"] = f"{metrics['eval/loss']:.4f}"
    rows["test accuracy"] = (
        f"{metrics['eval/accuracy']:.2%} ({metrics['eval/correct']:.0f} of {metrics['eval/count']:.0f})"
    )
    if "eval/mean_average_precision" in metrics:
        rows["test precision"] = f"{metrics['eval/mean_average_precision']:.4f} on average"
    rows["files"] = str(directory.path)
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items())


def write_report(directory: RunDirectory, dataset: Dataset, predictions: Predictions, places: Tensor) -> None:
    """report.html, of the last evaluation and of what the run logged; `places` are the predictions' in the split."""
    config = directory.read_config() or {}
    report.write(
        directory.report_path,
        command=config["command"],
        config=config,
        rows=directory.rows(),
        predictions=predictions,
        class_names=dataset.class_names,
        samples=_samples(predictions, places, dataset),
    )


def _samples(p: Predictions, places: Tensor, dataset: Dataset) -> list[report.Sample]:
    """The surest mistakes, and as many of the others, evenly over the split."""
    if p.multi_label:
        return []
    mistakes = (~p.right).nonzero()[:, 0]
    wrong = mistakes[p.confidence[mistakes].argsort(descending=True)][: _SAMPLES // 2].tolist()
    right = p.right.nonzero()[:, 0].tolist()
    chosen = wrong + right[:: max(1, len(right) // (_SAMPLES // 2))][: _SAMPLES - len(wrong)]
    test, names = dataset.test, dataset.class_names

    def image(i: int) -> torch.Tensor:
        return decode(test.paths[i], test.channels) if isinstance(test, Files) else test.images[i]

    return [
        report.Sample(image(int(places[i])), names[p.labels[i]], names[p.predicted[i]], float(p.confidence[i]))
        for i in chosen
    ]
