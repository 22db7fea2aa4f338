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
"""Compares two loss curves by vitfn.compare and draws loss.jpg: python loss.py --sdaa-log sdaa.log --cuda-log cuda.log

Exit code 0 where the unsigned mean relative error is within the limit, 1 where it is not, 2 where there is no curve.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the package vitfn lies

from vitfn import compare


def main(argv: list[str]) -> int:
    """Prints the ModelZoo's figures and verdict and the unsigned errors beneath; returns vitfn.compare's exit code."""
    parser = argparse.ArgumentParser(description="Compares two loss curves.", allow_abbrev=False)
    parser.add_argument("--sdaa-log", default="sdaa.log", help="the curve to judge")
    parser.add_argument("--cuda-log", default="cuda.log", help="the reference")
    parser.add_argument("--plot", default="loss.jpg", help="the picture to draw")
    args = parser.parse_args(argv)
    return compare.main(["loss.py", f"--plot={args.plot}", "--", args.cuda_log, args.sdaa_log])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
