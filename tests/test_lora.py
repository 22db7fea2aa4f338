"""LoRA as a tree: what it adds to each kind of kernel, its gradients, its size, and the file that it merges into."""

import math

import pytest
import torch
from conftest import SMALL

import vitfn
from vitfn import layers, lora, tree
from vitfn.errors import InputError

ATTENTION = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
MLP = "Transformer/encoderblock_1/MlpBlock_3"
EVERY = ".*"  # kernel


def random_lora(params: dict, rank: int = 4, targets: str = EVERY, seed: int = 0) -> dict:
    """One whose b is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda x: 0.1 * torch.randn(x.shape, generator=generator), lora.init(params, rank, 0, targets))


def alive(seed: int = 0) -> dict:
    """Parameters whose head is not zero, so that gradients reach what is below it."""
    params = vitfn.init(SMALL, seed)
    params["head"]["kernel"].normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return params


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_new_lora_changes_no_bit():
    params = alive()
    merged = lora.merge(params, lora.init(params, targets=EVERY))
    assert list(tree.flatten(merged)) == list(tree.flatten(params))
    assert all(
        torch.equal(merged_leaf, leaf) for merged_leaf, leaf in zip(*map(tree.leaves, (merged, params)), strict=True)
    )


def test_leaves_that_are_not_adapted_are_the_model_s_own():
    params = alive()
    merged, flat = tree.flatten(lora.merge(params, random_lora(params, targets=lora.TARGETS))), tree.flatten(params)
    changed = {path for path in flat if merged[path] is not flat[path]}
    assert changed == {
        f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/{name}/kernel"
        for i in range(3)
        for name in ("query", "value")
    }


@pytest.mark.parametrize(
    ("path", "product"),
    [
        (f"{ATTENTION}/query/kernel", "nd,dhk->nhk"),
        (f"{ATTENTION}/key/kernel", "nd,dhk->nhk"),
        (f"{ATTENTION}/value/kernel", "nd,dhk->nhk"),
        (f"{ATTENTION}/out/kernel", "nhk,hkd->nd"),
        (f"{MLP}/Dense_0/kernel", "nd,dm->nm"),
        (f"{MLP}/Dense_1/kernel", "nm,md->nd"),
        ("embedding/kernel", "npqc,pqcd->nd"),
        ("head/kernel", "nd,dk->nk"),
    ],
)
def test_a_merged_kernel_computes_x_w_plus_alpha_over_r_times_x_a_b(path, product):
    params, rank, alpha = alive(), 3, 6.0
    small = random_lora(params, rank)
    before, after = (tree.flatten(each)[path].double() for each in (params, lora.merge(params, small, alpha)))
    a, b = (tree.flatten(small)[f"{path}/{name}"].double() for name in "ab")
    inputs = before.shape[: len(product.split(",")[0]) - 1]
    assert (a.shape, b.shape) == ((math.prod(inputs), rank), (rank, before.numel() // math.prod(inputs)))
    x = torch.randn(5, *inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    beside = (alpha / rank) * ((x.flatten(1) @ a) @ b)
    expected = torch.einsum(product, x, before) + beside.reshape(torch.einsum(product, x, before).shape)
    torch.testing.assert_close(torch.einsum(product, x, after), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_dense_layer_is_the_layer_and_the_small_one_beside_it():
    params = {"kernel": torch.randn(6, 4), "bias": torch.randn(4)}
    small, x = {"a": torch.randn(6, 2), "b": torch.randn(2, 4)}, torch.randn(3, 6)
    merged = lora.merge({"dense": params}, {"dense": {"kernel": small}}, alpha=5.0)["dense"]
    expected = layers.dense(params, x) + 2.5 * (x @ small["a"]) @ small["b"]
    torch.testing.assert_close(layers.dense(merged, x), expected)


def test_what_is_added_has_the_rank():
    params = alive()
    merged = lora.merge(params, random_lora(params, rank=4))
    change = (merged["head"]["kernel"] - params["head"]["kernel"]).double()
    singular = torch.linalg.svdvals(change)
    assert (singular > 1e-5 * singular[0]).sum() == 4


def loss(small: dict, params: dict, alpha: float = 8.0) -> torch.Tensor:
    logits = vitfn.apply(lora.merge(params, small, alpha), images(), SMALL)
    return torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]))


def test_at_first_every_b_has_a_gradient_and_no_a_has():
    params = alive()
    for path, grad in tree.flatten(torch.func.grad(loss)(lora.init(params), params)).items():
        assert grad.any() == path.endswith("/b"), path


def test_gradients_are_those_of_the_kernels_through_the_product():
    params, alpha, rank = alive(), 12.0, 4
    small = random_lora(params, rank)
    merged = lora.merge(params, small, alpha)
    of_kernels = tree.flatten(torch.func.grad(lambda p: loss({}, p))(merged))
    grads, flat = tree.flatten(torch.func.grad(loss)(small, params, alpha)), tree.flatten(small)
    for path in (f"{ATTENTION}/query/kernel", f"{ATTENTION}/out/kernel", f"{MLP}/Dense_0/kernel", "embedding/kernel"):
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        whole = of_kernels[path].reshape(len(a), b.shape[1])
        torch.testing.assert_close(grads[f"{path}/a"], alpha / rank * whole @ b.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads[f"{path}/b"], alpha / rank * a.T @ whole, rtol=1e-4, atol=1e-6)


def test_an_a_is_a_function_of_seed_and_path_alone():
    short, long = (lora.init(vitfn.init(vitfn.get_config("ViT-Nano_8", num_layers=n)), seed=3) for n in (1, 2))
    short, long = tree.flatten(short), tree.flatten(long)
    assert short.keys() < long.keys()
    assert all(torch.equal(leaf, long[path]) for path, leaf in short.items())
    first, second = (
        long[f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/query/kernel/a"] for i in (0, 1)
    )
    assert not torch.equal(first, second)
    other = tree.flatten(lora.init(vitfn.init(vitfn.get_config("ViT-Nano_8", num_layers=1)), seed=4))
    assert not any(torch.equal(leaf, other[path]) for path, leaf in short.items() if path.endswith("/a"))


def test_an_a_has_variance_one_over_its_inputs():
    small = lora.init({"dense": {"kernel": torch.zeros(400, 300)}}, rank=100, targets=EVERY)["dense"]["kernel"]
    assert small["a"].mean().abs() < 4 / math.sqrt(400 * 40_000)
    assert abs(small["a"].var() * 400 - 1) < 0.04
    assert not small["b"].any()


def test_matrices_have_the_dtype_of_their_kernel():
    small = lora.init(tree.to(vitfn.init(SMALL), torch.bfloat16))
    assert {leaf.dtype for leaf in tree.leaves(small)} == {torch.bfloat16}


def test_several_loras_of_one_model_run_at_once_under_vmap():
    params = alive()
    several = [random_lora(params, targets=lora.TARGETS, seed=seed) for seed in range(3)]
    x = images()

    def logits_of(small: dict) -> torch.Tensor:
        return vitfn.apply(lora.merge(params, small), x, SMALL)

    at_once = torch.func.vmap(logits_of)(tree.stack(several))
    for logits, small in zip(at_once, several, strict=True):
        torch.testing.assert_close(
            logits, vitfn.apply(lora.merge(params, small), images(), SMALL), rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_a_compiled_gradient_is_the_eager_one():
    params = alive()
    small = random_lora(params, targets=lora.TARGETS)

    def step(small: dict) -> dict:
        def squares(small: dict) -> torch.Tensor:
            leaves = tree.leaves(lora.merge(params, small))
            return sum((leaf**2).sum() for leaf in leaves)

        return torch.func.grad(squares)(small)

    compiled = torch.compile(step, fullgraph=True)(small)
    for path, grad in tree.flatten(step(small)).items():
        torch.testing.assert_close(tree.flatten(compiled)[path], grad, rtol=1e-5, atol=1e-5)


def test_of_a_vit_b_16_the_default_is_less_than_a_hundredth():
    found = vitfn.shapes(vitfn.get_config("ViT-B_16", num_classes=10))
    own, all_of_it = (sum(map(math.prod, shapes.values())) for shapes in (lora.shapes(found), found))
    assert own == 12 * 2 * (768 * 8 + 8 * 768)
    assert (own + 768 * 10 + 10) / all_of_it < 0.01  # with the new head
    assert own / all_of_it < 0.0035


@pytest.mark.parametrize("name", ["ViT-Nano_8", "R26+ViT-S_32", "mu/16"])
def test_shapes_are_those_that_init_makes(name):
    config = vitfn.get_config(name, image_size=32, num_classes=10, classifier="map", num_layers=1)
    params = vitfn.init(config)
    made = tree.flatten(lora.init(params, 2, targets=EVERY))
    assert {path: tuple(leaf.shape) for path, leaf in made.items()} == lora.shapes(vitfn.shapes(config), 2, EVERY)
    kernels = [path for path in vitfn.shapes(config) if path.endswith("kernel")]
    assert list(made) == [f"{path}/{name}" for path in kernels for name in "ab"]


def assert_merged_file(config: vitfn.ViTConfig, params: dict, small: dict, path) -> None:
    merged, x = lora.merge(params, small), torch.randn(1, 3, *config.image_hw)
    vitfn.save(path, merged, config)
    with torch.no_grad():
        expected, found = vitfn.apply(merged, x, config), vitfn.apply(vitfn.load(path), x, config)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.allclose(expected, vitfn.apply(params, x, config), rtol=1e-2)  # the file has what was learnt


def test_a_merged_file_gives_the_logits_of_the_two_together(tmp_path):
    params = alive()
    assert_merged_file(SMALL, params, random_lora(params), tmp_path / "merged.npz")


@pytest.mark.slow
def test_a_merged_vit_b_16_gives_the_logits_of_the_two_together(tmp_path):
    config = vitfn.get_config("ViT-B_16", num_classes=10)
    params = vitfn.init(config)
    params["head"]["kernel"].normal_(0, 0.1)
    assert_merged_file(config, params, random_lora(params, 8, lora.TARGETS), tmp_path / "merged.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"^rank: found 0, expected at least 1$"),
        ({"targets": "query"}, r"^targets: found 'query', which matches no kernel's path, expected one like "),
        ({"targets": ".*/bias"}, r"^targets: found '\.\*/bias', which matches no kernel's path"),
    ],
)
def test_what_adapts_nothing_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        lora.init(vitfn.init(SMALL), **arguments)


def test_another_model_s_lora_is_refused():
    small = lora.init(vitfn.init(SMALL))
    deeper, wider = (vitfn.get_config("ViT-Nano_8", **fields) for fields in ({"num_layers": 1}, {"num_layers": 3}))
    with pytest.raises(InputError, match=r"encoderblock_1/.* expected a kernel of the model$") as error:
        lora.merge(vitfn.init(deeper), tree.unflatten(tree.select(small, ".*encoderblock_1.*")))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"of 48 inputs and 48 outputs, expected a kernel of shape \(64, 4, 16\)$"):
        lora.merge(vitfn.init(wider), small)
