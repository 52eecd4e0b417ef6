"""What goes over the channel, message by message, in every case: what the strategy sends, and what a client trained."""

import json
import logging

import numpy as np
import pytest
import torch
from parties import CLIENTS, Marked, OwnRows, client, over_bytes
from test_loopback import CASES, one_thread  # noqa: F401 (a fixture)
from toy import tiny_llama

from fedbe.algorithms import FedSALoRA
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.quorum import Quorum
from fedbe.messages import (
    Evaluate,
    Evaluation,
    Farewell,
    FitTask,
    Greeting,
    Prepare,
    Prepared,
    Probe,
    ProbeReport,
    Update,
    payload_bytes,
)

DOWN, UP = (Probe, Prepare, FitTask, Evaluate, Farewell), (Greeting, ProbeReport, Prepared, Update, Evaluation)
METRICS = {"loss", "first_loss", "last_loss", "seconds"}
WINDOW = 6
FOLLOWED = {**CASES, "adapters of one's own": lambda: {"algorithm": FedSALoRA(rank=2), "rounds": 3, "cohort": 2}}


class Watch(FederatedCallback):
    """Notes what the server means to send, and the model's state and frozen weights at that moment."""

    def __init__(self):
        self.tasks = []

    def on_client_start(self, run, task):
        shapes = {name: tensor.shape for name, tensor in run.model.named_parameters()}
        self.tasks.append((task, shapes, set(run.state)))


def rows_in(data: bytes, rows: torch.Tensor) -> bool:
    """Whether a part of a row stands in these bytes, as numbers of any type or as JSON."""
    for row in rows.tolist():
        part = row[:WINDOW]
        forms = [np.array(part, kind).tobytes() for kind in ("<i8", "<i4", "<i2", "u1", "<f4", "<f2", "<f8")]
        forms += [separator.join(map(str, part)).encode() for separator in (",", ", ", " ")]
        if any(form in data for form in forms):
            return True
    return False


def own_tensors(message):
    task = message.task if isinstance(message, Evaluate) else message
    parts = (getattr(task, part, {}) for part in ("received", "tensors", "extra"))
    return [tensor for part in parts for tensor in part.values()]


def check_task(task, given):
    intended, shapes, state = given
    assert (task.trainable_names, task.structure) == (intended.trainable_names, dict(intended.structure))
    for part in ("received", "extra"):
        found, expected = getattr(task, part), getattr(intended, part)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    frozen = shapes.keys() - state
    assert not frozen & task.received.keys() and not frozen & task.extra.keys()


def check_update(update, task, given):
    _, shapes, state = given
    assert update.tensors.keys() <= {*task.trainable_names, *(task.received.keys() - state)}
    assert update.extra.keys() <= task.extra.keys()
    for name, tensor in [*update.tensors.items(), *update.extra.items()]:
        most = task.received[name].shape if name in task.received else shapes[name]
        assert all(size <= limit for size, limit in zip(tensor.shape, most, strict=True))
    assert all(name in METRICS or name.startswith("gradient_norm/block_") for name in update.metrics)


@pytest.mark.filterwarnings("ignore:The base model scores 0 on:UserWarning")
@pytest.mark.parametrize("case", FOLLOWED)
def test_nothing_travels_but_what_is_asked_for_and_no_token_does(case, tmp_path):
    watch = Watch()

    def make():
        given = FOLLOWED[case]()
        return {**given, "callbacks": [*given.get("callbacks", ()), watch]}

    channel = over_bytes(make, tmp_path / "run")
    given = {(entry[0].client_id, entry[0].round_index): entry for entry in watch.tasks}
    rows = torch.cat([Marked().client_dataset(name).rows for name in CLIENTS])
    under_way = {}
    for sent in channel.seen:
        message, tensors = sent.message, own_tensors(sent.message)
        assert isinstance(message, DOWN if sent.way == "down" else UP)
        others = [name for name in CLIENTS if name != sent.address]
        assert sent.address.encode() in sent.data and not any(name.encode() in sent.data for name in others)
        assert all(tensor.is_floating_point() for tensor in tensors)
        assert len(sent.data) <= payload_bytes(tensors) + 400 * len(tensors) + 2**14
        assert not rows_in(sent.data, rows)
        if isinstance(message, FitTask):
            under_way[sent.address] = message
            check_task(message, given[message.client_id, message.round_index])
        if isinstance(message, Update):
            task = under_way[sent.address]
            check_update(message, task, given[task.client_id, task.round_index])
        if isinstance(message, ProbeReport):
            assert len(message.scores) == tiny_llama().config.num_hidden_layers and message.labels is None
    assert len(given) == sum(isinstance(sent.message, FitTask) for sent in channel.seen) > 0


def test_the_search_for_rows_finds_them():
    rows = Marked().client_dataset("client-0").rows
    for hidden in (rows.numpy().tobytes(), rows.int().numpy().tobytes(), json.dumps(rows.tolist()).encode()):
        assert rows_in(b"before" + hidden, rows)
    assert not rows_in(bytes(1000), rows)


def test_a_b_of_one_s_own_never_travels(tmp_path):
    channel = over_bytes(FOLLOWED["adapters of one's own"], tmp_path / "run")
    assert [
        sent.way for sent in channel.seen if any(".lora_B." in name for name in received_or_sent(sent.message))
    ] == []


def received_or_sent(message):
    task = message.task if isinstance(message, Evaluate) else message
    return [*getattr(task, "received", ()), *getattr(task, "tensors", ())]


class Quoting(OwnRows):
    """An error of its own data, which quotes a row."""

    def collate(self, samples):
        if self.client_id == "client-1":
            raise ValueError(f"cannot read {samples[0]['input_ids'].tolist()}, of SECRET")
        return super().collate(samples)


def test_an_error_that_quotes_a_client_s_data_stays_with_the_client(tmp_path, caplog):
    def make():
        return {"quorum": Quorum(1)}

    clients = [client(make, name, Quoting) for name in CLIENTS]
    rows = Marked().client_dataset("client-1").rows
    for member in clients:  # it prepares its model before its data goes wrong
        member._first_rows = lambda: {"input_ids": rows[:2] * 0, "labels": rows[:2] * 0}
    with caplog.at_level(logging.WARNING):
        channel = over_bytes(make, tmp_path / "run", clients)
    assert "SECRET" in caplog.text
    assert not any(b"SECRET" in sent.data or rows_in(sent.data, rows) for sent in channel.seen)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert [failure["client"] for failure in record["failures"]] == ["client-1"]
    assert "ValueError in test_loopback_messages, line" in record["failures"][0]["reason"]
