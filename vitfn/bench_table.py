"""What vitfn.bench prints."""

from typing import Any

_OPERATORS = 10  # that are printed
_WIDTH = 70  # characters of their names


def table(report: dict[str, Any]) -> str:
    """A bench.json as aligned lines."""
    model, machine = report["model"], report["machine"]
    size = "x".join(map(str, model["image_size"]))
    rows = {
        "model": f"{model['name']}, {model['parameters']:,} parameters, {size} pixels, {model['tokens']} tokens",
        "device": f"{machine.get('device_name', machine['processor'])} ({report['device']}, "
        f"{machine['threads']} threads), {report['precision']}, torch {report['versions']['torch']}",
    }
    for name in ("train", "eval"):
        if name in report:
            rows |= _step(name, report[name])
    if found := report.get("input"):
        share = found.get("share_of_train_step")
        rows["input"] = f"{_times(found)}, {found['dataset']}" + (
            "" if share is None else f", {share:.1%} of a train step"
        )
    if found := report.get("compile"):
        waits = found["seconds"]
        rows["compile"] = (
            f"{waits['cold']:.1f} s with cold caches, {waits['warm']:.1f} s with warm ones, beside the step"
        )
    if not (found := report.get("parts")):
        return _aligned(rows)
    parts = ((name, found["milliseconds"][name], share) for name, share in found["shares"].items())
    rows["parts"] = ", ".join(f"{name} {ms:.1f} ms ({share:.0%})" for name, ms, share in parts)
    rows["attention"] = ", ".join(found["fused_attention"]) or "not fused"
    listed = [f"{each['milliseconds']:>10.2f} {each['share']:>6.1%} {each['calls']:>7g}  {each['name'][:_WIDTH]}"
              for each in found["operators"][:_OPERATORS]]  # fmt: skip
    return "\n".join([_aligned(rows), "", f"{'ms a step':>10} {'share':>6} {'calls':>7}  operator", *listed])


def _step(name: str, found: dict[str, Any]) -> dict[str, str]:
    rows = {name: f"{_times(found)}, compile={found['form']}"}
    rows[name] += "".join(f", {failed} failed" for failed in found["failures"])
    used, peaks = found["utilisation"], found["operations_per_second"]
    if used["mfu"] is not None:
        rows[f"{name} MFU"] = f"{used['mfu']:.1%} of {peaks['ceiling'] / 1e12:.3g} T operations/s, measured"
        if peaks["datasheet"]:
            rows[f"{name} MFU"] += f"; {used['mfu_of_datasheet']:.1%} of the datasheet's {peaks['datasheet'] / 1e12:g}"
        rows[f"{name} MFU"] += f"; {used['needed']:.1%} without what need not be computed"
    if (memory := found["peak_memory"])["bytes"] is not None:
        rows[f"{name} memory"] = f"{memory['bytes'] / 2**20:,.0f} MiB of the {memory['of']}"
    return rows


def _times(found: dict[str, Any]) -> str:
    times = found["milliseconds"]
    middle = f"{times['median']:.2f} ms (quartiles {times['lower']:.2f} to {times['upper']:.2f})"
    return f"{middle}, {found['images_per_second']:.1f} images/s, batches of {found['batch_size']}"


def _aligned(rows: dict[str, str]) -> str:
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items())
