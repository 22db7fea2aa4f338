"""Trees of named leaves: paths, order, maps, selection and norms."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

import vitfn
from vitfn import tree

NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=4)
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.integers(), lambda children: st.dictionaries(NAMES, children, min_size=1, max_size=4), max_leaves=12
    ),
    max_size=4,
)
calm = settings(max_examples=50)


def make_tree(dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "head": {"kernel": torch.randn(3, 4, generator=generator).to(dtype), "bias": torch.zeros(4, dtype=dtype)},
        "cls": torch.randn(1, 1, 3, generator=generator).to(dtype),
        "Transformer": {"encoderblock_0": {"scale": torch.randn(5, generator=generator).to(dtype) * 100}},
    }


def ordered(node):
    """A tree as nested lists, so that equality sees the order."""
    return [(name, ordered(child)) for name, child in node.items()] if isinstance(node, dict) else node


@calm
@given(TREES)
def test_unflatten_is_the_inverse_of_flatten_order_included(nested):
    assert ordered(tree.unflatten(tree.flatten(nested))) == ordered(nested)


@calm
@given(TREES)
def test_flatten_is_the_inverse_of_unflatten_order_included(nested):
    flat = tree.flatten(nested)
    assert list(tree.flatten(tree.unflatten(flat)).items()) == list(flat.items())


@calm
@given(TREES)
def test_a_path_leads_to_its_leaf(nested):
    for path, leaf in tree.flatten(nested).items():
        node = nested
        for name in path.split("/"):
            node = node[name]
        assert node is leaf


def test_flatten_joins_names_by_slashes_in_the_tree_s_order():
    assert list(tree.flatten({"b": {"z": 1, "a": {"y": 2}}, "a": 3}).items()) == [("b/z", 1), ("b/a/y", 2), ("a", 3)]


def test_leaves_are_in_the_tree_s_order():
    assert tree.leaves({"b": {"z": 1, "a": {"y": 2}}, "a": 3}) == [1, 2, 3]


@calm
@given(TREES)
def test_map_keeps_structure_and_order(nested):
    doubled = tree.map(lambda x: 2 * x, nested)
    assert list(tree.flatten(doubled).items()) == [(path, 2 * x) for path, x in tree.flatten(nested).items()]
    assert ordered(tree.map(lambda x: x, nested)) == ordered(nested)


def test_map_takes_the_leaves_at_the_same_path_whatever_the_order():
    a = {"x": {"p": 1, "q": 2}, "y": 3}
    b = {"y": 30, "x": {"q": 20, "p": 10}}
    c = {"x": {"q": 200, "p": 100}, "y": 300}
    assert list(tree.flatten(tree.map(lambda *xs: xs, a, b, c)).items()) == [
        ("x/p", (1, 10, 100)),
        ("x/q", (2, 20, 200)),
        ("y", (3, 30, 300)),
    ]


def test_map_over_a_tree_that_lacks_a_leaf_raises():
    with pytest.raises(KeyError, match="q"):
        tree.map(lambda a, b: a, {"x": {"p": 1, "q": 2}}, {"x": {"p": 1}})


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("head", []),
        ("head/kernel", ["head/kernel"]),
        ("ead/kernel", []),
        ("head/.*", ["head/kernel", "head/bias"]),
        ("cls|.*/bias", ["head/bias", "cls"]),
        (".*scale", ["Transformer/encoderblock_0/scale"]),
        ("Transformer/encoderblock_", []),
        (".*", ["head/kernel", "head/bias", "cls", "Transformer/encoderblock_0/scale"]),
    ],
)
def test_select_matches_whole_paths(pattern, paths):
    params = make_tree()
    selected = tree.select(params, pattern)
    assert list(selected) == paths
    assert all(selected[path] is tree.flatten(params)[path] for path in paths)


def test_norm_equals_numpy_in_float64():
    params = vitfn.init(SMALL)
    flat = np.concatenate([leaf.numpy().astype(np.float64).ravel() for leaf in tree.leaves(params)])
    norm = tree.norm(params)
    assert (norm.shape, norm.dtype) == ((), torch.float32)
    np.testing.assert_allclose(norm.item(), np.sqrt((flat**2).sum()), rtol=1e-6)


def test_norm_of_a_3_4_12_box_is_13():
    assert tree.norm({"a": torch.tensor([3.0, -4.0]), "b": {"c": torch.tensor([[12.0]])}}).item() == 13


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_of_what_is_not_finite_is_not_finite(bad):
    params = make_tree()
    params["head"]["bias"][2] = bad
    assert not tree.norm(params).isfinite()


def test_clone_owns_its_memory():
    params = make_tree()
    copy = tree.clone(params)
    before = {path: leaf.clone() for path, leaf in tree.flatten(params).items()}
    for leaf in tree.leaves(copy):
        leaf.add_(1)
    for path, leaf in tree.flatten(params).items():
        assert torch.equal(leaf, before[path])
        assert torch.equal(tree.flatten(copy)[path], before[path] + 1)


def test_to_converts_every_leaf():
    params = make_tree()
    half = tree.to(params, torch.float16)
    assert {leaf.dtype for leaf in tree.leaves(half)} == {torch.float16}
    for path, leaf in tree.flatten(params).items():
        assert torch.equal(tree.flatten(half)[path], leaf.half())


def test_size_counts_numbers():
    assert tree.size(make_tree()) == 3 * 4 + 4 + 3 + 5
    assert tree.size({}) == 0


def test_a_model_s_tree_has_the_order_of_its_shapes():
    assert [(path, tuple(leaf.shape)) for path, leaf in tree.flatten(vitfn.init(SMALL)).items()] == list(
        vitfn.shapes(SMALL).items()
    )


def test_unstack_is_the_inverse_of_stack():
    trees = [tree.map(lambda leaf, i=i: leaf + i, make_tree()) for i in range(3)]
    stacked = tree.stack(trees)
    assert list(tree.flatten(stacked)) == list(tree.flatten(trees[0]))
    assert stacked["head"]["kernel"].shape == (3, 3, 4)
    for found, expected in zip(tree.unstack(stacked), trees, strict=True):
        assert list(tree.flatten(found)) == list(tree.flatten(expected))
        assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, (found, expected)), strict=True))


def test_unstacked_leaves_are_views():
    stacked = tree.stack([make_tree(), make_tree()])
    tree.unstack(stacked)[1]["head"]["bias"].fill_(7)
    assert stacked["head"]["bias"].tolist() == [[0] * 4, [7] * 4]
