from toy import tiny_llama, toy_loop

from fedbe.bench import cohort
from fedbe.bench.cohort import HEADER, CutData, measure_cohort
from fedbe.engines import OnePass
from fedbe.seeding import generator


def test_both_ways_come_to_the_same_tensors_in_every_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort, "SETTINGS", ((2, 1, 4), (6, 2, 16)))
    loop = toy_loop(tmp_path / "run", model=tiny_llama(4), engine=OnePass(2))
    gains = list(measure_cohort(loop, repeats=2))
    assert [(gain.clients, gain.batch_size, gain.length) for gain in gains] == [(2, 1, 4), (6, 2, 16)]
    assert all(len(gain.ratios) == 2 and min(gain.ratios) > 0 for gain in gains)
    assert all(gain.largest_difference < 1e-3 for gain in gains)
    assert len(str(gains[0])) == len(HEADER)
    assert len(loop.model.model.layers) == 4


def test_sequences_are_cut_and_batches_made_smaller(tmp_path):
    data = CutData(toy_loop(tmp_path / "run").plan.data, 2, 5)
    [first, *_] = data.client_dataloader("client-0", generator(0))
    assert first["input_ids"].shape == first["labels"].shape == (2, 5)
