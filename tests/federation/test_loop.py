import json
import signal

import lightning as L
import pytest
import torch
from toy import ToyData, resumed, tiny_llama, toy_loop
from transformers import AutoModelForCausalLM

from fedbe.adaptation.blocks import Blocks
from fedbe.algorithms import Algorithm, BlockExpansion, Strategy
from fedbe.callbacks import CheckpointCallback
from fedbe.engines import InProcess
from fedbe.errors import QuorumError
from fedbe.federation.callback import FederatedCallback
from fedbe.messages import Update
from fedbe.modeling.tensors import copy_tensors


class Recorder(FederatedCallback):
    """Notes the hooks in the order in which they are called."""

    def __init__(self):
        self.calls = []
        self.updates = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda loop, *arguments: self._note(name, arguments)
        return super().__getattribute__(name)

    def _note(self, name, arguments):
        self.calls.append(name)
        if name == "on_client_end":
            self.updates.append(arguments[1])


class ByTable(Strategy):
    def __init__(self, table):
        self.table = table

    def allocate(self, cohort, round_index):
        return {client: self.table[client] for client in cohort}


class OnlyBlocks(BlockExpansion):
    """Gives each client the units that a table says."""

    def __init__(self, positions, table):
        super().__init__(positions)
        self.strategy = ByTable(table)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def run_state(folder, **changes):
    loop = toy_loop(folder, **changes)
    loop.run()
    return loop.server.state


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_hooks_come_in_the_documented_order(tmp_path):
    recorder = Recorder()
    toy_loop(tmp_path / "run", rounds=2, cohort=2, callbacks=[recorder]).run()
    client = ["on_client_start", "on_client_update", "on_client_end"]
    one_round = ["on_round_start", *client, *client, "on_aggregate", "on_round_end", "on_round_written"]
    start = ["on_run_start", "on_round_written"]
    assert recorder.calls == [*start, *one_round, *one_round, "on_last_round", "on_run_end", "on_run_written"]


def test_training_learns_and_frozen_tensors_stay_to_the_bit(tmp_path):
    base = tiny_llama()
    before = {name: tensor for name, tensor in base.state_dict().items() if ".layers." not in name}
    options = {"rounds": 6, "cohort": 3, "trainer": {"max_steps": 8}}
    loop = toy_loop(tmp_path / "run", data=ToyData(clients=8), **options)
    loop.setup()
    frozen = {n: t for n, t in snapshot(loop.model).items() if n not in loop.algorithm.adaptation.trainable_names}
    assert len(frozen) > 20
    loop = toy_loop(tmp_path / "again", data=ToyData(clients=8), **options)
    summary = loop.run()
    after = snapshot(loop.model)
    assert_same(frozen, {name: after[name] for name in frozen})
    assert_same(before, {name: after[name] for name in before})
    assert summary["downstream"]["loss"] < summary["downstream_base"]["loss"] - 0.05


class TrainingSpy(L.Callback):
    """Notes which parameters have a gradient at a step, and optimizer state at the end; one for all clients."""

    def __init__(self):
        self.with_gradient, self.with_state = set(), set()

    def __deepcopy__(self, memo):
        return self

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.with_gradient |= {name for name, p in pl_module.model.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer, pl_module):
        state = trainer.optimizers[0].state
        self.with_state |= {name for name, p in pl_module.model.named_parameters() if p in state}


def test_no_frozen_parameter_has_a_gradient_or_optimizer_state(tmp_path):
    seen, training = [], TrainingSpy()

    def spy(parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        seen.append(optimizer)
        return optimizer

    loop = toy_loop(tmp_path / "run", rounds=1, optimizer=spy, trainer={"callbacks": [training]})
    loop.run()
    assert training.with_gradient == training.with_state == set(loop.algorithm.adaptation.trainable_names)
    trainable = {id(loop.model.get_parameter(name)) for name in loop.algorithm.adaptation.trainable_names}
    for optimizer in seen:
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trainable
        assert not optimizer.state, "kept until the garbage collector comes"
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_only_what_was_trained_travels(tmp_path):
    recorder = Recorder()
    loop = toy_loop(tmp_path / "run", rounds=1, callbacks=[recorder])
    loop.run()
    assert len(recorder.updates) == 4
    for update in recorder.updates:
        assert set(update.tensors) == set(loop.algorithm.adaptation.trainable_names)


@pytest.mark.parametrize(
    ("trainer", "samples"),
    [({"max_steps": -1, "max_epochs": 1}, [6, 10, 14, 18]), ({"max_steps": 3}, [4 + 2 + 4, 4 + 4 + 2, 12, 12])],
)
def test_samples_are_those_really_seen(tmp_path, trainer, samples):
    recorder = Recorder()
    toy_loop(tmp_path / "run", rounds=1, callbacks=[recorder], trainer=trainer).run()
    assert [update.samples for update in recorder.updates] == samples


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(tmp_path):
    first = run_state(tmp_path / "a", cohort=2)
    assert_same(first, run_state(tmp_path / "b", cohort=2))
    other = run_state(tmp_path / "c", cohort=2, seed=1)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class ShuffledEngine(InProcess):
    """Runs the clients in another order, and returns their updates in the order of the cohort."""

    def __init__(self, order):
        self.order = order

    def fit(self, tasks):
        tasks = list(tasks)
        updates = {i: self.training.train(tasks[i]) for i in self.order}
        yield from ((task, updates[i]) for i, task in enumerate(tasks))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_order_in_which_clients_ran_does_not_matter(tmp_path, dropout):
    reference = run_state(tmp_path / "a", model=tiny_llama(dropout=dropout))
    loop = toy_loop(tmp_path / "b", model=tiny_llama(dropout=dropout), engine=ShuffledEngine([2, 0, 3, 1]))
    loop.run()
    assert_same(reference, loop.server.state)


def test_the_global_generator_has_no_influence_and_is_left_alone(tmp_path):
    torch.manual_seed(1)
    first = run_state(tmp_path / "a", model=tiny_llama(dropout=0.5))
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    second = run_state(tmp_path / "b", model=tiny_llama(dropout=0.5))
    assert torch.equal(torch.rand(1), expected)
    assert_same(first, second)


def test_one_client_s_tensors_do_not_reach_another(tmp_path):
    recorder = Recorder()
    together = toy_loop(tmp_path / "a", rounds=1, callbacks=[recorder])
    together.run()
    alone = toy_loop(tmp_path / "b", rounds=1)
    alone.setup()
    alone.progress.started = 1
    task = alone.server.task("client-2", 0, 0, ("block_0", "block_1"))
    update = alone.engine.training.train(task)
    assert_same(recorder.updates[2].tensors, update.tensors)


def test_a_client_trains_the_blocks_allocated_to_it_and_the_mean_is_over_holders(tmp_path):
    table = {"client-0": ("block_0",), "client-1": ("block_1",), "client-2": ("block_1",), "client-3": ("block_1",)}
    recorder = Recorder()
    loop = toy_loop(tmp_path / "run", rounds=1, algorithm=OnlyBlocks([0, 2], table), callbacks=[recorder])
    loop.run()
    low, high = loop.algorithm.adaptation.units()["block_0"], loop.algorithm.adaptation.units()["block_1"]
    assert set(recorder.updates[0].tensors) == set(low)
    assert_same({name: loop.server.state[name] for name in low}, recorder.updates[0].tensors)
    name = high[0]
    weights = torch.tensor([u.samples for u in recorder.updates[1:]], dtype=torch.float64)
    stacked = torch.stack([u.tensors[name].double() for u in recorder.updates[1:]])
    shape = (-1, *[1] * (stacked.dim() - 1))
    torch.testing.assert_close(
        loop.server.state[name], ((weights / weights.sum()).view(shape) * stacked).sum(0).float(), rtol=1e-5, atol=1e-7
    )


def test_a_block_that_nobody_trains_keeps_its_value(tmp_path):
    table = {f"client-{k}": ("block_1",) for k in range(4)}
    loop = toy_loop(tmp_path / "run", rounds=1, algorithm=OnlyBlocks([0, 2], table))
    loop.setup()
    names = loop.algorithm.adaptation.units()["block_0"]
    before = {name: loop.server.state[name].clone() for name in names}
    loop = toy_loop(tmp_path / "again", rounds=1, algorithm=OnlyBlocks([0, 2], table))
    loop.run()
    assert_same(before, {name: loop.server.state[name] for name in names})


def test_a_client_that_takes_no_step_is_an_error_with_its_name(tmp_path):
    class Idle(InProcess):
        def fit(self, tasks):
            for task in tasks:
                yield task, Update(task.client_id, dict(task.received), 0, {"seconds": 0.0})

    loop = toy_loop(tmp_path / "run", engine=Idle())
    with pytest.raises(QuorumError, match=r"client-0.*a weight must be positive"):
        loop.run()


def test_callbacks_hear_of_an_exception(tmp_path):
    class Broken(InProcess):
        def fit(self, tasks):
            raise RuntimeError("no power")

    recorder = Recorder()
    loop = toy_loop(tmp_path / "run", callbacks=[recorder], engine=Broken())
    with pytest.raises(RuntimeError, match="no power"):
        loop.run()
    assert recorder.calls[-1] == "on_exception"


def test_an_interrupt_while_a_client_trains_reaches_the_caller(tmp_path):
    class CtrlC(L.Callback):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    recorder, handler = Recorder(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_loop(tmp_path / "run", callbacks=[recorder], trainer={"callbacks": [CtrlC()]}).run()
    assert recorder.calls[-1] == "on_exception"
    assert signal.getsignal(signal.SIGINT) == handler


def test_the_run_folder_holds_records_summary_and_a_plain_model(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=2, cohort=2)
    loop.run()
    records = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2]
    assert records[1]["allocation"] == {client: ["block_0", "block_1"] for client in records[1]["cohort"]}
    assert json.loads(loop.folder.summary.read_text()) == json.loads(json.dumps(loop.summary))
    model = AutoModelForCausalLM.from_pretrained(loop.folder.model).eval()
    assert model.config.num_hidden_layers == 5
    ids = loop.plan.data.validation_dataset().rows
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, loop.model.eval()(ids).logits)


class UpperBlockKept(Blocks):
    """Sends one block and keeps the other."""

    def prepare(self, model, inputs, structure=None):
        super().prepare(model, inputs, structure)
        self.initial = copy_tensors(model, self.units()["block_1"])

    def begin(self, model, task, kept):
        super().begin(model, task, {**self.initial, **kept})

    def finish(self, model, task, kept):
        units = self.units()
        return copy_tensors(model, units["block_0"]), copy_tensors(model, units["block_1"])


class SendsTheLowerBlock(Strategy):
    def send(self, state, client_id):
        return {name: state[name] for name in self.adaptation.units()["block_0"]}


def keeps_the_upper_block(kind=UpperBlockKept):
    return Algorithm(kind([0, 2]), SendsTheLowerBlock())


def kept_by(loop, client):
    return loop.engine.memory.get(client, loop.server.accepted[client]).tensors


def test_what_a_client_keeps_is_its_own_whatever_the_order_and_is_in_the_checkpoint(tmp_path):
    loops = []
    for name, order in (("a", [0, 1, 2, 3]), ("b", [3, 1, 0, 2])):
        loop = toy_loop(
            tmp_path / name, algorithm=keeps_the_upper_block(), callbacks=[CheckpointCallback()],
            engine=ShuffledEngine(order),
        )  # fmt: skip
        loop.run()
        loops.append(loop)
    assert_same(loops[0].server.state, loops[1].server.state)
    clients = loops[0].plan.data.client_ids
    for client in clients:
        assert_same(kept_by(loops[0], client), kept_by(loops[1], client))
    assert not torch.equal(*(next(iter(kept_by(loops[0], f"client-{k}").values())) for k in (0, 1)))
    again = resumed(toy_loop(tmp_path / "a", algorithm=keeps_the_upper_block(), callbacks=[CheckpointCallback()]))
    for client in clients:
        assert_same(kept_by(loops[0], client), kept_by(again, client))


def test_a_client_without_a_value_to_start_from_is_refused(tmp_path):
    class Forgetful(UpperBlockKept):
        begin = Blocks.begin

    with pytest.raises(QuorumError, match=r"client-0.*has no value to start from"):
        toy_loop(tmp_path / "run", algorithm=keeps_the_upper_block(Forgetful)).run()


def test_stop_ends_after_the_round_and_keeps_the_first_reason(tmp_path):
    class Stopper(FederatedCallback):
        def on_round_end(self, loop):
            loop.stop("enough")
            loop.stop("really")

    loop = toy_loop(tmp_path / "run", rounds=5, callbacks=[Stopper()])
    assert loop.run()["stop_reason"] == "enough"
    assert loop.progress.completed == 1


def test_a_loop_continues_from_its_checkpoint_to_the_same_tensors(tmp_path):
    whole = toy_loop(tmp_path / "a", rounds=4, cohort=2)
    whole.run()
    half = toy_loop(tmp_path / "b", rounds=4, cohort=2, callbacks=[CheckpointCallback()])
    half.setup()
    half.on_run_start()
    half.advance()
    half.advance()
    rest = resumed(toy_loop(tmp_path / "b", rounds=4, cohort=2, callbacks=[CheckpointCallback()]))
    while not rest.done:
        rest.advance()
    assert_same(whole.server.state, rest.server.state)
    assert [r["downstream"] for r in whole.history] == [r["downstream"] for r in rest.history]
