import pytest

from fedbe.bench.memory import MIB, MemoryUse, resident_bytes
from fedbe.loop import peak_rss_bytes


def test_growth_compares_the_end_with_the_time_after_warm_up():
    flat = MemoryUse(5, 0, tuple([10 * MIB] * 2 + [100 * MIB] * 8))
    assert flat.growth == 1.0
    rising = MemoryUse(5, 0, tuple(range(100, 200, 10)))
    assert rising.growth == pytest.approx(185 / 125)


def test_resident_memory_is_at_most_the_peak_and_follows_an_allocation():
    before = resident_bytes()
    block = bytearray(64 * MIB)
    during = resident_bytes()
    assert during - before > 32 * MIB and during <= peak_rss_bytes()
    del block
