"""Seconds and memory to load, and to convert, a pre-trained model in each format: python benchmarks/load.py [B/16]

The files (412 MB each for B/16, 2.6 GB for H/14) are written to a temporary folder first.
"""

import os
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

import vitfn

ROUNDS = 5
PROGRAM = """
import os, sys, time, numpy, vitfn
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
vitfn.load(sys.argv[1])  # a small file, so that everything is imported
path = sys.argv[2]
before = status("VmRSS")
start = time.perf_counter()
params = vitfn.load(path)
seconds = time.perf_counter() - start
line = f"load {seconds:.2f} s, peak {(status('VmHWM') - before) / os.path.getsize(path):.2f} of the file"
del params
if path.endswith(".npz"):
    start = time.perf_counter()
    with numpy.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    line += f"; np.load {time.perf_counter() - start:.2f} s"
print(line, flush=True)
"""


def write(folder: str, name: str) -> list[str]:
    small, config = vitfn.get_config("Nano/8"), vitfn.get_config(name, num_classes=21843)
    vitfn.save(f"{folder}/small.npz", vitfn.init(small), small)
    params = vitfn.init(config)
    vitfn.save(f"{folder}/a.npz", params, config)
    vitfn.save(f"{folder}/scan.npz", params, config, layout="big_vision_scan")
    vitfn.save(f"{folder}/a.safetensors", params, config)
    torch.save(load_file(f"{folder}/a.safetensors"), f"{folder}/a.bin")
    return ["a.npz", "scan.npz", "a.safetensors", "a.bin"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = write(folder, sys.argv[1] if len(sys.argv) > 1 else "B/16")
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        for _ in range(ROUNDS):
            for file in files:
                print(f"{file:<14}", end=" ", flush=True)
                command = [sys.executable, "-W", "ignore", "-c", PROGRAM, f"{folder}/small.npz", f"{folder}/{file}"]
                subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
            for source, target in (("a.npz", "b.safetensors"), ("a.safetensors", "b.npz")):
                start = time.perf_counter()
                command = [sys.executable, "-m", "vitfn.convert", f"{folder}/{source}", f"{folder}/{target}"]
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                print(
                    f"vitfn.convert {source} {target}: {seconds:.2f} s, start of Python and torch included", flush=True
                )


main()
