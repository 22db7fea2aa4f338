"""Seconds to the first compiled train step with cold caches: python benchmarks/first_step.py [LAYERS ...]

ViT-Ti_16, 224 px, batch 16, each depth in processes of their own, three rounds.
"""

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import sys, time, torch, vitfn
config = vitfn.get_config("Ti/16", num_layers=int(sys.argv[1]))
optimizer = vitfn.sgd(vitfn.warmup_cosine(0.03, 100, 10))
params = vitfn.init(config, 0)
train_step = vitfn.make_train_step(config, optimizer)
state = vitfn.TrainState(0, params, optimizer.init(params))
batch = torch.randn(16, 3, 224, 224), torch.randint(0, 1000, (16,))
start = time.perf_counter()
state, metrics = train_step(state, batch)
metrics["loss"].item()
print(f"{sys.argv[1]:>3} layers, compile={train_step.form}: {time.perf_counter() - start:.1f} s")
"""

for _ in range(3):
    for layers in sys.argv[1:] or ["12", "24"]:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            subprocess.run([sys.executable, "-c", PROGRAM, layers], env=environment, check=True)
