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
from test_parallel import together
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitfn
from vitfn import losses, meshes, optim, parallel, plan, tree, vit
from vitfn.device import DEVICES
from vitfn.remat import KINDS

_spec = importlib.util.spec_from_file_location("plan_script", ROOT / "benchmarks" / "plan.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


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


def counted_step(config, size, optimizer="sgd", precision="float32", remat="none", parts=1, mesh=meshes.ONE, ema=False):
    """(parameters, state, kept at the end of the last forward, the most of forward and backward, peak), in bytes.

    Counted in one eager train step with weight decay; all but the first two and the last beside parameters, state and
    images.
    """
    make = getattr(vitfn, optimizer)(vitfn.warmup_cosine(0.03, 10, 1), weight_decay=0.1)
    make = optim.with_ema(make, 0.9) if ema else make
    params = vit.init(config, 0, mesh.place)
    state, batch = vitfn.TrainState(0, params, make.init(mesh.updated(params))), batch_of(config, size)
    del params
    params, opt_state = (tree.map(meshes.local, leaves) for leaves in (state.params, state.opt_state))
    counter, after_forward, in_backward = Counted(params, opt_state, batch), [], []
    held = Counted(params).now, Counted(opt_state).now
    del params, opt_state
    before = counter.now

    def loss(*arguments):
        value = losses.softmax(*arguments)
        after_forward.append(counter.now - before)
        return value

    def schedule(step):  # is asked for when backward is over
        in_backward.append(counter.peak - before)
        return vitfn.warmup_cosine(0.03, 10, 1)(step)

    train_step = vitfn.make_train_step(
        config,
        make._replace(schedule=schedule),
        loss=loss,
        compile="off",
        precision=precision,
        remat=remat,
        accumulation_steps=parts,
        mesh=mesh,
    )
    with counter:
        train_step(state, batch)
    return *held, after_forward[-1], in_backward[0], counter.peak


def kept_eagerly(config, size: int, half: bool, remat: str) -> int:
    """What the plan says is kept at the end of forward, less what of the last block an eager step recomputes."""
    again = plan.pooling_activations(config, size, half) if remat != "none" else 0
    again += plan.mlp_activations(config, size, half, 1) if remat == "block" else 0
    return plan.kept(config, size, half, remat)[0] - again


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
SMALL = vitfn.ViTConfig(image_size=64, hidden_size=64, num_layers=8, num_heads=2, mlp_dim=512, num_classes=10)


@pytest.mark.parametrize("remat", KINDS)
@pytest.mark.parametrize(
    ("model", "size"), [("Ti/16", 1), ("Ti/16", 4), slow("S/16", 2), slow("S/16", 8), slow("B/16", 1), slow("B/16", 4)]
)
def test_a_step_s_memory_is_the_plan_s(model, size, remat):
    config = vitfn.get_config(model)
    params, state, kept, backward, peak = counted_step(config, size, remat=remat)
    expected = plan.memory(config, size, remat=remat)
    assert (expected.params, expected.state) == (params, state)
    assert kept_eagerly(config, size, False, remat) == pytest.approx(kept, rel=0.002)
    planned = plan.backward_bytes(config, size, False, remat, gradients=plan.parameter_bytes(config))
    assert planned == pytest.approx(backward, rel=0.02)
    assert expected.peak == pytest.approx(peak, rel=0.01)


def test_adamw_and_an_average_hold_more():
    config = vitfn.get_config("Ti/16", num_layers=2)
    params, state, *_, peak = counted_step(config, 1, "adamw", ema=True)
    expected = plan.memory(config, 1, optimizer="adamw", average=True)
    assert (expected.params, expected.state + 8) == (params, state)  # its count
    assert expected.state == 3 * params
    assert expected.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("remat", KINDS)
@pytest.mark.parametrize("size", [2, 32])
def test_half_precision_keeps_copies_of_kernels_and_of_a_norm_s_output(size, remat):
    """Of 2 images the copies of kernels are the most, of 32 the activations."""
    *_, kept, backward, _ = counted_step(SMALL, size, precision="bfloat16", remat=remat)
    copies = plan.kernel_copies(SMALL, "none" if remat == "none" else "attention")  # autocast's cache has the MLPs'
    copies -= plan.kernel_copies(SMALL, "block") * (remat != "none")
    copies += plan.block_bytes(SMALL, "Dense_./kernel") // 2 * (remat != "none")
    assert kept_eagerly(SMALL, size, True, remat) + copies == pytest.approx(kept, rel=0.02)
    planned = plan.backward_bytes(SMALL, size, True, remat, gradients=plan.parameter_bytes(SMALL))
    assert planned == pytest.approx(backward, rel=0.03)


@pytest.mark.parametrize("remat", KINDS)
def test_later_parts_of_a_batch_compute_beside_the_gradients_of_earlier_ones(remat):
    *_, peak = counted_step(SMALL, 32, remat=remat, parts=4)
    assert plan.memory(SMALL, 8, remat=remat, parts=4).peak == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("remat", KINDS)
@pytest.mark.parametrize("classifier", ["gap", "map"])
def test_with_other_pooling_the_last_block_is_like_the_others(classifier, remat):
    config = dataclasses.replace(SMALL, classifier=classifier)
    *_, kept, _, peak = counted_step(config, 32, remat=remat)
    assert plan.memory(config, 32, remat=remat).peak == pytest.approx(peak, rel=0.02)
    if remat == "none":
        assert plan.activations(config, 32, False) == pytest.approx(kept, rel=0.01)


def test_dropout_keeps_masks():
    config = dataclasses.replace(SMALL, dropout_rate=0.1)
    _, _, kept, *_ = counted_step(config, 16)
    assert plan.activations(config, 16, False) == pytest.approx(kept, rel=0.002)


def test_parts_are_those_that_vitfn_cuts():
    config = vitfn.get_config("B/16")
    for ranks in (4, 32):
        kernels = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 16 * 16 * 3 * 768 + 197 * 768  # and positions
        head = 768 * 1000  # 768 is a multiple of both
        assert plan.cut_bytes(config, script.mesh("sharded", ranks), "sharded") == 4 * (kernels + head)
        vectors = plan.parameter_bytes(config) - 4 * (kernels + head)
        share = vectors + 4 * (kernels + head) // ranks
        assert plan.memory(config, 1, mesh=script.mesh("sharded", ranks)).params == share
        assert plan.memory(config, 1, mesh=script.mesh("optimizer", ranks)).state == share
    assert plan.cut_bytes(config, script.mesh("sharded", 7), "sharded") == 0


def test_rings_send_what_they_must():
    """A ring's rank sends (n - 1) / n of an array to gather or to scatter it, and both to sum it."""
    config = vitfn.get_config("B/16")
    whole, cut = plan.parameter_bytes(config), plan.cut_bytes(config, script.mesh("sharded", 4), "sharded")
    rest = 2 * (whole - cut) * 3 / 4
    assert script.sent_bytes(config, "replicated", 4) == pytest.approx(2 * whole * 3 / 4)
    assert script.sent_bytes(config, "optimizer", 4) == pytest.approx(2 * cut * 3 / 4 + rest)
    assert script.sent_bytes(config, "sharded", 4) == pytest.approx(3 * cut * 3 / 4 + rest)
    assert script.sent_bytes(config, "sharded", 4, half=True) == pytest.approx(2 * cut * 3 / 4 + rest)
    twice = 3 * cut * 3 / 4 + 2 * (cut / 4) * 1 / 2 + 2 * (whole - cut) * 7 / 8
    assert script.sent_bytes(config, "sharded", 4, copies=2) == pytest.approx(twice)


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    config = vitfn.get_config("L/16", dropout_rate=0)
    size = script.largest_batch(config, 16, optimizer="adamw", half=True)
    fits = [plan.memory(config, images, optimizer="adamw", half=True).peak <= 14.4e9 for images in (size, 2 * size)]
    assert fits == [True, False]
    assert script.largest_batch(vitfn.get_config("G/14"), 16) == 0


def test_the_document_has_the_script_s_tables():
    _, tables, _ = (ROOT / "docs" / "scaling.md").read_text().split("<!-- plan -->")
    assert tables.strip() == script.tables(), "run PYTHONPATH=. python benchmarks/plan.py"


# model, image size, images of each rank, mesh, placement, optimizer, precision, whether collectives overlap, remat
MESHES = [
    "Ti/16|224|1|data=2|replicated|sgd|float32|yes|none",
    "Ti/16|224|1|shard=2|optimizer|adamw|float32||none",
    "Ti/16|224|1|shard=2|sharded|sgd|float32|yes|none",
    "Ti/16|224|4|shard=2|sharded|adamw|float32||none",
    "Ti/16|64|24|shard=2|sharded|sgd|bfloat16|yes|none",
    "Ti/16|64|24|shard=2|sharded|sgd|float32|yes|block",
    "Ti/16|224|2|data=2|replicated|adamw|float32|yes|attention",
]


@pytest.mark.slow
def test_each_rank_of_a_mesh_holds_what_the_table_says():
    said = together(ROOT, 2, __file__, *MESHES)
    for case, line in zip(MESHES, said.splitlines(), strict=True):
        (params, state, kept, _, peak), expected = json.loads(line)
        assert expected[:2] == [params, pytest.approx(state, abs=8)], case  # AdamW's count
        assert expected[2] == pytest.approx(kept, rel=0.02), case
        assert expected[3] == pytest.approx(peak, rel=0.08), case


def main(*cases: str) -> None:
    """One rank of a mesh: for each case the first prints what was counted, and what the table says."""
    torch.set_num_threads(1)
    with parallel.joined(parallel.from_environment(), DEVICES["cpu"]) as ranks:
        for case in cases:
            model, side, size, axes, placement, optimizer, precision, overlaps, remat = case.split("|")
            DEVICES["cpu"] = dataclasses.replace(DEVICES["cpu"], overlaps=bool(overlaps))
            config = vitfn.get_config(model, image_size=int(side))
            mesh = meshes.make(axes, placement, ranks, "cpu")
            counted = counted_step(config, int(size), optimizer, precision, remat, 1, mesh)
            expected = plan.memory(
                config,
                int(size),
                optimizer=optimizer,
                half=precision != "float32",
                remat=remat,
                mesh=mesh,
                overlaps=bool(overlaps),
            )
            if placement == "optimizer":  # Gloo scatters sums through a copy of everything
                everything = 2 * expected.params + expected.state // plan.STATE[optimizer]
                held = expected.params + expected.state + 4 * math.prod((int(size), 3, *config.image_hw))
                expected = expected._replace(peak=max(expected.peak, held + everything))
            if ranks.first:
                kept = kept_eagerly(config, int(size), precision != "float32", remat)
                if placement == "sharded":  # the loss is computed while the head is whole
                    kept += plan.parameter_bytes(config, "head/kernel") // (1 if precision == "float32" else 2)
                found = (expected.params, expected.state, kept, expected.peak)
                print(json.dumps([counted, found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    parallel.leave(0)  # as the command does, without the interpreter's own end beside Gloo's threads
