"""What a large call frees stays with the process for the next one."""

import os
import platform
import subprocess
import sys

import pytest

CALLS = """
import resource, torch, bptt
torch.set_num_threads(1)
layer = bptt.nn.LSTM(32, 64, kernel="cpu")
x, dy = torch.randn(100, 32, 32, requires_grad=True), torch.randn(100, 32, 64)

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], dy)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(16)
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are glibc's")
def test_the_system_makes_no_page_again_for_every_call() -> None:
    """4 calls had 7,000 faults, each of a page that the call before had given back. A few later, it has its size."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = subprocess.run([sys.executable, "-P", "-c", CALLS], env=env, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000
