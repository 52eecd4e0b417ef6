from toy import tiny_llama, toy_loop

from fedbe.bench.prefix import HEADER, measure_prefix


def test_the_higher_the_block_the_more_is_left_out(tmp_path):
    gains = measure_prefix(toy_loop(tmp_path / "run", model=tiny_llama(4)), repeats=2)
    assert [gain.blocks for gain in gains] == [1, 2, 3, 4]
    floors = [gain.floor for gain in gains]
    assert floors == sorted(floors, reverse=True) and 0 < floors[-1] < floors[0] < 1
    assert all(len(gain.ratios) == 2 and min(gain.ratios) > 0 for gain in gains)
    assert len(str(gains[0])) == len(HEADER)
