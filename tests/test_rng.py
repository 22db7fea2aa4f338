"""The hash behind all randomness: the same for ints and tensors, uniform, and without visible relations.

Everything here is deterministic, so that a generous bound either always holds or never does. Chi-square of 256 classes
has mean 255 and standard deviation 23; a correlation of n pairs has standard deviation 1 / sqrt(n).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfn import layers, rng

KEYS = st.integers(0, 2**32 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
calm = settings(max_examples=50)


def chi_square(classes: torch.Tensor, count: int) -> float:
    found = torch.bincount(classes.flatten(), minlength=count).double()
    return (((found - found.mean()) ** 2).sum() / found.mean()).item()


def largest_correlation(rows: torch.Tensor) -> float:
    correlations = np.corrcoef(rows.double().numpy())
    return np.abs(correlations - np.eye(len(rows))).max()


def flip_rates(function, inputs: torch.Tensor, input_bits: int) -> torch.Tensor:
    """How often flipping each input bit flips each of the upper 16 output bits: (input_bits, 16)."""
    outputs = function(inputs)
    changed = torch.stack([function(inputs ^ (1 << i)) ^ outputs for i in range(input_bits)])  # (input_bits, N)
    return (changed[..., None] >> torch.arange(16, 32) & 1).double().mean(dim=1)


@calm
@given(KEYS, INT64)
def test_an_int_and_a_tensor_give_the_same_key(key, data):
    expected = rng.fold_in(key, data)
    assert 0 <= expected < 2**32
    for a in (key, torch.tensor(key)):
        for b in (data, torch.tensor(data)):
            assert int(rng.fold_in(a, b)) == expected


@calm
@given(KEYS, st.integers(0, 255))
def test_bits_are_those_of_each_key_alone(key, index):
    together = rng.bits(torch.tensor([[key, 5], [6, key]]), 16, 16)
    alone = rng.bits(torch.tensor(key), 256)
    assert together.shape == (2, 2, 16, 16)
    assert together.dtype == torch.int64
    assert together[0, 0].flatten()[index] == together[1, 1].flatten()[index] == alone[index]
    assert 0 <= int(alone[index]) < 2**32


def test_bits_of_a_prefix_are_a_prefix_of_bits():
    key = torch.tensor(rng.stream(0, "test"))
    assert torch.equal(rng.bits(key, 1000)[:100], rng.bits(key, 100))


@pytest.mark.parametrize(
    ("seed", "use", "key"),
    [
        (0, "init", 1973109123),
        (0, "dropout", 2670253228),
        (42, "augment", 809631029),
        (-1, "dropout", 3710676095),
        (2**70 + 3, "shuffle", 323150807),
    ],
)
def test_streams_are_these_keys(seed, use, key):
    """A change of what follows changes every run of every user: let it be a decision, and count rng.VERSION up."""
    assert rng.stream(seed, use) == key


def test_folded_keys_are_these():
    assert rng.fold_in(0, 1) == 2261973619
    assert rng.fold_in(0x9E3779B9, 42) == 2023877858


def test_bits_are_these():
    assert rng.bits(torch.tensor([1, 0xDEADBEEF]), 2, 2).tolist() == [
        [[4131087632, 3910051104], [3475409017, 3973628109]],
        [[2372048440, 2737763498], [1496220812, 2584711798]],
    ]


def test_uniform_numbers_are_these():
    assert (rng.uniform(torch.tensor(7), 4) * 2**24).tolist() == [10191145, 9612069, 2339330, 27672]


def test_a_permutation_is_this():
    assert rng.permutation(12, 7).tolist() == [10, 3, 5, 2, 8, 4, 9, 1, 0, 11, 7, 6]


@pytest.mark.parametrize("seed", [-1, -(2**31), -(2**63), 2**32 - 1, 2**63 - 1, 2**64, 10**100])
def test_negative_and_huge_seeds_are_accepted(seed):
    key = rng.stream(seed, "dropout")
    assert 0 <= key < 2**32
    assert 0 <= rng.uniform(torch.tensor(key), 1).item() < 1


def test_each_seed_and_use_has_a_stream_of_its_own():
    keys = {rng.stream(seed, use) for seed in range(-500, 500) for use in ("init", "dropout", "augment", "shuffle")}
    assert len(keys) == 4000


def test_fold_in_is_a_permutation_of_the_data():
    keys = rng.fold_in(rng.stream(0, "test"), torch.arange(2**18))
    assert len(keys.unique()) == 2**18


@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFF, rng.stream(0, "test")])
def test_the_upper_byte_of_bits_is_uniform(key):
    assert 100 < chi_square(rng.bits(torch.tensor(key), 2**17) >> 24, 256) < 400


def test_the_upper_byte_of_neighbouring_keys_is_uniform():
    keys = rng.fold_in(rng.stream(0, "test"), torch.arange(2**17))
    assert 100 < chi_square(keys >> 24, 256) < 400
    assert 100 < chi_square(rng.bits(keys, 1) >> 24, 256) < 400


def test_flipping_a_bit_of_the_data_flips_half_of_the_key():
    rates = flip_rates(lambda data: rng.fold_in(rng.stream(0, "test"), data), torch.arange(2048) * 1_999_993, 32)
    assert rates.shape == (32, 16)
    assert rates.min() > 0.35
    assert rates.max() < 0.65


def test_flipping_a_bit_of_the_key_flips_half_of_the_bits():
    rates = flip_rates(lambda keys: rng.bits(keys, 1)[:, 0], torch.arange(2048) * 1_999_993 & 0xFFFFFFFF, 32)
    assert rates.min() > 0.35
    assert rates.max() < 0.65


def test_flipping_a_bit_of_the_element_s_place_flips_half_of_the_bits():
    bits = rng.bits(torch.tensor(rng.stream(0, "test")), 2**17)
    rates = flip_rates(lambda index: bits[index], torch.arange(0, 2**17, 61), 17)
    assert rates.min() > 0.35
    assert rates.max() < 0.65


def test_numbers_of_neighbouring_seeds_steps_and_samples_are_uncorrelated():
    streams = torch.tensor([rng.stream(seed, "dropout") for seed in range(16)])
    steps = rng.fold_in(streams[0], torch.arange(16))
    samples = rng.fold_in(steps[0], torch.arange(16))
    for keys in (streams, steps, samples):
        assert largest_correlation(rng.uniform(keys, 10_000)) < 0.05


def test_numbers_of_neighbouring_elements_are_uncorrelated():
    numbers = rng.uniform(torch.tensor(rng.stream(0, "test")), 10_064)
    assert largest_correlation(torch.stack([numbers[lag : lag + 10_000] for lag in range(64)])) < 0.05


def correlated_lags(mask: torch.Tensor, rate: float, most: int = 65_535) -> int:
    """The lags 1 to `most` at which elements of a mask (N,) that drops at a rate are correlated with p < 1e-6.

    At a lag of k the N - k products of deviations have mean 0 and variance (rate (1 - rate))^2.
    """
    count, spectrum = len(mask), torch.fft.rfft(mask.double() - rate, 2 * len(mask))  # padded: nothing goes round
    sums = torch.fft.irfft(spectrum * spectrum.conj())[1 : most + 1]  # (most,)
    deviations = rate * (1 - rate) * (count - torch.arange(1, most + 1)).sqrt()
    return int((sums.abs() > 4.8916 * deviations).sum())  # a normal number's two-sided p of 1e-6


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_the_elements_of_a_dropout_mask_are_uncorrelated_at_every_distance(rate):
    """By chance one mask in fifteen has such a lag. With two rounds of the hash each had up to 17."""
    steps = rng.fold_in(rng.stream(0, "dropout"), torch.arange(3))
    masks = layers.dropout(torch.ones(3, 2**20), rate, steps) == 0
    assert [correlated_lags(mask, rate) for mask in masks] == [0, 0, 0]


def test_the_third_round_is_what_decorrelates_them():
    """`fold_in` has the two rounds alone, which are enough for keys."""
    key = rng.fold_in(rng.stream(0, "dropout"), 0)
    assert correlated_lags(rng.fold_in(key, torch.arange(2**20)) < 2**31, 0.5) > 3


def test_masks_of_different_keys_share_numbers_only_by_chance():
    """Where two keys agree in the bits above the elements' places, one mask must not be the other in another order."""
    keys, count = rng.fold_in(rng.stream(0, "dropout"), torch.arange(4096)).sort().values, 2**18
    pairs = torch.nonzero(keys[1:] >> 18 == keys[:-1] >> 18)[:3, 0]
    assert len(pairs) == 3
    for pair in pairs:
        shared = torch.isin(rng.bits(keys[pair], count), rng.bits(keys[pair + 1], count)).sum()
        assert shared < 200  # by chance 2**18 * 2**18 / 2**32 = 16


def test_uniform_numbers_are_multiples_of_two_to_the_minus_24_below_one():
    numbers = rng.uniform(torch.arange(1000), 10, 10)
    assert numbers.shape == (1000, 10, 10)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())


def test_the_largest_bits_stay_below_one(monkeypatch):
    monkeypatch.setattr(rng, "bits", lambda key, *shape: torch.full(shape, 0xFFFFFFFF))
    assert rng.uniform(torch.tensor(0), 1).item() == 1 - 2**-24


def test_mean_and_variance_are_those_of_the_uniform_distribution():
    numbers = rng.uniform(torch.tensor(rng.stream(0, "test")), 2**18).double()
    assert abs(numbers.mean() - 1 / 2) < 5 * (1 / 12) ** 0.5 / 2**9
    assert abs(numbers.var() - 1 / 12) < 5 * (1 / 180) ** 0.5 / 2**9


@pytest.mark.parametrize("length", [0, 1, 2, 1000, 50_000])
def test_a_permutation_has_each_number_once(length):
    order = rng.permutation(length, rng.stream(0, "shuffle"))
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(length))


def test_permutations_of_two_epochs_differ_in_nearly_every_place():
    key = rng.stream(0, "shuffle")
    orders = [rng.permutation(1000, rng.fold_in(key, epoch)) for epoch in range(8)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # by chance 1


def test_every_order_is_equally_likely():
    orders = [rng.permutation(4, rng.fold_in(rng.stream(0, "test"), i)) for i in range(4800)]
    codes = torch.stack(orders) @ torch.tensor([64, 16, 4, 1])
    names, classes = codes.unique(return_inverse=True)
    assert len(names) == 24
    assert 3 < chi_square(classes, 24) < 60  # mean 23, standard deviation 7
