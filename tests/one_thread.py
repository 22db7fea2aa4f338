"""One thread, here and in the processes that tests start, from before torch is imported.

Sums are the same everywhere, and models this small are no faster with two threads, and far slower where something else
runs. The compiler starts no processes of its own either, whose imports would take longer than what they compile.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
