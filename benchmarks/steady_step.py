"""Compiled train steps against eager ones, interleaved: python benchmarks/steady_step.py [MODEL BATCH DROPOUT]"""

import statistics
import sys
import time

import torch

import vitfn

model, batch_size, dropout = (*sys.argv[1:], *("Ti/16", "16", "0")[len(sys.argv) - 1 :])
config = vitfn.get_config(model, dropout_rate=float(dropout))
optimizer = vitfn.sgd(vitfn.warmup_cosine(0.03, 100, 10))
batch = torch.randn(int(batch_size), 3, *config.image_hw), torch.randint(0, 1000, (int(batch_size),))
steps, states = {}, {}
for form in ("off", "block"):
    params = vitfn.init(config, 0)
    steps[form], states[form] = (
        vitfn.make_train_step(config, optimizer, compile=form),
        vitfn.TrainState(0, params, optimizer.init(params)),
    )
seconds: dict[str, list[float]] = {form: [] for form in steps}
for _ in range(26):
    for form, step in steps.items():
        start = time.perf_counter()
        states[form], metrics = step(states[form], batch)
        metrics["loss"].item()
        seconds[form].append(time.perf_counter() - start)
ratios = sorted(block / off for off, block in zip(seconds["off"][1:], seconds["block"][1:], strict=True))
median = {form: statistics.median(values[1:]) for form, values in seconds.items()}
print(f"{model}, batch {batch_size}, dropout {dropout}: eager {median['off']:.3f} s, block {median['block']:.3f} s")
print(f"block / eager: median {statistics.median(ratios):.3f}, quartiles {ratios[6]:.3f} to {ratios[18]:.3f}")
