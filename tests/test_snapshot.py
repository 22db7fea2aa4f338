"""Snapshots: what is written is read, what is damaged is noticed, the last few are kept, failures surface."""

import random
import shutil
import threading
import zipfile

import pytest
import torch

from vitfn import scaling, snapshot, tree
from vitfn.errors import InputError, RunError
from vitfn.snapshot import Snapshots
from vitfn.step import TrainState

NOTES = {"evaluated": 7, "best": {"step": 7, "accuracy": 0.1 + 0.2}}


def state_of(step: int, value: float = 0.5, **more) -> TrainState:
    """A state with leaves of every dtype and number of axes that states have."""
    params = {
        "head": {"kernel": torch.full((3, 2), value), "bias": torch.tensor([1.0, -0.0])},
        "cls": torch.tensor(2.0),
    }
    momentum = {"head": {"kernel": torch.full((3, 2), value, dtype=torch.bfloat16)}}
    return TrainState(step, params, {"momentum": momentum, "count": torch.tensor(2**40 + step)}, **more)


def assert_same(found: TrainState, want: TrainState) -> None:
    one, other = (tree.flatten(snapshot._fields(state)) for state in (found, want))
    assert list(one) == list(other)
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype, name
        assert leaf.shape == other[name].shape, name
        bits = (
            torch.int16 if leaf.dtype == torch.bfloat16 else torch.int32 if leaf.dtype == torch.float32 else leaf.dtype
        )
        assert torch.equal(leaf.view(bits), other[name].view(bits)), name


@pytest.fixture
def written(tmp_path):
    """The path of a snapshot of step 7."""
    path = tmp_path / "step_00000007.npz"
    snapshot.write(path, snapshot._fields(state_of(7)), NOTES)
    return path


# --- one file


def test_a_state_comes_back_bit_for_bit(written):
    state, notes = snapshot.read(written, state_of(0))
    assert_same(state, state_of(7))
    assert notes == NOTES


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-45])
def test_numbers_that_are_not_ordinary_come_back_too(tmp_path, special):
    snapshot.write(tmp_path / "s.npz", snapshot._fields(state_of(1, special)), {})
    assert_same(snapshot.read(tmp_path / "s.npz", state_of(0))[0], state_of(1, special))


def test_the_same_state_gives_the_same_bytes(written, tmp_path):
    snapshot.write(tmp_path / "again.npz", snapshot._fields(state_of(7)), NOTES)
    assert (tmp_path / "again.npz").read_bytes() == written.read_bytes()


def test_leaves_own_aligned_memory(written):
    state, _ = snapshot.read(written, state_of(0))
    for leaf in tree.leaves(snapshot._fields(state)):
        assert leaf.data_ptr() % 64 == 0
        leaf += 1  # is writable
    assert_same(snapshot.read(written, state_of(0))[0], state_of(7))  # and none of it is the file's


def test_a_loss_scale_comes_back_though_a_new_state_has_none(tmp_path):
    scales = {"scale": torch.tensor(1024.0), "good": torch.tensor(3)}
    assert scales.keys() == scaling.init(torch.device("cpu")).keys()
    snapshot.write(tmp_path / "s.npz", snapshot._fields(state_of(1, scaling=scales)), {})
    assert_same(snapshot.read(tmp_path / "s.npz", state_of(0))[0], state_of(1, scaling=scales))


def test_every_member_has_a_checksum_that_unzip_can_check(written):
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
        assert {info.filename for info in archive.infolist()} >= {"step.npy", "params/head/kernel.npy", "notes.npy"}


def test_500_mutations_are_refused_or_change_nothing(written, tmp_path):
    whole, path = written.read_bytes(), tmp_path / "mutated.npz"
    numbers, refused = random.Random(0), 0
    for _ in range(500):
        data = bytearray(whole)
        if numbers.random() < 0.2:
            del data[numbers.randrange(len(data)) :]
        else:
            for _ in range(numbers.choice((1, 1, 1, 8))):
                data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
        path.write_bytes(data)
        try:
            state, notes = snapshot.read(path, state_of(0))
        except InputError:
            refused += 1
        else:
            assert_same(state, state_of(7))
            assert notes == NOTES
    assert refused > 300  # the rest are dates, versions and padding


def renamed(state: TrainState) -> TrainState:
    return TrainState(state.step, {"tail": state.params["head"], "cls": state.params["cls"]}, state.opt_state)


@pytest.mark.parametrize(
    ("like", "parts"),
    [
        (renamed(state_of(0)), ["another model or optimizer", "params/"]),
        (TrainState(0, state_of(0).params, {"momentum": {}}), ["another model or optimizer", "opt_state/count"]),
        (
            TrainState(0, state_of(0).params | {"cls": torch.zeros(1)}, state_of(0).opt_state),
            ["params/cls", "()", "(1,)"],
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


# --- several files


@pytest.fixture
def snapshots(tmp_path) -> Snapshots:
    return Snapshots(tmp_path / "checkpoints", keep=2)


def names(snapshots: Snapshots) -> list[str]:
    return sorted(path.name for path in snapshots.folder.iterdir())


@pytest.fixture
def three(snapshots):
    """A folder in which steps 1 to 3 were saved and the last two are left."""
    for step in (1, 2, 3):
        snapshots.save(state_of(step), {"step": step})
    snapshots.wait()
    return snapshots


def test_the_last_ones_are_kept_and_the_newest_is_found(three):
    assert names(three) == ["step_00000002.npz", "step_00000003.npz"]
    state, notes = three.latest(state_of(0))
    assert_same(state, state_of(3))
    assert notes == {"step": 3}


def test_steps_are_numbers_not_names(snapshots):
    for step in (99_999_999, 100_000_000):
        snapshots.save(state_of(step), {})
    snapshots.wait()
    assert int(snapshots.latest(state_of(0))[0].step) == 100_000_000


def test_where_there_are_none_there_is_none(snapshots):
    assert snapshots.latest(state_of(0)) is None


def damage(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_behind_a_damaged_one_the_one_before_is_found_with_a_warning(three, caplog):
    damage(three.files()[0])
    assert_same(three.latest(state_of(0))[0], state_of(2))
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert "step_00000003.npz" in caplog.text


def test_all_damaged_is_an_error(three):
    for path in three.files():
        damage(path)
    with pytest.raises(RunError, match="2 checkpoints, none of which can be read"):
        three.latest(state_of(0))


def test_a_damaged_one_does_not_push_out_a_whole_one(three):
    """Had it counted as the newest, a run that goes on from step 1 would lose what it saves."""
    shutil.copy(three.files()[1], three.folder / "step_00000001.npz")
    for path in three.files()[:2]:
        damage(path)
    three.save(state_of(2), {})
    three.wait()
    assert names(three) == ["step_00000001.npz", "step_00000002.npz"]
    assert_same(three.latest(state_of(0))[0], state_of(2))


def test_what_is_saved_is_the_moment_though_writing_takes_place_later(snapshots):
    gate, state, notes = threading.Event(), state_of(4), {"best": {"step": 1}}
    snapshots.submit(gate.wait, "nothing")
    snapshots.save(state, notes)
    state.params["cls"].zero_()
    notes["best"]["step"] = 2
    assert not snapshots.folder.exists()
    gate.set()
    snapshots.wait()
    found, written_notes = snapshots.latest(state_of(0))
    assert_same(found, state_of(4))
    assert written_notes == {"best": {"step": 1}}


def test_files_are_written_in_order_and_at_most_one_waits(snapshots):
    gate, order = threading.Event(), []
    snapshots.submit(lambda: (gate.wait(), order.append(1)), "1")
    snapshots.submit(lambda: order.append(2), "2")
    threading.Timer(0.1, gate.set).start()
    snapshots.submit(lambda: order.append(3), "3")  # waits for the first
    assert order[:1] == [1]
    snapshots.wait()
    assert order == [1, 2, 3]


@pytest.mark.parametrize("surface", ["check", "wait"])
def test_a_write_that_failed_is_said_at_the_next_call(three, monkeypatch, surface):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "write", full)
    three.save(state_of(4), {})
    three.close()
    with pytest.raises(RunError) as error:
        getattr(three, surface)()
    for part in ("step 4", "No space left", "step_00000003.npz is intact", "--resume"):
        assert part in str(error.value)
    three.check()  # it is said once
    assert_same(three.latest(state_of(0))[0], state_of(3))


def test_another_error_surfaces_as_it_is(snapshots):
    snapshots.submit(lambda: 1 / 0, "nothing")
    with pytest.raises(ZeroDivisionError):
        snapshots.wait()


def test_a_file_in_the_folder_s_place_is_said(snapshots):
    snapshots.folder.write_text("")
    snapshots.save(state_of(1), {})
    with pytest.raises(RunError, match=r"step 1 could not be written.*there is none before it"):
        snapshots.wait()
