import pytest
import torch
from toy import toy_loop

from fedbe.algorithms import BlockExpansion, Gated
from fedbe.allocation.cost import Cost
from fedbe.bench.cost_model import CostModelReport, Measurement, TensorMemory, measure_cost_model, subsets


def made(name, forward_flops, backward_flops, forward, backward, predicted, peak):
    return Measurement((name,), Cost(forward_flops, backward_flops, 100 + predicted), forward, backward, 100, peak)


def test_one_probe_fixes_the_rates_of_both_directions_and_the_temporary_memory():
    probe = made("probe", 10, 40, 1.0, 8.0, 50, 60)
    other = made("other", 10, 20, 1.0, 4.0, 30, 50)
    report = CostModelReport((other, probe))
    assert other.predicted_seconds(probe) == pytest.approx(5.0)
    assert report.time_errors(probe) == [pytest.approx(0.0)]
    assert report.memory_errors(probe) == [pytest.approx(40 / 50 - 1)]
    assert report.time_rank_correlation == pytest.approx(1, abs=1e-4)
    assert report.memory_rank_correlation == pytest.approx(1, abs=1e-4)
    turned = CostModelReport((made("other", 10, 20, 1.0, 9.0, 60, 50), probe))
    assert turned.time_rank_correlation == pytest.approx(-1, abs=1e-4)
    assert turned.memory_rank_correlation == pytest.approx(-1, abs=1e-4)


def test_sets_of_units():
    assert subsets(("a", "b")) == [("a",), ("b",), ("a", "b")]
    many = tuple(map(str, range(30)))
    chosen = subsets(many)
    assert chosen[-1] == many and len(chosen) == len(set(chosen)) < 25


def test_memory_of_tensors_is_followed():
    with TensorMemory() as memory:
        kept = torch.ones(1000)
        view = kept[:10]
        (kept * 2).sum()
        del view
    assert memory.peak - memory.current == pytest.approx(4000, abs=100)
    assert memory.current == pytest.approx(4000, abs=100)
    del kept
    assert memory.current < 100


def test_a_gate_which_the_models_loss_does_not_reach_is_left_out(tmp_path):
    gated = Gated(BlockExpansion([0, 2]), sequences=2, sequence_length=8)
    report = measure_cost_model(toy_loop(tmp_path / "run", algorithm=gated), repeats=1)
    assert {unit for m in report.measurements for unit in m.units} == {"block_0", "block_1"}


def test_more_memory_is_measured_where_more_is_predicted(tmp_path):
    loop = toy_loop(tmp_path / "run", algorithm=BlockExpansion([0, 2]))
    report = measure_cost_model(loop, repeats=1)
    assert [m.units for m in report.measurements] == [("block_0",), ("block_1",), ("block_0", "block_1")]
    assert report.memory_rank_correlation == pytest.approx(1, abs=1e-4)
    assert max(map(abs, report.memory_errors(report.measurements[-1]))) < 0.25
    assert "rank correlation" in str(report)
