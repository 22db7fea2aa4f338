"""Seconds and memory to load ViT-B_16 (412 MB, written to a temporary folder first): python benchmarks/load.py"""

import subprocess
import sys
import tempfile

import vitfn

PROGRAM = """
import os, sys, time, torch, vitfn, numpy
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
config = vitfn.get_config("B/16", num_classes=21843, representation_size=768)
before = status("VmRSS")
start = time.perf_counter()
params = vitfn.load_npz(sys.argv[1], config)
seconds = time.perf_counter() - start
ratio = (status("VmHWM") - before) / os.path.getsize(sys.argv[1])
del params
start = time.perf_counter()
with numpy.load(sys.argv[1]) as file:
    arrays = {name: file[name] for name in file.files}
print(f"load_npz {seconds:.2f} s, peak {ratio:.2f} of the file; np.load {time.perf_counter() - start:.2f} s")
"""

with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/ViT-B_16.npz"
    config = vitfn.get_config("B/16", num_classes=21843, representation_size=768)
    vitfn.save_npz(path, vitfn.init(config, 0))
    for _ in range(6):
        subprocess.run([sys.executable, "-c", PROGRAM, path], check=True)
