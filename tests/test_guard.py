"""A guard of speed that does not time: graphs, products, kernels and kept bytes of the compiled step.

Whoever changes a number here has made a step faster or slower: measure it (vitfn.bench), and say so.
"""

import dataclasses
from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import metrics
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.flop_counter import FlopCounterMode

import vitfn
from vitfn import device, flops

CONFIG = dataclasses.replace(vitfn.get_config("Ti/16", num_classes=10, dropout_rate=0.0), num_layers=3, image_size=64)
BATCH, TOKENS, D, M, H = 2, 17, 192, 768, 3
PRODUCTS, VIEWS = ("mm", "addmm", "bmm", "baddbmm"), ("view", "permute", "alias", "slice", "t", "transpose")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def name(node: torch.fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def of_parameters(node: torch.fx.Node) -> bool:
    """An input, or a view of one: nothing that is kept for backward alone."""
    return node.op == "placeholder" or (name(node) in VIEWS and of_parameters(node.args[0]))


class Graphs:
    """A backend that keeps what Inductor would be given, and runs it as it is."""

    def __init__(self):
        self.found: dict[str, list[torch.fx.Graph]] = {"forward": [], "backward": [], "inference": []}

        def compiler(kind: str):
            def compile(module, inputs):
                self.found[kind].append(module.graph)
                return torch._functorch.aot_autograd.make_boxed_func(module.forward)

            return compile

        self.backend = aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def counts(self, kind: str) -> Counter:
        (graph,) = self.found[kind]
        counts = Counter(name(node) for node in graph.nodes if node.op == "call_function")
        return Counter({"products": sum(counts[product] for product in PRODUCTS), **counts})

    def kept(self) -> int:
        """Bytes of one block that forward computes and backward needs; views of one tensor count once."""
        (graph,) = self.found["forward"]
        outputs = next(node for node in graph.nodes if node.op == "output").args[0][1:]
        own = set()
        for node in outputs:
            if isinstance(node, torch.fx.Node) and not of_parameters(node):
                while name(node) in VIEWS:
                    node = node.args[0]
                own.add(node)
        values = [node.meta["val"] for node in own if "val" in node.meta]  # without the state of a random generator
        return sum(value.numel() * value.element_size() for value in values if value.is_floating_point())


def step(remat: str = "none", backend="inductor", monkeypatch=None) -> None:
    optimizer = vitfn.adamw(vitfn.warmup_cosine(1e-3, 10), weight_decay=0.1)
    if monkeypatch:
        row = dataclasses.replace(device.DEVICES["cpu"], backend=backend)
        monkeypatch.setitem(device.DEVICES, "cpu", row)
    params = vitfn.init(CONFIG, 0)
    state = vitfn.TrainState(0, params, optimizer.init(params))
    train_step = vitfn.make_train_step(CONFIG, optimizer, compile="block", compile_fallback=False, remat=remat)
    images, labels = torch.zeros(BATCH, 3, 64, 64), torch.zeros(BATCH, dtype=torch.int64)
    for _ in range(2):
        state, _ = train_step(state, (images, labels))


@pytest.mark.parametrize(
    ("remat", "backward_products", "kept"),
    [
        # the second norm's input, both norms' statistics, q, k, v, attention and its logsumexp, the GELU's input
        ("none", 12, BATCH * TOKENS * (5 * D + M + 4 + H) * 4),
        ("attention", 16, BATCH * TOKENS * (2 * D + 2 * M + 2) * 4),
        ("block", 17, 0),  # all but the last product is computed again
    ],
)
def test_one_block_is_three_graphs_of_few_products_that_keep_little(remat, backward_products, kept, monkeypatch):
    graphs = Graphs()
    step(remat, graphs.backend, monkeypatch)
    assert {kind: len(found) for kind, found in graphs.found.items()} == {"forward": 1, "backward": 1, "inference": 1}
    forward, backward = graphs.counts("forward"), graphs.counts("backward")
    assert (forward["products"], backward["products"]) == (6, backward_products)
    if remat == "none":
        assert (forward[ATTENTION], backward[ATTENTION + "_backward"]) == (1, 1)
    assert not forward["clone"] + forward["copy_"] + backward["copy_"]
    assert graphs.kept() <= kept


def test_a_step_multiplies_what_is_needed_and_nothing_else():
    """Of both passes, beside the fused attention of all blocks but the last, which torch's counter does not see."""
    optimizer = vitfn.sgd(lambda step: torch.tensor(0.1))
    params = vitfn.init(CONFIG, 0)
    state = vitfn.TrainState(0, params, optimizer.init(params))
    train_step = vitfn.make_train_step(CONFIG, optimizer, compile="off")
    with FlopCounterMode(display=False) as counter:
        train_step(state, (torch.zeros(BATCH, 3, 64, 64), torch.zeros(BATCH, dtype=torch.int64)))
    fused = (CONFIG.num_layers - 1) * 3 * 4 * TOKENS * TOKENS * D
    needed, again = flops.needed_flops(CONFIG, training=True), fused // 6  # torch 2.15 counts it, and the scores twice
    assert counter.get_total_flops() in [BATCH * (needed + more) for more in (-fused, 0, again)]


@pytest.mark.slow
def test_inductor_makes_few_kernels_of_it():
    torch._dynamo.reset()
    metrics.reset()
    with fresh_inductor_cache():
        step()
    assert metrics.generated_kernel_count == (29 if torch.__version__.startswith("2.7.") else 37)
