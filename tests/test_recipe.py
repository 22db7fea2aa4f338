"""From flags to plain values: what contradicts itself is refused by name, the rest means what it says."""

import pytest
import torch
from absl.flags import FlagValues

import vitfn
from vitfn import flags, losses, recipe, tree
from vitfn.data.augment import Augmentation
from vitfn.data.crops import resize, resize_and_crop
from vitfn.device import DEVICES
from vitfn.errors import InputError

NANO = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=10)


def parsed(*argv: str) -> FlagValues:
    fv = FlagValues()
    for group in flags.TRAIN:
        group(fv)
    fv(["train", "--model_type=ViT-Nano_8", "--img_size=32", "--num_steps=10", "--warmup_steps=0", *argv])
    return fv


# --- what is refused


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--fp16 --precision=bfloat16", ["--fp16", "--precision=bfloat16"]),
        ("--fp16_opt_level=O4", ["--fp16_opt_level", "'O4'", "O0, O1, O2 or O3"]),
        ("--loss_scale=128", ["--loss_scale=128", "--precision=float16"]),
        ("--loss_scale=128 --precision=bfloat16", ["--loss_scale=128", "--precision=float16"]),
        ("--max_grad_norm=0", ["--max_grad_norm", "0", "above 0"]),
        ("--max_grad_norm=-1", ["--max_grad_norm", "-1", "above 0"]),
        ("--layer_decay=0", ["--layer_decay", "0", "above 0"]),
        ("--ema=1", ["--ema", "1", "below 1"]),
        ("--train_batch_size=10 --gradient_accumulation_steps=4", ["--train_batch_size", "10", "_steps=4"]),
        ("--train_fraction=0", ["--train_fraction", "0", "above 0"]),
        ("--train_fraction=0.98 --dataset=folder", ["--train_fraction", "0.98", "folder"]),
        ("--freeze=head(", ["--freeze=head(", "regular expression"]),
        ("--decay_on=[", ["--decay_on", "regular expression"]),
        ("--randaugment=0,3", ["--randaugment", "0,3", "at least 1"]),
        ("--randaugment=2,11", ["--randaugment", "2,11", "0 to 10"]),
        ("--randaugment=2,-1", ["--randaugment", "2,-1", "0 to 10"]),
        ("--channels=1", ["--channels=1", "--dataset=folder or list", "cifar10"]),
        ("--channels=4 --dataset=digits", ["--channels=4", "digits"]),
        ("--eval_crop=0.05", ["--eval_crop", "0.05", "0.1 to 1"]),
        ("--eval_interpolation=bicubic", ["--eval_interpolation=bicubic", "--eval_crop"]),
    ],
)
def test_nonsense_is_one_line_that_names_the_flag(argv, parts):
    with pytest.raises(InputError) as caught:
        recipe.check(parsed(*argv.split()), DEVICES["cpu"])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--fp16 --precision=float16 --loss_scale=1024 --fp16_opt_level=01",
        "--loss_scale=8 --fp16",
        "--train_batch_size=12 --gradient_accumulation_steps=4",
        "--randaugment=1,0",
        "--randaugment=3,10",
        "--channels=1 --dataset=folder",
        "--channels=5 --dataset=list",
        "--train_fraction=0.98 --dataset=list",
        "--train_fraction=1 --dataset=folder",
        "--eval_crop=0.1 --eval_interpolation=bicubic",
        "--eval_crop=1",
        "--seed=-1",
        "--crop_min=1 --label_smoothing=1 --erasing=1 --mixup=0.2 --cutmix=1",
    ],
)
def test_what_makes_sense_is_let_through(argv):
    recipe.check(parsed(*argv.split()), DEVICES["cpu"])


@pytest.mark.parametrize(
    ("argv", "processes"), [("--train_batch_size=10", 4), ("--train_batch_size=12 --gradient_accumulation_steps=2", 4)]
)
def test_each_process_and_each_part_gets_as_many_images(argv, processes):
    with pytest.raises(InputError, match=f"--train_batch_size: .* times {processes} processes"):
        recipe.check(parsed(*argv.split()), DEVICES["cpu"], processes)
    recipe.check(parsed(*argv.split(), "--train_batch_size=16"), DEVICES["cpu"], processes)


def test_a_loss_scale_goes_with_what_auto_means_on_a_device():
    recipe.check(parsed("--loss_scale=128"), DEVICES["sdaa"])


def test_fp16_becomes_the_precision():
    fv = parsed("--fp16")
    recipe.check(fv, DEVICES["cpu"])
    assert fv.precision == "float16"


# --- the model


def test_the_file_s_own_arithmetic_is_kept_unless_a_flag_says_otherwise():
    own = vitfn.get_config("ViT-Nano_8", gelu="erf", layer_norm_eps=1e-5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    config = recipe.model(parsed(), own)
    assert (config.gelu, config.layer_norm_eps, config.mean, config.image_hw) == ("erf", 1e-5, own.mean, (32, 32))
    assert recipe.model(parsed("--gelu=tanh"), own).gelu == "tanh"
    assert recipe.model(parsed(), None).gelu == "tanh"


def test_the_flags_of_the_model_arrive():
    config = recipe.model(parsed("--dropout_rate=0.25", "--stochastic_depth=0.5", "--img_size=32x64"), None)
    assert (config.dropout_rate, config.stochastic_depth_rate, config.image_size) == (0.25, 0.5, (32, 64))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--model_type=ViT-X_16", ["--model_type=ViT-X_16", "ViT-B_16"]),
        ("--img_size=30", ["--img_size=30", "patch size 8"]),
        ("--img_size=32x30", ["--img_size=32x30", "patch size 8"]),
        ("--stochastic_depth=1", ["stochastic_depth", "below 1"]),
        ("--dropout_rate=1", ["dropout_rate", "below 1"]),
    ],
)
def test_a_model_that_cannot_be_is_refused(argv, parts):
    with pytest.raises(InputError) as caught:
        recipe.model(parsed(argv), None)
    for part in parts:
        assert part in str(caught.value)


def test_the_data_s_classes_and_channels_make_the_model():
    config = recipe.for_data(NANO, 7, 5)
    assert (config.num_classes, config.channels) == (7, 5)
    coloured = vitfn.get_config("ViT-Nano_8", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    grey = recipe.for_data(coloured, 7, 1)
    assert (grey.channels, grey.mean, grey.std) == (1, pytest.approx(0.5), pytest.approx(0.2))


# --- the optimizer


def one_update(*argv: str, steps: int = 1) -> tuple[dict, dict, dict]:
    """Parameters before and after updates with gradients of 1, and the optimizer's state: by path."""
    optimizer = recipe.optimizer(parsed(*argv), NANO)
    before = params = vitfn.init(NANO, 0)
    state = optimizer.init(params)
    ones = {path: torch.ones_like(leaf) for path, leaf in tree.flatten(params).items() if optimizer.rules.trains(path)}
    for step in range(steps):
        params, state = optimizer.update(tree.unflatten(ones), state, params, torch.tensor(step))
    return tree.flatten(before), tree.flatten(params), state


def test_by_default_it_is_sgd_at_the_peak_rate():
    before, after, _ = one_update("--learning_rate=0.5")
    for path in before:
        torch.testing.assert_close(after[path], before[path] - 0.5)


def test_layer_decay_slows_what_is_far_from_the_head():
    before, after, _ = one_update("--learning_rate=0.5", "--layer_decay=0.5")
    for path, power in {"head/bias": 0, "Transformer/encoderblock_2/LayerNorm_0/bias": 1, "cls": 4}.items():
        torch.testing.assert_close(before[path] - after[path], torch.full_like(before[path], 0.5 * 0.5**power))


def test_freeze_leaves_all_but_the_head_as_it_is():
    before, after, state = one_update("--freeze=(?!head/).*")
    changed = {path for path in before if not before[path].equal(after[path])}
    assert changed == {"head/kernel", "head/bias"} == tree.flatten(state["momentum"]).keys()


@pytest.mark.parametrize(
    ("rule", "on", "decays"),
    [
        ("torch", None, {"head/bias", "head/kernel", "cls"}),
        ("big_vision", None, {"head/kernel"}),
        ("torch", "head/.*", {"head/bias", "head/kernel"}),
        ("big_vision", "cls", {"cls"}),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_works_on_what_its_flags_say(optimizer, rule, on, decays):
    flags = [f"--optimizer={optimizer}", f"--decay_rule={rule}", "--weight_decay=0.1", "--learning_rate=0.5"]
    flags += [f"--decay_on={on}"] if on is not None else []
    before, with_decay, _ = one_update(*flags)
    _, without, _ = one_update(*flags[:1], "--learning_rate=0.5")
    factor = 0.1 * (1.0 if rule == "big_vision" else 0.5)  # big_vision's is not times the rate, but its share of peak
    for path in ("head/bias", "head/kernel", "cls"):
        wanted = factor * before[path] if path in decays else torch.zeros_like(before[path])
        torch.testing.assert_close(without[path] - with_decay[path], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("flag", "found"), [("--freeze=zzz", "no leaf"), ("--freeze=.*", "every leaf"),
                                             ("--freeze=head", "no leaf"), ("--decay_on=zzz", "no leaf"),
                                             ("--decay_on=", "no leaf")])  # fmt: skip
def test_a_pattern_that_selects_nothing_is_refused(flag, found):
    with pytest.raises(InputError, match=f"{flag.replace('.*', '..')}: matches {found} as a whole, expected some"):
        recipe.optimizer(parsed(flag), NANO)


@pytest.mark.parametrize(("optimizer", "moment"), [("sgd", "momentum"), ("adamw", "mu")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_is_stored_as_asked_and_the_second_in_float32(optimizer, moment, dtype):
    _, _, state = one_update(f"--momentum_dtype={dtype}", f"--optimizer={optimizer}")
    assert {leaf.dtype for leaf in tree.leaves(state[moment])} == {getattr(torch, dtype)}
    assert {leaf.dtype for leaf in tree.leaves(state.get("nu", {}))} <= {torch.float32}


def test_ema_keeps_an_average():
    _, _, state = one_update("--ema=0.9")
    assert "ema" in state
    assert "ema" not in one_update()[2]


@pytest.mark.parametrize(
    ("argv", "rates"),
    [
        ("", [1, 0.9045085, 0.0244717]),
        ("--rate_index=seed", [0.9755283, 0.7938926, 0]),
        ("--decay_type=linear", [1, 0.8000020, 0.1000090]),
        ("--decay_type=linear --rate_index=seed", [0.9, 0.7, 0]),
    ],
)
def test_rates_at_updates_0_2_and_9_of_10(argv, rates):
    """Half a cosine, (1 + cos(pi t / 10)) / 2, or a line; the seed's are those of t + 1."""
    schedule = recipe.optimizer(parsed("--learning_rate=1", *argv.split()), NANO).schedule
    assert [float(schedule(torch.tensor(t))) for t in (0, 2, 9)] == pytest.approx(rates, abs=1e-6)


# --- the rest


def test_the_loss_is_chosen_by_flag_or_by_the_labels():
    assert recipe.loss(None, several_labels=False) is losses.softmax
    assert recipe.loss(None, several_labels=True) is losses.sigmoid
    assert recipe.loss("sigmoid", several_labels=False) is losses.sigmoid
    with pytest.raises(InputError, match=r"--loss=softmax: .* several labels, expected sigmoid"):
        recipe.loss("softmax", several_labels=True)


def test_the_augmentation_s_flags_arrive_each_in_its_place():
    argv = "--crop_min=0.3 --crop=google --flip --randaugment=2,5 --erasing=0.1 --mixup=0.2 --cutmix=0.4"
    expected = Augmentation(
        crop_min=0.3, crop="google", flip=True, randaugment=(2, 5), erasing=0.1, mixup=0.2, cutmix=0.4
    )
    assert recipe.augmentation(parsed(*argv.split())) == expected
    assert recipe.augmentation(parsed()) == Augmentation()


def test_evaluation_resizes_or_crops():
    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert recipe.fit_for_evaluation(parsed(), NANO)(images).equal(resize(images, (32, 32)))
    cropped = recipe.fit_for_evaluation(parsed("--eval_crop=0.8", "--eval_interpolation=bicubic"), NANO)(images)
    assert cropped.equal(resize_and_crop(images, (32, 32), 0.8, "bicubic"))
