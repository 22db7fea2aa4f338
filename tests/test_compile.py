"""The compile forms: what happens when a compiler fails, and that nothing is compiled twice."""

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, expected, nchw

import vitfn
from vitfn import device, tree
from vitfn.errors import RunError

# A block that is compiled and the last one, for the class token alone: what tracing costs grows with the layers.
CONFIG = dataclasses.replace(SMALL, num_layers=2)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    reference = expected("token")
    return nchw(reference["images"]), torch.from_numpy(reference["labels"])


def fresh_state(optimizer) -> vitfn.TrainState:
    params = vitfn.init(CONFIG, 0)
    return vitfn.TrainState(0, params, optimizer.init(params))


OPTIMIZER = vitfn.sgd(vitfn.warmup_cosine(0.03, 10))


@pytest.fixture
def cpu_backend(monkeypatch):
    """Replaces the CPU's compile backend, and other fields of its row, for one test."""

    def use(backend, **others):
        row = dataclasses.replace(device.DEVICES["cpu"], backend=backend, **others)
        monkeypatch.setitem(device.DEVICES, "cpu", row)

    return use


def broken_backend(graph, inputs):
    raise AssertionError("the vendor's compiler is young")


@pytest.mark.parametrize("form", ["step", "block"])
def test_a_compiler_that_fails_is_reported_once_and_the_run_goes_on_eagerly(form, cpu_backend, caplog):
    cpu_backend(broken_backend)
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile=form)
    with caplog.at_level(logging.WARNING, "vitfn"):
        state, metrics = train_step(fresh_state(OPTIMIZER), batch())
        state, _ = train_step(state, batch())
    reports = [record.message for record in caplog.records if "COMPILING FAILED" in record.message]
    assert len(reports) == 1
    assert list(train_step.failures) == {"step": ["step", "block"], "block": ["block"]}[form]
    assert "the vendor's compiler is young" in reports[0]
    assert train_step.form == "off"
    eager = vitfn.make_train_step(CONFIG, OPTIMIZER, compile="off")
    expected_state, expected_metrics = eager(fresh_state(OPTIMIZER), batch())
    assert float(metrics["loss"]) == float(expected_metrics["loss"])
    expected_state, _ = eager(expected_state, batch())
    torch.testing.assert_close(state.params, expected_state.params, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["step", "block"])
@pytest.mark.parametrize("broken", [broken_backend, "no such backend"])
def test_without_a_fallback_a_compiler_that_fails_ends_the_run(form, broken, cpu_backend):
    cpu_backend(broken)
    reason = "the vendor's compiler is young" if callable(broken) else "no such backend"
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile=form, compile_fallback=False)
    state = fresh_state(OPTIMIZER)
    with pytest.raises(RunError, match=f"compile={form} failed on cpu: .*{reason}"):
        train_step(state, batch())
    eval_step = vitfn.make_eval_step(CONFIG, compile=form, compile_fallback=False)
    with pytest.raises(RunError, match=f"compile={form} failed on cpu: .*{reason}"):
        eval_step(state.params, batch())  # nothing was donated


def test_a_backward_that_does_not_compile_is_caught_before_anything_is_updated(cpu_backend):
    from torch._dynamo.backends.common import aot_autograd

    cpu_backend(aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken_backend))
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile="block")
    _, metrics = train_step(fresh_state(OPTIMIZER), batch())
    assert train_step.form == "off"
    assert metrics["loss"].isfinite()


@pytest.mark.parametrize("form", ["step", "block"])
def test_a_caller_s_error_stays_the_caller_s(form, cpu_backend):
    cpu_backend("eager")
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile=form)
    state = fresh_state(OPTIMIZER)
    with pytest.raises(Exception, match=r"shape|size|divide|rearrange"):
        train_step(state, (torch.randn(4, 3, 33, 33), torch.zeros(4, dtype=torch.int64)))
    assert train_step.form is None
    train_step(state, batch())  # nothing was donated, and nothing is broken
    assert train_step.form == form


class Counting:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize("form", ["step", "block"])
def test_one_graph_serves_all_layers_and_all_steps(form, cpu_backend):
    cpu_backend(counting := Counting())
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile=form)
    state = fresh_state(OPTIMIZER)
    for _ in range(3):
        state, _ = train_step(state, batch())
    assert train_step.form == form
    assert len(counting.graphs) == {"step": 1, "block": 2}[form]  # a block, and the update of leaves of every size


@pytest.mark.parametrize("form", ["step", "block"])
def test_shapes_stay_static_whatever_was_compiled_before(form, cpu_backend):
    """Other models, batches and image sizes, trained or evaluated, on a backend that takes no dynamic shape."""

    def static(graph, inputs):
        assert not any(isinstance(x, torch.SymInt) for x in inputs)
        return graph.forward

    cpu_backend(static, leaf_by_leaf=False)
    for hidden, side, size in ((12, 32, 2), (24, 32, 3), (24, 16, 5), (36, 24, 1)):
        config = dataclasses.replace(CONFIG, hidden_size=hidden, image_size=side)
        params = vitfn.init(config, 0)
        data = torch.zeros(size, 3, side, side), torch.zeros(size, dtype=torch.int64)
        eval_step = vitfn.make_eval_step(config, compile=form)
        eval_step(params, data)
        train_step = vitfn.make_train_step(config, OPTIMIZER, compile=form)
        train_step(vitfn.TrainState(0, params, OPTIMIZER.init(params)), data)
        assert train_step.form == eval_step.form == form, train_step.failures | eval_step.failures


@pytest.mark.parametrize("form", ["step", "block"])
def test_evaluation_of_a_padded_batch_compiles_nothing_new(form, cpu_backend):
    cpu_backend(counting := Counting())
    eval_step = vitfn.make_eval_step(CONFIG, compile=form)
    params, (images, labels) = fresh_state(OPTIMIZER).params, batch()
    eval_step(params, (images, labels))
    eval_step(params, (images, torch.full_like(labels, -1)))
    assert len(counting.graphs) == 1


FEW = {"recompile_limit": 2}  # of a code object; torch's own limit is 8


def test_many_steps_in_one_process_do_not_exhaust_dynamo(cpu_backend):
    """Its limit of recompilations counts for a code object: each step has its own."""
    cpu_backend("eager")
    with torch._dynamo.config.patch(FEW):
        for width in range(1, 5):
            config = dataclasses.replace(CONFIG, mlp_dim=8 * width)
            params = vitfn.init(config, 0)
            train_step = vitfn.make_train_step(config, OPTIMIZER, compile="block")
            train_step(vitfn.TrainState(0, params, OPTIMIZER.init(params)), batch())
            assert train_step.form == "block", width


@pytest.mark.parametrize("form", ["step", "block"])
def test_more_shapes_than_dynamo_s_limit(form, cpu_backend):
    cpu_backend("eager")
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile=form)
    state = vitfn.TrainState(0, params := vitfn.init(CONFIG, 0), OPTIMIZER.init(params))
    with torch._dynamo.config.patch(FEW):
        for size in range(1, 5):
            state, _ = train_step(state, (torch.zeros(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64)))
            assert train_step.form == form


@pytest.mark.parametrize("form", ["off", "step", "block"])
def test_metrics_hold_no_graph_and_parameters_may_require_gradients(form, cpu_backend):
    cpu_backend("aot_eager")
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile=form)
    state = fresh_state(OPTIMIZER)
    params = tree.map(lambda leaf: leaf.requires_grad_(), state.params)
    state, metrics = train_step(vitfn.TrainState(0, params, state.opt_state), batch())
    assert train_step.form == form
    assert not any(value.requires_grad for value in (*metrics.values(), *tree.leaves(state.params)))


def test_nothing_waits_for_the_device():
    """A step on the meta device, where reading any value raises, goes through."""
    train_step = vitfn.make_train_step(CONFIG, OPTIMIZER, compile="off")
    device.DEVICES["meta"] = dataclasses.replace(device.DEVICES["cpu"], name="meta")
    try:
        state = fresh_state(OPTIMIZER)
        meta = vitfn.TrainState(state.step.to("meta"), tree.to(state.params, "meta"), tree.to(state.opt_state, "meta"))
        images, labels = batch()
        state, metrics = train_step(meta, (images.to("meta"), labels.to("meta")))
    finally:
        del device.DEVICES["meta"]
    assert all(value.device.type == "meta" for value in (*metrics.values(), *tree.leaves(state.params)))


WITHOUT_COMPILER = """
import torch, vitfn
optimizer = vitfn.sgd(vitfn.warmup_cosine(0.1, 10))
config = vitfn.get_config("Ti/16", image_size=32, num_layers=2, hidden_size=12, mlp_dim=8, num_classes=4)
params = vitfn.init(config, 0)
train_step = vitfn.make_train_step(config, optimizer, compile="block")
train_step(vitfn.TrainState(0, params, optimizer.init(params)), (torch.randn(2, 3, 32, 32), torch.tensor([0, 1])))
print(train_step.form)
"""


@pytest.mark.slow
def test_without_a_c_compiler_the_run_goes_on_eagerly(tmp_path):
    home = str(tmp_path)
    environment = {"CXX": "/no/such/compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": home, "HOME": home}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.split()[-1] == "off", result.stderr
    assert result.stderr.count("COMPILING FAILED") == 1
