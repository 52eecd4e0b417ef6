"""Gradients that add up over several batches are those of one batch with all their labels."""

import math

import pytest
import torch
from test_trainer import started
from toy import ToyData

from fedbe.client.accumulation import Accumulation, count_labels
from fedbe.client.trainer import batches_per_step, local_steps
from fedbe.config.build import check_shares
from fedbe.data.batch import IGNORED
from fedbe.objectives import FedProx, Plain


class Uneven(ToyData):
    """Eight samples, the first with eleven labels and each other with one or two."""

    def client_dataset(self, client_id):
        tokens = super().client_dataset(client_id).rows[:8]
        rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
        for index, row in enumerate(rows[1:]):
            row["labels"][: 10 + index % 2] = IGNORED
        return rows


def step(batch_size, accumulate, objective=None, **trainer):
    """What one step of plain SGD does to the trained tensors of a client."""
    options = {"max_steps": 1, "accumulate_grad_batches": accumulate, **trainer}
    engine, tasks = started(
        data=Uneven(samples=(8,), batch_size=batch_size),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        objective=objective or Plain(),
        trainer=options,
    )
    update = engine.training.train(tasks[0])
    moved = [(update.tensors[name] - tasks[0].received[name]).flatten() for name in tasks[0].trainable_names]
    return torch.cat(moved), update


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("objective", [Plain, lambda: FedProx(0.1)])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 8), (2, 4), (3, 3), (8, 4), (3, 20)])
def test_a_step_of_several_batches_is_that_of_one(batch_size, accumulate, objective, clip):
    whole, _ = step(8, 1, objective(), gradient_clip_val=clip)
    parts, update = step(batch_size, accumulate, objective(), gradient_clip_val=clip)
    assert whole.abs().max() > 0 and torch.allclose(whole, parts, rtol=1e-4, atol=1e-7)
    assert update.samples == 8


def test_a_single_batch_and_batches_with_as_many_labels_each_are_left_as_they_are_to_the_bit():
    one, equal = Accumulation(), Accumulation(2)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 0.3)
    assert one.weight({"labels": torch.ones(2, 5)}) == 1
    assert [equal.weight({"labels": torch.ones(2, 5)}) for _ in range(2)] == [1, 1]
    for accumulation in (one, equal):
        accumulation.end([parameter])
    assert torch.equal(parameter.grad, torch.full((2,), 0.3))


def test_labels_are_counted_as_the_loss_counts_them():
    labels = torch.tensor([[3, 3, IGNORED, 3], [3, IGNORED, IGNORED, IGNORED]])
    assert count_labels({"labels": labels}) == 2
    assert count_labels({"labels": torch.tensor([0, 1, 1])}) == 3
    assert count_labels({"input_ids": labels}) == 2


@pytest.mark.parametrize("limit", [1.0, 3, 0.5])
@pytest.mark.parametrize("lasts", [{"max_steps": 5}, {"max_epochs": 3}])
@pytest.mark.parametrize("batches", [2, 7, 8])
def test_batches_are_counted_that_a_client_really_takes(batches, lasts, limit):
    options = {"accumulate_grad_batches": 4, "limit_train_batches": limit, **lasts}
    epoch = range(min(batches, limit) if isinstance(limit, int) else int(batches * limit))
    windows = [len(epoch[start : start + 4]) for start in range(0, len(epoch), 4)]
    steps = local_steps(options, batches)
    taken = (windows * 5)[:steps]
    assert len(taken) == steps and math.isclose(batches_per_step(options, batches), sum(taken) / steps)


def test_a_share_that_leaves_a_client_nothing_is_a_problem_before_the_start():
    data = ToyData(samples=(3, 40))
    assert not check_shares({"limit_train_batches": 0.25}, ToyData(samples=(16, 40)))
    assert not check_shares({"limit_train_batches": 1}, data) and not check_shares({}, data)
    (problem,) = check_shares({"limit_train_batches": 0.25}, data)
    assert problem.key == "trainer.limit_train_batches" and "2 of 4" in problem.remedy and "client-0" in problem.remedy
