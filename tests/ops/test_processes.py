# SPDX-License-Identifier: Apache-2.0

"""The scorer in many threads, after a fork, in DataLoader workers and while the interpreter ends."""

import os

import pytest

PREAMBLE = """
import os, sys, threading
import numpy as np
from anomalib_stfpm_ext import anomaly_map
rng = np.random.default_rng(0)
features = [[rng.standard_normal((4, c, s, s)).astype("float32") for c, s in ((64, 64), (128, 32))] for _ in "ts"]
"""
WITH_TORCH = """
import torch
torch.set_num_threads(4)
features = [[torch.from_numpy(level) for level in side] for side in features]
torch.randn(256, 256) @ torch.randn(256, 256)  # its pool is up
"""


@pytest.fixture(params=["", WITH_TORCH], ids=["numpy", "torch"])
def preamble(request):
    return PREAMBLE + request.param + "expected = np.asarray(anomaly_map(*features, (256, 256))[0]).tobytes()\n"


def test_unknown_instruction_set_is_an_error_on_many_threads_too(python):
    python(
        """
import numpy as np
from anomalib_stfpm_ext import anomaly_map
features = [np.ones((4, 64, 64, 64), np.float32)]
try:
    anomaly_map(features, features, (256, 256))
except ValueError as error:
    assert "STFPM_EXT_ISA is 'avx3', but this machine runs" in str(error)
else:
    raise SystemExit("no error")
""",
        STFPM_EXT_ISA="avx3",
    )


def test_eight_threads_at_once(python, preamble):
    python(
        preamble
        + """
results = []
def work():
    for _ in range(10):
        results.append(np.asarray(anomaly_map(*features, (256, 256))[0]).tobytes() == expected)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(results) == 80 and all(results)
"""
    )


def test_fork_after_first_use(python, preamble):
    python(
        preamble
        + """
child = os.fork()
if child == 0:
    os._exit(0 if np.asarray(anomaly_map(*features, (256, 256))[0]).tobytes() == expected else 1)
import time
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done: break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    sys.exit("the child hangs")
assert status == 0
"""
    )


def test_data_loader_workers(python):
    python(
        PREAMBLE
        + WITH_TORCH
        + """
class Scores(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return anomaly_map(*features, (128, 128))[1]
expected = anomaly_map(*features, (128, 128))[1]
for method in ("fork",):
    loader = torch.utils.data.DataLoader(Scores(), num_workers=2, multiprocessing_context=method, timeout=60)
    assert all(torch.equal(scores[0], expected) for scores in loader)
"""
    )


BUSY = """
import subprocess, time
from anomalib_stfpm_ext.ops import native
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # one processor for four threads and other programs
loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
try:
    end = time.monotonic() + 60
    while not native.threads_are_late():
        assert np.asarray(anomaly_map(*features, (256, 256))[0]).tobytes() == expected
        assert time.monotonic() < end, "threads that do not get the processor are not noticed"
    for _ in range(5):
        assert np.asarray(anomaly_map(*features, (256, 256))[0]).tobytes() == expected
finally:
    for loop in loops: loop.kill()
"""


@pytest.mark.skipif("STFPM_EXT_SANITIZE" in os.environ, reason="a sanitizer slows the work, not the wait")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to leave one processor to the process")
def test_threads_that_begin_late_are_done_without(python):
    python(PREAMBLE + WITH_TORCH + "expected = np.asarray(anomaly_map(*features, (256, 256))[0]).tobytes()\n" + BUSY)


def test_interpreter_ends_in_mid_use(python):
    """Daemon threads are still scoring when the interpreter goes. Not with torch, which aborts then by itself.

    (Python 3.10 to 3.13 unwind a thread that asks for the GIL, torch's own operators do so in a destructor: the same
    script with torch.mm in place of the scorer ends in "terminate called without an active exception".)
    """
    python(
        PREAMBLE
        + """
def work():
    while True: anomaly_map(*features, (256, 256))
for _ in range(3): threading.Thread(target=work, daemon=True).start()
import time
time.sleep(0.5)
"""
    )
