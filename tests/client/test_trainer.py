"""Each client's Trainer: made once, copied for each, and without a hand on the process's signals."""

import os
import signal
import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from toy import ToyData, toy_plan

from fedbe.client.plan import prepare_model
from fedbe.client.trainer import Trainers, fit, most_samples, quiet_trainer
from fedbe.engines import InProcess
from fedbe.errors import Terminated
from fedbe.messages import FitTask, Update
from fedbe.modeling.tensors import copy_tensors


class Counting(L.Callback):
    """Counts the batches that it has seen, whoever trained on them."""

    def __init__(self):
        self.batches = 0
        self.seen = []

    def on_train_batch_end(self, *arguments):
        self.batches += 1

    def on_fit_end(self, trainer, module):
        ENDS.append(self.batches)


ENDS = []


def started(**changes):
    """An engine whose model is prepared, and what its clients are given."""
    plan = toy_plan(**changes)
    engine = InProcess()
    engine.start(plan)
    inputs = next(iter(plan.data.val_dataloader()))
    prepare_model(plan, inputs)
    engine.prepared(inputs, plan.adaptation.structure())
    names = plan.adaptation.trainable_names
    state = copy_tensors(plan.model, plan.adaptation.state_names)
    return engine, [FitTask(client, 0, 0, state, names) for client in plan.data.client_ids]


def test_no_state_of_a_callback_passes_between_clients_and_none_comes_back():
    ENDS.clear()
    counting = Counting()
    engine, tasks = started(trainer={"callbacks": [counting]})
    assert all(isinstance(outcome, Update) for _, outcome in engine.fit(tasks))
    assert ENDS == [3, 3, 3, 3] and counting.batches == 0


def test_the_steps_of_a_task_are_those_of_its_trainer_and_of_no_other(monkeypatch):
    made = []
    monkeypatch.setattr("fedbe.client.trainer.quiet_trainer", lambda options: made.append(options) or L.Trainer())
    trainers = Trainers({"max_steps": 5})
    first, second = trainers.new(2), trainers.new()
    assert made == [{"max_steps": 2}, {"max_steps": 5}]
    assert trainers.new(2) is not first and trainers.new() is not second and len(made) == 2


def test_a_trainer_trains_like_one_that_was_made_for_it():
    options = {"accelerator": "cpu", "max_steps": 3, "max_epochs": -1}
    engine, tasks = started(trainer=options)
    copied = engine.attempt(tasks[1])
    engine.training.trainers.new = lambda steps: quiet_trainer(options)
    made = engine.attempt(tasks[1])
    assert copied.samples == made.samples == 10
    assert all(torch.equal(tensor, made.tensors[name]) for name, tensor in copied.tensors.items())


class At(L.Callback):
    """Does something in the first batch."""

    def __init__(self, what):
        self.what = what

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 0:
            self.what()


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_the_run_handles_does_not_end_the_client(number, handlers):
    noted = []
    signal.signal(number, lambda *_: noted.append(number))
    handler = signal.getsignal(number)
    inside = []

    def act():
        inside.append(signal.getsignal(number))
        os.kill(os.getpid(), number)

    engine, tasks = started(trainer={"callbacks": [At(act)]})
    outcome = engine.attempt(tasks[1])
    assert isinstance(outcome, Update) and noted == [number]
    assert inside == [handler] and signal.getsignal(number) is handler


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Terminated])
def test_an_interrupt_is_one_of_the_run_and_its_kind_stays(kind, handlers):
    def act():
        raise kind

    engine, tasks = started(trainer={"callbacks": [At(act)]})
    with pytest.raises(KeyboardInterrupt) as raised:
        engine.attempt(tasks[0])
    assert type(raised.value) is kind
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]


def test_a_terminated_run_is_interrupted_whatever_lightning_makes_of_it():
    class Ends:
        def fit(self, module, batches):
            raise SIGTERMException

    with pytest.raises(Terminated):
        fit(Ends(), None, [])
    assert issubclass(Terminated, KeyboardInterrupt)


def test_an_exit_of_the_client_s_own_code_is_one():
    class Exits(At):
        def on_train_batch_start(self, *arguments):
            raise SystemExit(3)

    engine, tasks = started(trainer={"callbacks": [Exits(None)]})
    with pytest.raises(SystemExit):
        engine.attempt(tasks[0])


def test_clients_train_outside_of_the_main_thread():
    engine, tasks = started()
    found = []
    thread = threading.Thread(target=lambda: found.append(engine.attempt(tasks[0])))
    thread.start()
    thread.join()
    assert isinstance(found[0], Update)


def test_an_epoch_counts_where_a_task_says_nothing_of_steps():
    engine, tasks = started(trainer={"max_steps": -1, "max_epochs": 1}, data=ToyData(clients=1, samples=(10,)))
    assert engine.attempt(tasks[0]).samples == 10


@pytest.mark.parametrize(
    ("options", "samples", "most"),
    [
        ({"max_steps": 3}, 0, 0),
        ({"max_epochs": 2}, 0, 0),
        ({"max_steps": 3}, 5, 9),  # batches of 4, 1 and 4 samples
        ({"max_steps": 2}, 100, 8),
        ({"max_epochs": 2}, 5, 10),
        ({"max_steps": 9, "max_epochs": 1}, 5, 5),
    ],
)
def test_a_client_counts_for_the_samples_that_it_can_have_seen(options, samples, most):
    assert most_samples(options, samples, 4) == most
