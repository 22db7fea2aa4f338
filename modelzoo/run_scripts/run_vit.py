# BSD 3- Clause License Copyright (c) 2023, Tecorigin Co., Ltd. All rights
# reserved.
# Redistribution and use in source and binary forms, with or without
# modification, are permitted provided that the following conditions are met:
# Redistributions of source code must retain the above copyright notice,
# this list of conditions and the following disclaimer.
# Redistributions in binary form must reproduce the above copyright notice,
# this list of conditions and the following disclaimer in the documentation
# and/or other materials provided with the distribution.
# Neither the name of the copyright holder nor the names of its contributors
# may be used to endorse or promote products derived from this software
# without specific prior written permission.
#
# THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
# AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
# IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE
# ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE
# LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR
# CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF
# SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS
# INTERRUPTION)
# HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT,
# STRICT LIABILITY,OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE)  ARISING IN ANY
# WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY
# OF SUCH DAMAGE.
"""Trains by vitfn.train, keeps what it prints in <device>.log, and compares the curve with a reference where one is.

python run_vit.py --model_name vit --nproc_per_node 4 --bs 16 --lr 0.03 --device sdaa --step 100 --dataset_path DATA
"""

import datetime
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from argument import command, parse

ROOT = Path(__file__).resolve().parents[2]  # where the package vitfn lies
SCRIPTS = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    """Runs the training and the comparison in the current folder; returns the training's exit code."""
    args = parse(argv)
    args.name = args.name or f"{args.model_name.replace('/', '_')}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    log = f"{args.device}.log"
    if code := run(command(args), log):
        return code
    reference = args.reference or ("cuda.log" if args.device != "cuda" and Path("cuda.log").exists() else "")
    if reference:
        words = [sys.executable, str(SCRIPTS / "loss.py"), "--sdaa-log", log, "--cuda-log", reference]
        if (code := subprocess.run(words).returncode) > 1:  # 1: the curves differ, which is a result
            return code
    return 0


def run(words: list[str], log: str) -> int:
    """Runs a command whose output goes to the terminal and to the file `log`; returns its exit code."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    print(shlex.join(words), flush=True)
    with open(log, "wb") as file:
        child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the child too, which saves and ends
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        assert child.stdout
        while part := child.stdout.read(65536):
            for stream in (sys.stdout.buffer, file):
                stream.write(part)
                stream.flush()
        code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
