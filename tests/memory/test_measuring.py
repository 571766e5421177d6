"""The allocator's peak of a known pattern of allocations."""

import os
import subprocess
import sys

import pytest
import torch

from qlora_lite.memory.measuring import measure_allocations, rss_bytes

MB = 2**20


def test_the_peak_is_what_lived_at_the_same_time():
    with measure_allocations("cpu") as allocations:
        first = torch.empty(10 * MB, dtype=torch.uint8)
        second = torch.empty(10 * MB, dtype=torch.uint8)
        del first, second
        third = torch.empty(15 * MB, dtype=torch.uint8)
        del third
    assert allocations.peak_bytes == pytest.approx(20 * MB, rel=0.01)


def test_what_was_there_before_is_not_counted_and_not_subtracted_when_it_is_freed():
    """torch's profiler does not know the size of what it did not see allocated, so the peak errs upwards, never downwards."""
    before = torch.empty(30 * MB, dtype=torch.uint8)
    with measure_allocations("cpu") as allocations:
        del before
        after = torch.empty(10 * MB, dtype=torch.uint8)
    assert allocations.peak_bytes == pytest.approx(10 * MB, rel=0.01)
    del after


def test_temporaries_of_a_backward_pass_are_seen():
    weight = torch.ones(MB, requires_grad=True)  # 4 MB
    with measure_allocations("cpu") as allocations:
        (weight.sin().sin()).sum().backward()
    # two results of sin, then the gradient through them while the first result is still saved
    assert 12 * MB * 0.99 <= allocations.peak_bytes <= 16 * MB * 1.01


def test_measuring_prints_nothing(capfd):
    with measure_allocations("cpu"):
        torch.ones(10)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_resident_memory_grows_by_what_is_touched():
    before = rss_bytes()
    held = torch.ones(100 * MB, dtype=torch.uint8)
    assert 90 * MB < rss_bytes() - before < 130 * MB
    del held


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_products_of_ever_new_lengths_do_not_fill_the_memory():
    """In a process of its own: what libraries keep by shape is bounded (qlora_lite/__init__.py)."""
    code = (
        "import qlora_lite, torch\n"
        "from qlora_lite.memory.measuring import give_back_free_memory, rss_bytes\n"
        "weight = torch.randn(1536, 576).bfloat16()\n"
        "for length in range(200, 420):\n"
        "    torch.nn.functional.linear(torch.randn(length, 576).bfloat16(), weight)\n"
        "    torch.randn(length, 1536).bfloat16() @ weight\n"
        "    give_back_free_memory()\n"
        "    before = rss_bytes() if length == 260 else locals().get('before', 0)\n"
        "print(rss_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * MB
