import pytest
from toy import toy_loop

from fedbe.algorithms import FedSALoRA
from fedbe.bench.overhead import measure_overhead
from fedbe.engines import Forked
from fedbe.errors import ConfigError


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_bare_loop_takes_the_very_same_steps(tmp_path, clip):
    loop = toy_loop(tmp_path / "run", rounds=4, cohort=2, trainer={"gradient_clip_val": clip})
    result = measure_overhead(loop, rounds=2)
    assert result.largest_difference == 0
    assert len(result.ratios) == 2 and result.client_runs == 4
    assert f"{sorted(result.federated_seconds)[0]:.3f}" in str(result)


@pytest.mark.parametrize(
    "trainer", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"max_steps": -1, "max_epochs": 1}]
)
def test_what_the_bare_loop_does_not_do_is_refused(tmp_path, trainer):
    with pytest.raises(ConfigError, match=r"trainer\."):
        measure_overhead(toy_loop(tmp_path / "run", rounds=4, trainer=trainer), rounds=2)


def test_clients_that_keep_tensors_begin_from_them_in_the_bare_loop_too(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=4, algorithm=FedSALoRA(rank=2), engine=Forked(2))
    assert measure_overhead(loop, rounds=2).largest_difference == 0
