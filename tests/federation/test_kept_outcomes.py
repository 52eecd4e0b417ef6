"""What clients of a round have sent lies on disk until the round is done, whole or not at all."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from full_disk import no_room
from toy import toy_loop

from fedbe.callbacks import CheckpointCallback
from fedbe.errors import StorageError
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.kept_outcomes import KeptOutcomes
from fedbe.messages import Failure, FitTask, Update
from fedbe.storage.checkpoint import Checkpoints, read_checkpoint

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


def test_an_outcome_for_which_there_is_no_room_leaves_nothing_and_the_ones_before_it(store):
    store.save(TASK, UPDATE, KEPT)
    files = list(store.folder.iterdir())
    with no_room(), pytest.raises(StorageError, match=r"what client 'b' sent cannot be written, .*--ckpt_path last"):
        store.save(replace(TASK, client_id="b"), UPDATE, KEPT)
    assert list(store.folder.iterdir()) == files and store.load(TASK) is not None
    with no_room(), pytest.raises(StorageError):
        store.save(TASK, UPDATE, KEPT)
    assert store.load(TASK) is not None


class FullAt(FederatedCallback):
    """A disk that is full from a client's end on, or from the end of the last round on."""

    def __init__(self, stack, client=None):
        self.stack, self.client = stack, client

    def on_client_start(self, run, task):
        if run.record.round == 2 and task.client_id == self.client:
            self.stack.enter_context(no_room())

    def on_run_end(self, run):
        if self.client is None:
            self.stack.enter_context(no_room())


@pytest.mark.parametrize("client", ["client-2", None])
def test_a_run_that_met_a_full_disk_goes_on_to_the_same_result_when_there_is_room(tmp_path, client):
    def make(name, *more):
        return toy_loop(tmp_path / name, rounds=2, callbacks=[CheckpointCallback(each_client=True), *more])

    whole = make("whole")
    whole.run()
    what = f"what client '{client}' sent" if client else "the model|summary"
    with ExitStack() as full, pytest.raises(StorageError, match=rf"({what}).* cannot be written.*--ckpt_path last"):
        make("run", FullAt(full, client)).run()
    folder = tmp_path / "run"
    assert not list(folder.rglob("*partial*")) and not (folder / "summary.json").exists()
    rest = make("run")
    rest.run(read_checkpoint(next(Checkpoints(folder / "checkpoints").newest_first())))
    assert all(torch.equal(tensor, rest.server.state[name]) for name, tensor in whole.server.state.items())
    assert (folder / "summary.json").exists() and not (folder / "checkpoints" / "round").exists()
