"""Sharded checkpoints: written by several processes, read by any number, whole or not there, gathered into one file."""

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from conftest import SMALL
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import vitfn
from vitfn import convert, device, meshes, optim, parallel, sharded, snapshot, tree, weights
from vitfn.errors import InputError, RunError
from vitfn.parallel import ALONE, Ranks
from vitfn.run import RunDirectory
from vitfn.snapshot import Snapshots
from vitfn.step import TrainState

NOTES = {"evaluated": 7, "best": {"step": 7, "accuracy": 0.1 + 0.2}}


def state_of(step: int, mesh=None, **more) -> TrainState:
    """A state whose numbers are the step's; with a mesh, leaves of every kind that a sharded state has."""
    numbers = torch.Generator().manual_seed(step)

    def leaf(*shape: int, dim: int | None = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        whole = torch.randn(shape, generator=numbers).to(dtype)
        if mesh is None or dim is None:
            return whole
        placements = [Replicate()] * (mesh.ndim - 1) + [Replicate() if dim < 0 else Shard(dim)]
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)

    params = {
        "even": leaf(8, 3),
        "uneven": {"first": leaf(6, 5), "last": leaf(2, 7, dim=1), "one": leaf(1, 2)},  # shares of 0 rows too
        "replicated": leaf(3, 3, dim=-1),
        "plain": leaf(4, dim=None),
        "scalar": leaf(dim=None),
    }
    momentum = {"even": leaf(8, 3, dtype=torch.bfloat16), "uneven": {"first": leaf(6, 5, dtype=torch.bfloat16)}}
    return TrainState(step, params, {"momentum": momentum, "count": torch.tensor(2**40 + step)}, **more)


def whole(leaf: Tensor) -> Tensor:
    return leaf.full_tensor() if meshes.is_cut(leaf) else leaf


def assert_same(found: TrainState, want: TrainState) -> None:
    """The same bits, whatever the two are sharded over; all processes of a mesh have to call it."""
    one, other = (tree.flatten(snapshot._fields(state)) for state in (found, want))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        leaf, expected = whole(leaf), whole(other[name])
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), name
        assert torch.equal(leaf.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def bumped(state: TrainState) -> None:
    """Changes all of a state in place, as training does."""
    for leaf in tree.leaves(snapshot._fields(state)):
        leaf.add_(1)


# --- processes


def run(count: int, function: Callable, *arguments) -> None:
    """`function(ranks, *arguments)` in so many processes, whose errors are the caller's."""
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "torch.distributed.checkpoint", "vitfn"])
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    mp.start_processes(_process, (count, port, function, arguments), nprocs=count, start_method="forkserver")


def _process(rank: int, count: int, port: int, function: Callable, arguments: tuple) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    with parallel.joined(Ranks(rank, count), device.find("cpu")) as ranks:
        function(ranks, *arguments)


def mesh_of(shape: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "shard")[-len(shape) :]) if shape else None


def save(ranks: Ranks, folder: Path, shape: tuple[int, ...], *steps: int) -> None:
    """Saves sharded states, or plain ones where the mesh has no shape."""
    snapshots = Snapshots(folder, 2, ranks)
    for step in steps:
        snapshots.save(state_of(step, mesh_of(shape)), NOTES)
    snapshots.wait()


def load(ranks: Ranks, folder: Path, shape: tuple[int, ...], step: int) -> None:
    """The newest state is that of `step`, on a mesh or plain."""
    found, notes = Snapshots(folder, 2, ranks).latest(state_of(0, mesh_of(shape)))
    for name, leaf in tree.flatten(snapshot._fields(state_of(0, mesh_of(shape)))).items():
        placed = tree.flatten(snapshot._fields(found))[name]
        assert getattr(placed, "placements", None) == getattr(leaf, "placements", None), name
    assert_same(found, state_of(step))
    assert notes == NOTES


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def on_four(ranks: Ranks, folder: Path, step: int) -> None:
    """Whatever lies in the folder is read on three meshes, and written by each."""
    for shape in ((2, 2), (4,), (1, 4)):
        load(ranks, folder, shape, step)
        save(ranks, folder, shape, step := step + 1)


def on_two(ranks: Ranks, folder: Path, step: int) -> None:
    load(ranks, folder, (2,), step)
    save(ranks, folder, (2,), step + 1)


@pytest.mark.slow
@pytest.mark.oldest
def test_4_2_1_and_4_processes_go_on_with_one_another_s_bits(tmp_path):
    save(ALONE, tmp_path, (), 1)
    run(4, on_four, tmp_path, 1)
    run(2, on_two, tmp_path, 4)
    load(ALONE, tmp_path, (), 5)
    save(ALONE, tmp_path, (), 6)
    assert names(tmp_path) == ["step_00000005", "step_00000006.npz"]  # the last two, of both kinds
    run(4, on_four, tmp_path, 6)
    assert names(tmp_path) == ["step_00000008", "step_00000009"]
    load(ALONE, tmp_path, (), 9)


def while_training(ranks: Ranks, folder: Path) -> None:
    gate, write = threading.Event(), sharded.write
    sharded.write = lambda *arguments: (gate.wait(), write(*arguments))
    snapshots, state, notes = Snapshots(folder, 2, ranks), state_of(7, mesh_of((2,))), copy.deepcopy(NOTES)
    snapshots.save(state, notes)
    bumped(state)
    notes["best"]["step"] = 8
    gate.set()
    for number in range(50):  # the groups of training are in use while the others write
        dist.all_reduce(total := torch.tensor(number))
        assert total == 2 * number
        assert ranks.gather(number) == [number] * 2
    snapshots.check()
    snapshots.save(state_of(8, mesh_of((2,))), NOTES)  # waits for the first: there is one copy at a time
    assert len(snapshots._pending) == 1
    assert snapshots.files() == [folder / "step_00000007"]
    snapshots.wait()


@pytest.mark.slow
def test_what_is_saved_is_the_moment_though_training_goes_on(tmp_path):
    run(2, while_training, tmp_path)
    load(ALONE, tmp_path, (), 8)
    shutil.rmtree(tmp_path / "step_00000008")
    load(ALONE, tmp_path, (), 7)


def too_large(ranks: Ranks, folder: Path) -> None:
    snapshots, large = Snapshots(folder, 2, ranks), TrainState(6, {"large": torch.zeros(2, 2**16)}, {})
    snapshots.save(TrainState(5, tree.map(lambda p: distribute_tensor(p, mesh_of((2,))), large.params), {}), NOTES)
    snapshots.wait()
    if ranks.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    snapshots.save(TrainState(6, tree.map(lambda p: distribute_tensor(p, mesh_of((2,))), large.params), {}), NOTES)
    with pytest.raises(RunError, match=r"step 6 could not be written \(process 1: .*step_00000005 is intact") as error:
        snapshots.wait()
    assert "\n" not in str(error.value)
    ranks.max(0)
    assert names(folder) == ["step_00000005"]  # there is room again


@pytest.mark.slow
def test_a_process_that_cannot_write_is_named_by_all(tmp_path):
    run(2, too_large, tmp_path)


def killed(ranks: Ranks, folder: Path, victim: int) -> None:
    """The first before it writes the manifest, or the second before it writes its share."""
    if ranks.rank == victim:
        where, what = ((sharded, "_write_manifest"), (dcp.FileSystemWriter, "write_data"))[victim]
        setattr(where, what, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    save(ranks, folder, (2,), 8)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_what_a_killed_process_leaves_does_not_count_and_is_removed(tmp_path, victim):
    folder = tmp_path / "run" / "checkpoints"
    run(2, save, folder, (2,), 7)
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        run(2, killed, folder, victim)
    assert names(folder) == ["step_00000007", "step_00000008"]
    load(ALONE, folder, (), 7)
    (folder / "step_of_mine").mkdir()
    with RunDirectory(str(tmp_path), "run", resume=True):
        assert names(folder) == ["step_00000007", "step_of_mine"]


def one_rank_finds_it(ranks: Ranks, folder: Path) -> None:
    save(ranks, folder, (2,), 6, 7)
    damaged = sorted((folder / "step_00000007").glob("*.distcp"))[1]
    if ranks.first:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    ranks.max(0)
    load(ranks, folder, (2,), 6)
    save(ranks, folder, (2,), 7)  # in the damaged one's place
    load(ranks, folder, (2,), 7)
    save(ranks, folder, (), 7)  # as a file: of one step there is one
    ranks.max(0)
    assert names(folder) == ["step_00000006", "step_00000007.npz"]
    ranks.max(0)
    with pytest.raises(RunError, match="expected a folder that all of them share"):
        Snapshots(folder / str(ranks.rank) if ranks.first else folder, 2, ranks).latest(state_of(0))


def test_all_processes_choose_the_same_checkpoint(tmp_path):
    run(2, one_rank_finds_it, tmp_path)


# --- one directory, in one process


@pytest.fixture(scope="module")
def whole_one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run(2, save, folder, (2,), 7)
    return folder / "step_00000007"


@pytest.fixture
def written(whole_one, tmp_path) -> Path:
    """A directory of step 7 that may be damaged."""
    return Path(shutil.copytree(whole_one, tmp_path / "checkpoints" / whole_one.name))


def test_a_state_comes_back_bit_for_bit_in_the_memory_of_the_old_one(written):
    like = state_of(0)
    state, notes = snapshot.read(written, like)
    assert_same(state, state_of(7))
    assert notes == NOTES
    assert state.params["even"] is like.params["even"]


def test_a_loss_scale_comes_back_though_a_new_state_has_none(tmp_path):
    run(1, save_scaled, tmp_path)
    state, _ = snapshot.read(tmp_path / "step_00000007", state_of(0))
    assert state.scaling == {"scale": torch.tensor(1024.0), "good": torch.tensor(3)}


def save_scaled(ranks: Ranks, folder: Path) -> None:
    dist.init_process_group("gloo")
    snapshots = Snapshots(folder, 2, ranks)
    scales = {"scale": torch.tensor(1024.0), "good": torch.tensor(3)}
    snapshots.save(state_of(7, mesh_of((1,)), scaling=scales), {})
    snapshots.wait()


def test_300_mutations_are_refused_in_one_line_or_change_nothing(whole_one, written):
    numbers, refused = random.Random(0), 0
    for _ in range(300):
        path = numbers.choice(sorted(written.iterdir()))
        data = bytearray(path.read_bytes())
        if (kind := numbers.random()) < 0.1:
            path.unlink()
        elif kind < 0.3:
            path.write_bytes(data[: numbers.randrange(len(data))])
        else:
            for _ in range(numbers.choice((1, 1, 8))):
                data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
            path.write_bytes(data)
        try:
            state, notes = snapshot.read(written, state_of(0))
        except InputError as error:
            refused += str(written) in str(error)
        else:
            assert_same(state, state_of(7))
            assert notes == NOTES
        shutil.copy(whole_one / path.name, path)
    assert refused > 290  # the rest are spaces of the manifest


def test_without_a_manifest_it_is_no_checkpoint(written):
    (written / "manifest.json").unlink()
    assert Snapshots(written.parent, 2).latest(state_of(0)) is None


def test_behind_a_damaged_one_an_older_one_of_another_kind_is_found_with_a_warning(written, caplog):
    snapshot.write(written.parent / "step_00000006.npz", snapshot._fields(state_of(6)), NOTES)
    (written / ".metadata").unlink()
    load(ALONE, written.parent, (), 6)
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert "step_00000007/.metadata: expected a file of the checkpoint, found: No such file" in caplog.text


class Hostile:
    """What a pickle does that is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def resealed(folder: Path, change: Callable[[dict], Any] = lambda content: None) -> None:
    """Makes all checksums right again, after a change of the manifest's content."""
    content = json.loads((folder / "manifest.json").read_text())["content"]
    for name in content["files"]:
        content["files"][name] = sharded._size_and_checksum(folder / name)
    change(content)
    sharded._write_manifest(folder, content)


def test_resealing_changes_nothing(written):
    before = (written / "manifest.json").read_bytes()
    resealed(written)
    assert (written / "manifest.json").read_bytes() == before


def test_no_pickle_is_run(written, tmp_path):
    """Not with all checksums right: the metadata are not read, and tensors with weights_only."""
    (written / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    resealed(written)
    assert_same(snapshot.read(written, state_of(0))[0], state_of(7))
    torch.save(Hostile(tmp_path / "ran"), written / "__0_0.distcp")
    length = (written / "__0_0.distcp").stat().st_size

    def points_to_it(content: dict) -> None:
        for leaf in content["leaves"].values():
            for chunk in leaf["chunks"]:
                chunk[2:] = ["__0_0.distcp", 0, length]

    resealed(written, points_to_it)
    with pytest.raises(InputError, match="Weights only load failed"):
        snapshot.read(written, state_of(0))
    assert not (tmp_path / "ran").exists()
    pickle.loads((written / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


def changed(name: str, *path_and_value: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        *path, last, value = path_and_value
        node = content["leaves"][name]
        for step in path:
            node = node[step]
        node[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("params/even", "chunks", 0, 2, "../manifest.json"),
        changed("params/even", "chunks", 0, 2, "/etc/passwd"),
        changed("params/even", "chunks", 0, 3, -1),
        changed("params/even", "chunks", 0, 4, 10**9),
        changed("params/even", "chunks", 0, 0, [0, 1]),
        changed("params/even", "chunks", 0, 1, [3, 3]),
        changed("params/even", "chunks", []),
        changed("params/even", "shape", [10**9, 10**9]),
        changed("params/even", "shape", ["a"]),
        changed("params/even", "dtype", "compile"),
        changed("params/even", "dtype", "float64"),
        lambda content: content["files"].update({"../step_00000007/.metadata": [0, 0]}),
        lambda content: content.pop("leaves"),
        lambda content: content.update(leaves=[]),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(written, change):
    resealed(written, change)
    with pytest.raises(InputError, match="manifest"):
        snapshot.read(written, state_of(0))


def without(name: str) -> TrainState:
    return TrainState(0, {path: leaf for path, leaf in state_of(0).params.items() if path != name}, {})


@pytest.mark.parametrize(
    ("like", "parts"),
    [
        (without("even"), ["another model or optimizer", "opt_state/"]),
        (
            TrainState(0, state_of(0).params | {"plain": torch.zeros(5)}, state_of(0).opt_state),
            ["plain", "(4,)", "(5,)"],
        ),
        (
            TrainState(0, state_of(0).params, state_of(0).opt_state | {"count": torch.tensor(0.0)}),
            ["opt_state/count", "int64", "float32"],
        ),
    ],
)
def test_the_state_of_something_else_is_refused_by_name(written, like, parts):
    with pytest.raises(InputError) as refusal:
        snapshot.read(written, like)
    for part in (str(written), *parts):
        assert part in str(refusal.value)


# --- gathered into one file


def model_state(mesh=None, average: bool = True) -> TrainState:
    """A state of the small model, as a run has it, of which the head is trained."""
    params = vitfn.init(SMALL, seed=1)
    rules = optim.Rules(frozen="(?!head/).*")
    optimizer = vitfn.sgd(lambda step: 0.1, rules=rules)
    optimizer = optim.with_ema(optimizer, 0.9) if average else optimizer
    opt_state = optimizer.init(params)
    for leaf in tree.leaves(opt_state):
        leaf.add_(0.5)
    if mesh:
        params, opt_state = (
            tree.map(lambda p: distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None), leaves)
            for leaves in (params, opt_state)
        )
    return TrainState(3, params, opt_state)


MODEL = {"config": dataclasses.asdict(SMALL), "class_names": [f"class {i}" for i in range(10)]}


def save_model(ranks: Ranks, folder: Path, sharded: bool) -> None:
    snapshots = Snapshots(folder, 2, ranks)
    snapshots.save(model_state(mesh_of((2,)) if sharded else None), {"model": MODEL})
    snapshots.wait()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same state in both kinds of checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    run(2, save_model, folder / "sharded", True)
    save_model(ALONE, folder / "plain", False)
    return {"sharded": folder / "sharded" / "step_00000003", "plain": folder / "plain" / "step_00000003.npz"}


@pytest.mark.parametrize("kind", ["sharded", "plain"])
def test_a_checkpoint_becomes_the_file_that_the_run_would_write(checkpoints, kind, tmp_path, capsys):
    state = model_state()
    averaged = optim.averaged(state.params, state.opt_state)
    weights.save_npz(tmp_path / "want.npz", averaged, SMALL, MODEL["class_names"])
    assert convert.main(["convert", str(checkpoints[kind]), str(tmp_path / "model.npz")]) == 0
    assert (tmp_path / "model.npz").read_bytes() == (tmp_path / "want.npz").read_bytes()
    assert "small, 32x32 px, 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sharded", "plain"])
def test_a_checkpoint_is_read_as_any_file_of_weights(checkpoints, kind, tmp_path):
    state = model_state()
    averaged = tree.flatten(optim.averaged(state.params, state.opt_state))
    for path, leaf in tree.flatten(vitfn.load(checkpoints[kind])).items():
        assert torch.equal(leaf, averaged[path]), path
    out = str(tmp_path / "model.safetensors")
    assert convert.main(["convert", str(checkpoints[kind]), out, "--to=timm", "--num_classes=3"]) == 0
    assert weights.describe(out).config.num_classes == 3


def test_one_that_is_incomplete_or_damaged_is_refused_in_one_line(checkpoints, tmp_path, capsys):
    folder = Path(shutil.copytree(checkpoints["sharded"], tmp_path / "step_00000003"))
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    for found in (f"{data}: found", f"{folder}: found a folder without weights"):
        assert convert.main(["convert", str(folder), str(tmp_path / "model.npz")]) == 2
        error = capsys.readouterr().err
        assert found in error
        assert error.count("\n") == 1
        (folder / "manifest.json").unlink(missing_ok=True)
    assert not (tmp_path / "model.npz").exists()


LARGE = dataclasses.replace(SMALL, hidden_size=512, mlp_dim=2048, num_heads=8, num_layers=16)  # 202 MB


def save_large(ranks: Ranks, folder: Path) -> None:
    """And each process needs for it one copy of its share."""
    mesh = mesh_of((2,))
    params = tree.map(lambda p: distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None), vitfn.init(LARGE, seed=1))
    snapshots = Snapshots(folder, 2, ranks)
    share = sum(leaf.to_local().nbytes for leaf in tree.leaves(params))

    def save() -> None:
        snapshots.save(TrainState(3, params, {}), {})
        snapshots.wait()

    grown = peak(save)
    print(f"saving {share / 1e6:.0f} MB took {grown / 1e6:.0f} MB")
    assert grown < 1.3 * share


def peak(function: Callable[[], None]) -> int:
    """The bytes by which a process grows at most while the function runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak up to now is forgotten
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def convert_large(ranks: Ranks, source: Path, destination: Path) -> None:
    size = sum(4 * leaf.numel() for leaf in tree.leaves(vitfn.init(LARGE, seed=1)))
    grown = peak(lambda: convert.main(["convert", str(source), str(destination)]))
    print(f"converting {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB")
    assert grown < 0.3 * size
    params = tree.flatten(vitfn.init(LARGE, seed=1))
    assert all(torch.equal(leaf, params[path]) for path, leaf in tree.flatten(vitfn.load(destination)).items())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux")
def test_neither_saving_nor_gathering_takes_the_memory_of_the_whole(tmp_path):
    run(2, save_large, tmp_path)
    run(1, convert_large, tmp_path / "step_00000003", tmp_path / "model.npz")
