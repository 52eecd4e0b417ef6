import ctypes

import pytest

from fedbe.bench.memory import MIB, MemoryUse, bytes_in_use, give_back_freed_memory, in_fresh_process
from fedbe.system.machine import Trimming, peak_rss_bytes, resident_bytes


def test_growth_compares_the_end_with_the_time_after_warm_up():
    assert MemoryUse(5, 10, 0, 100 * MIB, 125 * MIB).growth == 1.25


def test_what_is_freed_does_not_count_as_in_use():
    before = bytes_in_use()
    block = [bytearray(1 * MIB) for _ in range(64)]
    assert bytes_in_use() - before > 32 * MIB
    del block
    assert bytes_in_use() - before < 32 * MIB


def test_resident_memory_is_at_most_the_peak_and_follows_an_allocation():
    before = resident_bytes()
    block = bytearray(64 * MIB)
    during = resident_bytes()
    assert during - before > 32 * MIB and during <= peak_rss_bytes()
    del block


def left_behind(gives_back):
    """What 62 MiB of freed blocks leave resident below one block that stays."""
    if gives_back:
        give_back_freed_memory()
    before = resident_bytes()
    blocks = [bytearray(100 * 1024) for _ in range(640)]
    kept = blocks[-1]
    del blocks
    return resident_bytes() - before, len(kept)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the GNU C library's only")
def test_freed_memory_is_given_back_at_once_where_that_is_asked_for():
    left, _ = in_fresh_process(left_behind, True)
    assert left < 16 * MIB < in_fresh_process(left_behind, False)[0]


def test_memory_is_trimmed_when_it_has_grown_since_the_first_client_after_a_trim(monkeypatch):
    in_use = iter([100, 104, 106, 200, 209, 211])
    trims = []
    monkeypatch.setattr("fedbe.system.machine.resident_bytes", lambda: next(in_use))
    monkeypatch.setattr("fedbe.system.machine.trim_memory", lambda: trims.append(True))
    trimming = Trimming(growth=1.05)
    assert [trimming.before_client() or len(trims) for _ in range(6)] == [0, 0, 1, 1, 1, 2]
