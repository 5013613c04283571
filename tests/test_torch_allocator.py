import platform
import subprocess
import sys

import pytest

from batchnorm.torch import allocator, reuse_memory

FAULTS = """
import resource, torch
from batchnorm.torch import reuse_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(1 << 24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
counts = [faults()]
for enabled in (True, False):
    reuse_memory(enabled)
    faults()
    counts.append(faults())
print(*counts)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_memory_that_is_reused_is_not_touched_for_the_first_time() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True, timeout=600)
    before, kept, after = map(int, done.stdout.split())
    least = 3 * (1 << 26) // (1 << 21)  # if pages have 2 MB
    assert before >= least
    assert after >= least
    assert kept < least // 4


def test_another_c_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(RuntimeError, match="reuse_memory sets options of glibc"):
        reuse_memory()
