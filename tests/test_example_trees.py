"""The examples of arithmetic on trees: their functions against closed forms, and the scripts as a user runs them."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import vitfn
from vitfn import data, tree, weights
from vitfn.data import Split

TINY = dataclasses.replace(SMALL, num_layers=2, hidden_size=24, mlp_dim=48)


def example(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str) -> str:
    """What the script prints, run in the clone's root."""
    command = [sys.executable, f"examples/{name}.py", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(x, y) for x, y in zip(*map(tree.leaves, (a, b)), strict=True))


def close(a: dict, b: dict, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(x, y, tolerance, tolerance) for x, y in zip(*map(tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("name", ["ensemble", "soups", "few_shot", "lora"])
def test_a_script_has_less_than_100_lines(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 100


# Ensembles


def test_an_ensemble_has_the_curves_and_parameters_of_separate_runs():
    ensemble, rates, steps = example("ensemble"), (0.02, 0.05, 0.1), 12
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(steps, len(rates), 4, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (steps, len(rates), 4), generator=generator)
    models = [vitfn.init(TINY, seed) for seed in range(len(rates))]
    before = [tree.clone(model) for model in models]
    params, losses = ensemble.together(TINY, rates, steps)(models, images, labels)
    separate, alone = ensemble.separate(TINY, rates, steps)(models, images, labels)
    assert losses.shape == (steps, len(rates))
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=0)
    assert close(params, separate, 1e-5)
    assert all(same(*each) for each in zip(models, before, strict=True))
    assert len(set(losses[-1].tolist())) == len(rates)  # they have learnt different things


def test_a_member_of_an_ensemble_knows_nothing_of_the_others():
    ensemble, generator = example("ensemble"), torch.Generator().manual_seed(1)
    images, labels = (
        torch.randn(4, 2, 4, 3, 32, 32, generator=generator),
        torch.randint(10, (4, 2, 4), generator=generator),
    )
    models = [vitfn.init(TINY, seed) for seed in range(2)]
    _, losses = ensemble.together(TINY, (0.1, 0.1), 4)(models, images, labels)
    images[:, 1], labels[:, 1] = -images[:, 1], (labels[:, 1] + 1) % 10
    _, others = ensemble.together(TINY, (0.1, 0.1), 4)(models, images, labels)
    torch.testing.assert_close(losses[:, 0], others[:, 0], rtol=1e-5, atol=0)
    assert not torch.allclose(losses[1:, 1], others[1:, 1], rtol=1e-4)


@pytest.mark.slow
def test_the_ensemble_s_script_finds_the_same_curves():
    text = run("ensemble", "--steps=20", "--batch=8")
    assert float(re.search(r"relative difference of 80 losses ([0-9.e-]+)", text)[1]) <= 1e-5
    assert re.search(r"separate [0-9.]+ s, together [0-9.]+ s: [0-9.]+ of the time \([0-9.]+ to [0-9.]+\)", text)


# Soups


def random_models(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"head/kernel": (3, 2), "cls": (1, 1, 3)}
    return [
        tree.unflatten({path: torch.randn(shape, generator=generator) for path, shape in shapes.items()})
        for _ in range(count)
    ]


def test_the_soup_of_one_is_itself():
    (model,) = random_models(1)
    assert same(example("soups").soup([model]), model)


def test_the_soup_of_three_is_their_mean():
    models = random_models(3)
    expected = tree.map(lambda a, b, c: (a + b + c) / 3, *models)
    assert close(example("soups").soup(models), expected)


def test_the_greedy_soup_takes_what_does_not_harm():
    models = [{"w": torch.tensor([w])} for w in (10.0, 4.0, 2.5, 2.75)]
    chosen = example("soups").greedy_soup(models, lambda model: -abs(model["w"].item() - 3))
    # 2.75 scores best; 2.625 with 2.5 is worse, so it stays out; with 4 it is 3.375, worse; 10 is far
    assert [model["w"].item() for model in chosen] == [2.75]
    chosen = example("soups").greedy_soup(models[:3], lambda model: -abs(model["w"].item() - 3))
    assert [model["w"].item() for model in chosen] == [2.5, 4.0]  # 3.25 is nearer than 2.5


def test_a_line_between_models_ends_at_them_and_its_middle_is_their_soup():
    soups, (a, b) = example("soups"), random_models(2)
    assert same(soups.between(a, b, 0.0), a)
    assert same(soups.between(a, b, 1.0), b)
    assert close(soups.between(a, b, 0.5), soups.soup([a, b]))
    assert close(soups.between(a, b, 0.25), tree.map(lambda x, y: x + (y - x) / 4, a, b))


def test_task_vectors_add_up():
    soups, (start, a, b) = example("soups"), random_models(3)
    assert same(soups.add_tasks(start, [a, b], [0, 0]), start)
    assert close(soups.add_tasks(start, [a, b], [1, 0]), a)
    assert close(soups.add_tasks(start, [a, b], [0.5, 0.5]), soups.soup([a, b]))
    assert close(soups.add_tasks(start, [a, b], [2, -1]), tree.map(lambda s, x, y: 2 * x - y, start, a, b))


def test_fine_tuning_leaves_its_start_alone():
    start, images = vitfn.init(TINY), torch.randn(40, 3, 32, 32)
    before = tree.clone(start)
    params = example("soups").trained(start, TINY, images, torch.arange(40) % 10, 2, 1e-3, 0)
    assert same(start, before)
    assert not same(params, start)


@pytest.mark.slow
def test_the_soups_script_prints_every_mixture():
    text = run("soups", "--steps=12")
    losses = {
        line[:34].strip(): float(line.split("loss")[1].split(",")[0]) for line in text.splitlines() if "loss" in line
    }
    assert losses["0% of the way, the same start"] == losses["fine-tuned, seed and rate 3"]
    assert losses["100% of the way, the same start"] == losses["fine-tuned, seed and rate 4"]
    assert {
        "start",
        "soup of all",
        "start + 1 low + 1 high",
        "100% of the way, another start",
    } <= losses.keys()
    assert losses["soup of all"] < losses["start"]


# Few shots


@pytest.mark.parametrize(("n", "d"), [(40, 7), (6, 20)])
def test_ridge_regression_is_least_squares_with_a_row_for_each_weight(n, d):
    rng = np.random.default_rng(0)
    x, y, strengths = rng.normal(size=(n, d)), rng.normal(size=(n, 3)), [1e-3, 1.0, 300.0]
    found = example("few_shot").ridge(*map(torch.from_numpy, (x, y, np.array(strengths))))
    assert found.shape == (3, d, 3)
    for weights_of, strength in zip(found.numpy(), strengths, strict=True):
        rows = np.concatenate([x, np.sqrt(strength) * np.eye(d)])
        expected = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((d, 3))]), rcond=None)[0]
        np.testing.assert_allclose(weights_of, expected, rtol=1e-8, atol=1e-10)


def clusters(per_class: int, seed: int, spread: float = 0.3) -> Split:
    """Features of three classes, numbered 4, 6 and 9, around corners of a cube of 12 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([4, 6, 9]).repeat(per_class)
    centres = torch.randn(10, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return Split(
        centres[labels] + spread * torch.randn(len(labels), 12, generator=generator, dtype=torch.float64), labels
    )


def test_few_shots_tell_clusters_apart_whatever_the_features_units():
    few_shot = example("few_shot").few_shot
    splits = clusters(5, 0), clusters(20, 1), clusters(200, 2)
    accuracy, strength = few_shot(*splits)
    assert accuracy > 0.97
    units = 10.0 ** torch.arange(-6, 6, dtype=torch.float64).clamp(-2, 2)
    moved = [Split(split.images * units + 5 * units, split.labels) for split in splits]
    assert few_shot(*moved) == (pytest.approx(accuracy, abs=0.005), strength)


def test_the_strength_is_the_one_that_is_best_on_the_images_held_out():
    module = example("few_shot")
    shots, held, test = clusters(4, 0, 1.5), clusters(100, 1, 1.5), clusters(100, 2, 1.5)
    _, chosen = module.few_shot(shots, held, test)
    by_strength = {}
    for strength in module.STRENGTHS.tolist():  # each alone, measured where the strength is chosen
        module.STRENGTHS = torch.tensor([strength])
        by_strength[strength] = module.few_shot(shots, held, held)[0]
    assert by_strength[chosen] == max(by_strength.values()) > min(by_strength.values())


def test_drawn_images_are_so_many_of_each_class_and_other_ranges_share_none():
    drawn = example("few_shot").drawn
    labels = torch.tensor([0, 1, 3]).repeat(30)
    split = Split(torch.arange(90.0)[:, None], labels)
    five, ten, rest = drawn(split, 0, 5), drawn(split, 0, 10), drawn(split, 10, 30)
    assert five.labels.bincount().tolist() == [5, 5, 0, 5]
    assert set(five.images[:, 0].tolist()) < set(ten.images[:, 0].tolist())
    assert set(ten.images[:, 0].tolist()) | set(rest.images[:, 0].tolist()) == set(range(90))
    assert not set(ten.images[:, 0].tolist()) & set(rest.images[:, 0].tolist())
    assert torch.equal(drawn(split, 0, 5).images, five.images)
    assert not torch.equal(drawn(split, 0, 5, seed=1).images, five.images)
    assert torch.equal(labels[five.images[:, 0].long()], five.labels)


def test_features_are_the_encoded_class_tokens():
    params, test = vitfn.init(TINY), data.load("digits").test.part(0, 37)
    found = example("few_shot").features(params, test, TINY)
    pixels = test.images.float() / 255 * 2 - 1
    _, captured = vitfn.apply(params, pixels, TINY, capture="encoded")
    assert torch.equal(found.labels, test.labels)
    torch.testing.assert_close(found.images.float(), captured["encoded"][:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_few_shot_script_learns_more_from_more_shots():
    rows = [line.split() for line in run("few_shot", "--steps=100").splitlines()[1:]]
    shots, untrained, trained = [], [], []
    for k, before, _, after, _ in rows:
        shots.append(int(k))
        untrained.append(float(before.rstrip("%")))
        trained.append(float(after.rstrip("%")))
    assert shots == [1, 5, 10, 25]
    for accuracies in (untrained, trained):  # of five classes
        assert accuracies[-1] > max(50, accuracies[0] + 10)  # which classes are drawn decides how easy one shot is


@pytest.mark.slow
def test_the_few_shot_script_reads_a_file_of_weights(tmp_path):
    vitfn.save(tmp_path / "tiny.npz", vitfn.init(TINY), TINY)
    lines = run("few_shot", f"--model={tmp_path / 'tiny.npz'}").splitlines()
    assert [line.split()[0] for line in lines] == ["shots", "1", "5", "10", "25"]
    assert float(lines[-1].split()[1].rstrip("%")) > 30  # of ten classes, by random features


# LoRA


@pytest.mark.slow
def test_the_lora_script_trains_a_part_and_stores_a_whole(tmp_path):
    text = run("lora", f"--out={tmp_path}", "--steps=60")
    before, after = (float(re.search(rf"{name} +([0-9.]+)%", text)[1]) for name in ("before", "after"))
    assert after > before + 5  # 10 with some draws of the batches
    assert float(re.search(r"within ([0-9.e+-]+) of the largest", text)[1]) <= 1e-5
    with np.load(tmp_path / "lora.npz") as arrays:
        stored = dict(arrays)
    config, names, stated = weights.describe(tmp_path / "merged.npz")
    assert stated
    assert names == tuple("0123456789")
    # two kernels of each of three layers, and the head
    assert sum(array.size for array in stored.values()) == 3 * 2 * 2 * 64 * 8 + 64 * 10 + 10
    merged = tree.flatten(vitfn.load(tmp_path / "merged.npz"))
    np.testing.assert_array_equal(merged["head/kernel"].numpy(), stored["head/kernel"])
    assert config.num_classes == 10


@pytest.mark.slow
def test_the_lora_script_takes_a_file_of_weights_and_changes_its_targets_alone(tmp_path):
    config = dataclasses.replace(TINY, num_classes=7)
    params = vitfn.init(config)
    vitfn.save(tmp_path / "tiny.npz", params, config)
    targets = "--targets=.*/Dense_0/kernel"
    text = run("lora", f"--model={tmp_path / 'tiny.npz'}", targets, "--rank=2", "--steps=2", f"--out={tmp_path}")
    assert "rank 2" in text
    merged, flat = tree.flatten(vitfn.load(tmp_path / "merged.npz")), tree.flatten(params)
    changed = {
        path for path, leaf in flat.items() if not path.startswith("head") and not torch.equal(leaf, merged[path])
    }
    assert changed == {f"Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/kernel" for i in range(2)}
    assert merged["head/kernel"].shape == (24, 10)
