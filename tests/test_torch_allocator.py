import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchnorm.torch import allocator, reuse_memory

MEMORY = """
import resource, torch
from batchnorm.torch import reuse_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(1 << 24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

faults()
before = faults()
reuse_memory()
faults()
during = faults()
x = torch.empty(1 << 24).fill_(1.0)
after = [bytearray(100_000) for _ in range(100)]  # so that x is not the last block of the heap
del x
kept = resident()
reuse_memory(False)
print(before, during, kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_memory_that_is_reused_is_not_touched_for_the_first_time() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, timeout=600)
    before, during, returned = map(int, done.stdout.split())
    least = 3 * (1 << 26) // (1 << 21)  # if pages have 2 MB
    assert before >= least
    assert during < least // 4
    assert returned >= 0.7 * (1 << 26)  # a part of it may be in use again


def is_advised(t: Tensor) -> bool:
    """Whether the system was asked for huge pages in the middle of a tensor's memory."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in others
    raise AssertionError("no such memory")


def has_huge_pages() -> bool:
    """Whether the system has transparent huge pages, and tells for which memory it was asked for them."""
    maps = Path("/proc/self/smaps")
    return Path("/sys/kernel/mm/transparent_hugepage").exists() and maps.exists() and "VmFlags" in maps.read_text()


@pytest.mark.skipif(not has_huge_pages(), reason="no transparent huge pages")
@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_have_huge_pages(laid: torch.memory_format) -> None:
    x = torch.empty((), dtype=torch.float32).expand(1, 64, 1 << 9, 1 << 6)
    large = allocator.empty_like(x, laid)
    assert large.nbytes == allocator.LARGE
    assert large.is_contiguous(memory_format=laid)
    assert is_advised(large)


def test_another_c_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(RuntimeError, match="reuse_memory sets options of glibc"):
        reuse_memory()
