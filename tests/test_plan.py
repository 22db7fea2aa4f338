"""The tables of docs/scaling.md against the bytes of tensors that real steps keep alive."""

import dataclasses
import functools
import importlib.util
import json
import math
import sys
import weakref

import pytest
import torch
from conftest import ROOT
from test_parallel import launched
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import vitfn
from vitfn import layers, losses, meshes, parallel, step, tree, vit
from vitfn.device import DEVICES

_spec = importlib.util.spec_from_file_location("plan", ROOT / "benchmarks" / "plan.py")
plan = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plan)


class Counted(TorchDispatchMode):
    """Bytes of the storages alive, `now` and at the `peak`, of tensors given to `add` and of what operators return."""

    def __init__(self, *given):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        self.add(given)

    def add(self, tensors) -> None:
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._seen:
                storage = leaf.untyped_storage()  # the object lives as long as the memory: torch keeps one for each
                freed = functools.partial(self._freed, storage._cdata, storage.nbytes())
                self._seen[storage._cdata] = weakref.ref(storage, freed)
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int, _) -> None:
        del self._seen[key]
        self.now -= size

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.add(result)
        return result


def batch_of(config, size: int):
    return torch.zeros(size, config.channels, *config.image_hw), torch.zeros(size, dtype=torch.int64)


def counted_step(config, size: int, optimizer: str = "SGD", precision: str = "float32", mesh=meshes.ONE):
    """(parameters, state, activations at the end of forward, peak), in bytes, counted in one eager train step."""
    make = {"SGD": vitfn.sgd, "AdamW": vitfn.adamw}[optimizer](vitfn.warmup_cosine(0.03, 10, 1))
    params = vit.init(config, 0, mesh.place)
    state, batch = vitfn.TrainState(0, params, make.init(mesh.updated(params))), batch_of(config, size)
    del params
    params, opt_state = (tree.map(meshes.local, leaves) for leaves in (state.params, state.opt_state))
    counter, after_forward = Counted(params, opt_state, batch), []
    held = Counted(params).now, Counted(opt_state).now
    del params, opt_state
    before = counter.now

    def loss(*arguments):
        value = losses.softmax(*arguments)
        after_forward.append(counter.now - before)
        return value

    train_step = vitfn.make_train_step(config, make, loss=loss, compile="off", precision=precision, mesh=mesh)
    with counter:
        train_step(state, batch)
    return *held, after_forward[0], counter.peak


def counted_backward(config, size: int, recompute: bool, dtype: torch.dtype | None = None):
    """(the most at the end of forward or within it, the most of forward and backward), beside parameters and images."""
    params, (images, labels) = vitfn.init(config), batch_of(config, size)

    def block(params, x, config, keys, taps, branches):
        fused = functools.partial(layers.block, fused=True)
        if not recompute:
            return fused(params, x, config)
        return checkpoint(fused, params, x, config, use_reentrant=False, preserve_rng_state=False)

    def loss(params):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = vit.forward(params, images, config, block=block).float()
        value = losses.softmax(logits, labels).mean()
        kept.append(counter.now - before)
        return value

    counter, kept = Counted(params, images, labels), []
    before = counter.now
    with counter:
        step.grad_and_value(loss)(params)
    return kept[0], counter.peak - before


def test_the_counter_counts_each_storage_once_and_while_it_lives():
    given = torch.zeros(100)
    with Counted(given, given[3:]) as counter:
        other = given[:50] + 1
        view = other[2:]
        del other
        assert (counter.now, counter.peak) == (600, 600)
        del view
        assert (counter.now, counter.peak) == (400, 600)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "size"),
    [("Ti/16", 2), ("Ti/16", 8), ("S/16", 2), slow("S/16", 8), slow("B/16", 1), slow("B/16", 4)],
)
def test_a_step_s_memory_is_the_table_s(model, size):
    config = vitfn.get_config(model)
    params, state, activations, peak = counted_step(config, size)
    expected = plan.memory(config, size)
    assert (expected.params, expected.state) == (params, state)
    assert expected.activations == pytest.approx(activations, rel=0.001)
    assert expected.peak == pytest.approx(peak, rel=0.01)


def test_adamw_holds_more():
    config = vitfn.get_config("Ti/16", num_layers=2)
    params, state, _, peak = counted_step(config, 1, "AdamW")
    expected = plan.memory(config, 1, optimizer="AdamW")
    assert (expected.params, expected.state + 8) == (params, state)  # its count
    assert expected.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [2, 32])
def test_half_precision_keeps_copies_of_kernels_and_of_a_norm_s_output(size, recompute):
    """Of 2 images the copies of kernels are the most, of 32 the activations."""
    config = vitfn.ViTConfig(image_size=64, hidden_size=64, num_layers=8, num_heads=2, mlp_dim=512, num_classes=10)
    kept, peak = counted_backward(config, size, recompute, torch.bfloat16)
    expected = plan.memory(config, size, half=True, recompute=recompute).activations
    if recompute:
        expected -= plan.block_activations(config, size, True) + plan.kernel_copies(config, True)
    assert expected == pytest.approx(kept, rel=0.02)
    assert plan.backward_bytes(config, size, True, recompute) == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(
    ("model", "size", "recompute"),
    [
        ("Ti/16", 2, True),
        slow("Ti/16", 32, True),
        ("S/16", 2, True),
        slow("S/16", 8, True),
        slow("B/16", 1, True),
        slow("B/16", 4, True),
        slow("B/16", 4, False),
    ],
)
def test_blocks_keep_what_they_need_or_if_recomputed_their_inputs(model, size, recompute):
    config = vitfn.get_config(model)
    kept, peak = counted_backward(config, size, recompute)
    expected = plan.activations(config, size, False, recompute)
    if recompute:
        expected -= plan.block_activations(config, size, False)
    assert expected == pytest.approx(kept, rel=0.01)
    assert plan.backward_bytes(config, size, False, recompute) == pytest.approx(peak, rel=0.04)


def test_parts_are_those_that_vitfn_cuts():
    config = vitfn.get_config("B/16")
    for ranks in (4, 32):
        kernels = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 16 * 16 * 3 * 768 + 197 * 768  # and positions
        head = 768 * 1000  # 768 is a multiple of both
        assert plan.cut_bytes(config, ranks) == 4 * (kernels + head)
        vectors = plan.parameter_bytes(config) - plan.cut_bytes(config, ranks)
        assert plan.share_bytes(config, ranks) == vectors + 4 * (kernels + head) // ranks
    assert plan.cut_bytes(config, 7) == 0


def test_rings_send_what_they_must():
    """A ring's rank sends (n - 1) / n of an array to gather or to scatter it, and both to sum it."""
    config = vitfn.get_config("B/16")
    whole, cut = plan.parameter_bytes(config), plan.cut_bytes(config, 4)
    rest = 2 * (whole - cut) * 3 / 4
    assert plan.sent_bytes(config, "replicated", 4) == pytest.approx(2 * whole * 3 / 4)
    assert plan.sent_bytes(config, "optimizer", 4) == pytest.approx(2 * cut * 3 / 4 + rest)
    assert plan.sent_bytes(config, "sharded", 4) == pytest.approx(3 * cut * 3 / 4 + rest)
    assert plan.sent_bytes(config, "sharded", 4, half=True) == pytest.approx(2 * cut * 3 / 4 + rest)
    twice = 3 * cut * 3 / 4 + 2 * (cut / 4) * 1 / 2 + 2 * (whole - cut) * 7 / 8
    assert plan.sent_bytes(config, "sharded", 4, copies=2) == pytest.approx(twice)


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    config = vitfn.get_config("L/16", dropout_rate=0)
    size = plan.largest_batch(config, 16, optimizer="AdamW", half=True)
    fits = [plan.memory(config, images, optimizer="AdamW", half=True).peak <= 14.4e9 for images in (size, 2 * size)]
    assert fits == [True, False]
    assert plan.largest_batch(vitfn.get_config("G/14"), 16) == 0


def test_the_document_has_the_script_s_tables():
    _, tables, _ = (ROOT / "docs" / "scaling.md").read_text().split("<!-- plan -->")
    assert tables.strip() == plan.tables(), "run PYTHONPATH=. python benchmarks/plan.py"


# model, image size, images of each rank, mesh, placement, optimizer, precision, whether collectives overlap
MESHES = [
    "Ti/16|224|1|data=2|replicated|SGD|float32|yes",
    "Ti/16|224|1|shard=2|optimizer|AdamW|float32|",
    "Ti/16|224|1|shard=2|sharded|SGD|float32|yes",
    "Ti/16|224|4|shard=2|sharded|AdamW|float32|",
    "Ti/16|64|24|shard=2|sharded|SGD|bfloat16|yes",
]


@pytest.mark.slow
def test_each_rank_of_a_mesh_holds_what_the_table_says():
    done = launched(ROOT, 2, __file__, *MESHES)
    for case, line in zip(MESHES, done.stdout.splitlines(), strict=True):
        (params, state, activations, peak), expected = json.loads(line)
        assert expected[:2] == [params, pytest.approx(state, abs=8)], case  # AdamW's count
        assert expected[2] == pytest.approx(activations, rel=0.01), case
        assert expected[3] == pytest.approx(peak, rel=0.06), case


def main(*cases: str) -> None:
    """One rank of a mesh: for each case the first prints what was counted, and what the table says."""
    torch.set_num_threads(1)
    with parallel.joined(parallel.from_environment(), DEVICES["cpu"]) as ranks:
        for case in cases:
            model, side, size, axes, placement, optimizer, precision, overlaps = case.split("|")
            DEVICES["cpu"] = dataclasses.replace(DEVICES["cpu"], overlaps=bool(overlaps))
            config = vitfn.get_config(model, image_size=int(side))
            mesh = meshes.make(axes, placement, ranks, "cpu")
            counted = counted_step(config, int(size), optimizer, precision, mesh)
            expected = plan.memory(
                config,
                int(size),
                optimizer=optimizer,
                half=precision != "float32",
                placement=placement,
                ranks=ranks.count,
                overlaps=bool(overlaps),
            )
            if placement == "optimizer":  # Gloo scatters sums through a copy of everything
                everything = 2 * plan.parameter_bytes(config) + plan.share_bytes(config, ranks.count)
                held = expected.params + expected.state + 4 * math.prod((int(size), 3, *config.image_hw))
                expected = expected._replace(peak=max(expected.peak, held + everything))
            if ranks.first:
                found = (expected.params, expected.state, expected.activations, expected.peak)
                print(json.dumps([counted, found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
