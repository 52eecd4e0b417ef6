"""What clients of a round have sent lies on disk until the round is done, whole or not at all."""

from dataclasses import replace

import pytest
import torch

from fedbe.federation.kept_outcomes import KeptOutcomes
from fedbe.messages import Failure, FitTask, Update

TASK = FitTask("a/b", 0, 3, {}, ("w",))
UPDATE = Update(
    "a/b",
    {"z": torch.ones(2, dtype=torch.bfloat16), "a": torch.zeros(())},
    4,
    {"loss": float("nan")},
    {"c": torch.ones(1)},
)
KEPT = {"tensors/w": torch.arange(3.0), "objective/w": torch.zeros(0)}


@pytest.fixture
def store(tmp_path):
    return KeptOutcomes(tmp_path / "round", "this run")


def test_an_update_and_what_the_client_keeps_come_back(store):
    assert store.load(TASK) is None
    store.save(TASK, UPDATE, KEPT)
    outcome, kept = store.load(TASK)
    assert (outcome.client_id, outcome.samples, list(outcome.tensors)) == ("a/b", 4, ["z", "a"])
    assert all(torch.equal(outcome.tensors[name], tensor) for name, tensor in UPDATE.tensors.items())
    assert torch.equal(outcome.extra["c"], torch.ones(1)) and outcome.metrics["loss"] != outcome.metrics["loss"]
    assert list(kept) == list(KEPT) and all(torch.equal(kept[name], tensor) for name, tensor in KEPT.items())


def test_a_failure_comes_back(store):
    failure = Failure("a/b", "memory", "no room", "v")
    store.save(TASK, failure, {})
    assert store.load(TASK) == (failure, {})


def test_tensors_that_are_the_same_object_can_be_kept(store):
    own = torch.ones(2)
    store.save(TASK, UPDATE, {"tensors/w": own, "objective/w": own, "tensors/part": own[:1]})
    assert len(store.load(TASK)[1]) == 3


@pytest.mark.parametrize(
    "other", [replace(TASK, client_id="a"), replace(TASK, round_index=4), replace(TASK, experience=1)]
)
def test_another_task_is_not_known(store, other):
    store.save(TASK, UPDATE, KEPT)
    assert store.load(other) is None


def test_another_run_s_outcome_is_not_known(store):
    store.save(TASK, UPDATE, KEPT)
    assert KeptOutcomes(store.folder, "another run").load(TASK) is None


def test_a_torn_or_changed_file_is_not_known(store):
    store.save(TASK, UPDATE, KEPT)
    [path] = store.folder.iterdir()
    whole = path.read_bytes()
    for end in range(0, len(whole), 41):
        path.write_bytes(whole[:end])
        assert store.load(TASK) is None
    for place in range(0, len(whole), 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert store.load(TASK) is None
    path.write_bytes(whole)
    assert store.load(TASK) is not None


def test_what_is_no_message_is_not_kept_and_ends_nothing(store):
    sparse = torch.eye(2).to_sparse()
    store.save(TASK, replace(UPDATE, tensors={"w": sparse}), {})
    store.save(TASK, UPDATE, {"tensors/w": sparse})
    assert store.load(TASK) is None


def test_all_are_forgotten_when_the_round_is_done(store):
    store.clear()
    store.save(TASK, UPDATE, KEPT)
    store.clear()
    assert store.load(TASK) is None and not store.folder.exists()
