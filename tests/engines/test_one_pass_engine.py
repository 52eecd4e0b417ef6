"""Runs with several clients in one pass end where runs with one after another end."""

import pytest
import torch
from toy import ToyData, resumed, tiny_llama, toy_loop
from transformers import BertConfig, BertForSequenceClassification

from fedbe.algorithms import BlockExpansion, FedAvg, FedBE, FedIT, FLoRA, Gated, LocalOnly, Unfreeze
from fedbe.algorithms.base import Strategy
from fedbe.callbacks import CheckpointCallback
from fedbe.client.schedule import Schedule
from fedbe.engines import InProcess, OnePass
from fedbe.errors import ConfigError, Facts
from fedbe.expansion import FixedPlacement
from fedbe.federation.callback import FederatedCallback
from fedbe.objectives import Anchor, FedProx, Plain, Scaffold
from fedbe.prefix.store import PrefixReuse
from fedbe.traits import Trait


class Recorder(FederatedCallback):
    def __init__(self):
        self.updates = []

    def on_client_end(self, run, task, update):
        self.updates.append(update)


class Table(Strategy):
    """Each client trains the blocks that a table says."""

    def __init__(self, table):
        self.table = table

    def allocate(self, cohort, round_index):
        return {client: self.table[index % len(self.table)] for index, client in enumerate(cohort)}


def allocated(positions, table):
    algorithm = BlockExpansion(positions)
    algorithm.strategy = Table(table)
    return algorithm


class Unequal(ToyData):
    """Clients' sequences differ in length, those of the last client among each other."""

    def client_dataset(self, client_id):
        rows = super().client_dataset(client_id)
        k = int(client_id[-1])
        own = type(rows)(rows.rows[:, : 12 - 2 * k])
        if k == 3:
            own.__class__ = type("Ragged", (type(rows),), {"__getitem__": shortened})
        return own


def shortened(rows, index):
    row = rows.rows[index][: 3 + index % 4]
    return {"input_ids": row, "labels": row}


class Classes(ToyData):
    num_labels = 3

    def rows(self, step, count, purpose):
        rows = super().rows(step, count, purpose)
        rows.__class__ = type("Labelled", (type(rows),), {"__getitem__": classified})
        return rows


def classified(rows, index):
    return {"input_ids": rows.rows[index][: 6 + index % 3], "labels": rows.rows[index][0] % 3}


def tiny_bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=32, num_labels=3, max_position_embeddings=64, **sizes, **none)
        return BertForSequenceClassification(config).requires_grad_(False).eval()


def run(folder, number=1, **options):
    recorder = Recorder()
    engine = InProcess() if number == 1 else OnePass(number)
    loop = toy_loop(folder, callbacks=[recorder], engine=engine, **options)
    loop.run()
    return loop, recorder.updates


def assert_near(first, second):
    """Two runs' tensors, and what each client says, are equal up to rounding."""
    (loop, updates), (other, other_updates) = first, second
    assert loop.server.state.keys() == other.server.state.keys()
    for name in loop.server.state:
        torch.testing.assert_close(loop.server.state[name], other.server.state[name], rtol=1e-3, atol=2e-4)
    assert [(u.client_id, u.samples, set(u.tensors)) for u in updates] == [
        (u.client_id, u.samples, set(u.tensors)) for u in other_updates
    ]
    for a, b in zip(updates, other_updates, strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        assert {**a.metrics, "seconds": 0} == pytest.approx({**b.metrics, "seconds": 0}, rel=1e-3, abs=1e-5)


def one_pass_only(monkeypatch):
    """Nothing may fall back to one client after another."""
    monkeypatch.setattr("fedbe.engines.one_pass.engine.OnePass.attempt", None)


SETTINGS = {
    "plain": {},
    "unequal steps": {"trainer": {"max_steps": -1, "max_epochs": 3}},
    "whole batches": {"trainer": {"max_steps": -1, "max_epochs": 3}, "data": lambda: ToyData(samples=(8, 4, 16, 12))},
    "limited epochs": {"trainer": {"max_steps": 7, "limit_train_batches": 2}},
    "clipped and scheduled": {
        "trainer": {"max_steps": 5, "gradient_clip_val": 0.05}, "schedule": Schedule("cosine", 2, "run")
    },
    "clipped by value": {"trainer": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}},
    "unequal lengths": {"data": Unequal},
    "unequal units": {
        "algorithm": lambda: allocated([0, 1, 2], [("block_0",), ("block_1", "block_2"), ("block_0", "block_2")])
    },
    "watched": {"algorithm": lambda: FedBE(placement=FixedPlacement([0, 2]))},
    "existing blocks": {"algorithm": lambda: Unfreeze([1])},
    "adapters": {"algorithm": lambda: FedIT(rank=2, alpha=4, dropout=0.0)},
    "a gate": {"algorithm": lambda: Gated(FedBE(placement=FixedPlacement([0, 2])), sequences=4, sequence_length=8)},
    "a gate and unequal lengths": {
        "algorithm": lambda: Gated(BlockExpansion([1]), sequences=4, sequence_length=8), "data": Unequal
    },
    "gated adapters": {
        "algorithm": lambda: Gated(FedIT(rank=2, alpha=4, dropout=0.0, first_block=1), sequences=4, sequence_length=8)
    },
    "a gate over a known prefix": {
        "algorithm": lambda: Gated(BlockExpansion([2]), sequences=4, sequence_length=8), "prefix": PrefixReuse
    },
    "a head": {"model": tiny_bert, "data": Classes},
    "known prefix": {"algorithm": lambda: BlockExpansion([2]), "prefix": PrefixReuse},
    "half precision": {"trainer": {"precision": "bf16-mixed"}},
}  # fmt: skip


def options_of(setting):
    return {name: value() if callable(value) else value for name, value in SETTINGS[setting].items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_clients_in_one_pass_come_to_what_each_comes_to_alone(tmp_path, setting, monkeypatch):
    alone = run(tmp_path / "alone", **options_of(setting))
    one_pass_only(monkeypatch)
    assert_near(alone, run(tmp_path / "together", 4, **options_of(setting)))


def test_the_last_clients_of_a_cohort_may_be_fewer(tmp_path):
    assert_near(run(tmp_path / "alone"), run(tmp_path / "together", 3))


def test_what_data_draws_from_the_global_generator_is_the_client_s_own(tmp_path, monkeypatch):
    class Shifted(ToyData):
        def client_dataset(self, client_id):
            rows = super().client_dataset(client_id)
            rows.__class__ = type("Random", (type(rows),), {"__getitem__": shifted})
            return rows

    def shifted(rows, index):
        row = (rows.rows[index] + torch.randint(32, ())) % 32
        return {"input_ids": row, "labels": row}

    alone = run(tmp_path / "alone", data=Shifted())
    one_pass_only(monkeypatch)
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    assert_near(alone, run(tmp_path / "together", 4, data=Shifted()))
    assert torch.equal(torch.get_rng_state(), expected)


class Failing(ToyData):
    def client_dataset(self, client_id):
        rows = super().client_dataset(client_id)
        if client_id == "client-1":
            rows.__class__ = type("Broken", (type(rows),), {"__getitem__": broken})
        return rows


def broken(rows, index):
    raise OSError("the file is gone")


def test_a_client_that_fails_costs_its_own_round_and_nothing_else(tmp_path):
    alone, together = run(tmp_path / "alone", data=Failing()), run(tmp_path / "together", 4, data=Failing())
    assert_near(alone, together)
    for record in together[0].history[1:]:
        [failure] = record["failures"]
        assert failure["client"] == "client-1" and "the file is gone" in failure["reason"]
    assert all(parameter.grad is None for parameter in together[0].model.parameters())


class Diverging(torch.optim.AdamW):
    """Its second instance in a round makes numbers that are none."""

    made = 0

    def __init__(self, parameters):
        super().__init__(parameters, lr=1e-2, weight_decay=0.0)
        Diverging.made += 1
        self.diverges = Diverging.made % 4 == 2

    def step(self, closure=None):
        super().step(closure)
        if self.diverges:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))


def test_a_client_whose_tensors_diverge_is_left_out_and_touches_no_other(tmp_path, monkeypatch):
    Diverging.made = 0
    options = {"optimizer": Diverging, "trainer": {"gradient_clip_val": 1.0}}
    alone = run(tmp_path / "alone", **options)
    one_pass_only(monkeypatch)
    Diverging.made = 0
    together = run(tmp_path / "together", 4, **options)
    for name, tensor in alone[0].server.state.items():
        torch.testing.assert_close(together[0].server.state[name], tensor, rtol=1e-3, atol=2e-4)
    assert [failure["client"] for failure in together[0].record.failures] == ["client-1"]


def test_frozen_tensors_stay_and_nothing_of_the_clients_is_left(tmp_path):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loop, _ = run(tmp_path / "run", 2, model=model)
    kept = [index for index in range(5) if index not in loop.algorithm.adaptation.expansion.expanded_indices]
    for name, tensor in before.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(kept[int(parts[2])])
        assert torch.equal(model.state_dict()[".".join(parts)], tensor)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_that_is_continued_ends_at_the_same_bits(tmp_path):
    def make(name):
        return toy_loop(tmp_path / name, rounds=3, cohort=3, callbacks=[CheckpointCallback()], engine=OnePass("auto"))

    whole = make("whole")
    whole.setup()
    whole.engine.load_state_dict({"clients_in_one_pass": 2})
    whole.on_run_start()
    whole.advance()
    while not whole.done:
        whole.advance()
    half = make("half")
    half.setup()
    half.engine.load_state_dict({"clients_in_one_pass": 2})
    half.on_run_start()
    half.advance()
    rest = resumed(make("half"))
    assert rest.engine.state_dict() == {"clients_in_one_pass": 2}
    while not rest.done:
        rest.advance()
    assert all(torch.equal(whole.server.state[name], rest.server.state[name]) for name in whole.server.state)


@pytest.mark.parametrize("fastest", [1, 2])
def test_auto_takes_what_was_measured_and_leaves_no_trace(tmp_path, monkeypatch, fastest):
    seen = []

    def measured(plan, most):
        seen.append(most)
        return {1: 1.0, 2: 0.5 if fastest == 2 else 2.0}

    monkeypatch.setattr("fedbe.engines.one_pass.engine.measured", measured)
    loop, updates = run(tmp_path / "auto", "auto", cohort=4)
    assert loop.engine.state_dict() == loop.summary["engine"] == {"clients_in_one_pass": fastest} and seen == [4]
    monkeypatch.undo()
    assert_near((loop, updates), run(tmp_path / "measured", "auto"))


def test_auto_is_one_by_one_where_one_pass_cannot_be(tmp_path):
    for name, options in {"dropout": {"model": tiny_llama(dropout=0.5)}, "all": {"algorithm": FedAvg()}}.items():
        loop, _ = run(tmp_path / name, "auto", rounds=1, **options)
        assert loop.engine.state_dict() == {"clients_in_one_pass": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": lambda: tiny_llama(dropout=0.5)}, "drops at random"),
        ({"algorithm": FedAvg}, "no frozen part of the model in common"),
        ({"algorithm": lambda: FLoRA(rank=2)}, "needs the model to itself"),
        ({"objective": FedProx}, "FedProx needs the model to itself"),
    ],
)
def test_what_cannot_be_in_one_pass_is_refused_before_round_1(tmp_path, options, reason):
    with pytest.raises(ConfigError, match=reason):
        run(tmp_path / "run", 2, **{name: value() for name, value in options.items()})


@pytest.mark.parametrize(
    ("options", "timeout", "reason"),
    [
        ({"accumulate_grad_batches": 2}, None, "one client at a time"),
        ({"max_time": "00:00:01:00"}, None, "one client at a time"),
        ({"precision": "16-mixed"}, None, "one client at a time"),
        ({"callbacks": [Recorder()]}, None, "one client at a time"),
        ({}, 5.0, "no time of their own"),
    ],
)
def test_settings_that_do_not_go_with_one_pass_are_named(options, timeout, reason):
    facts = Facts(trainer=options, timeout_seconds=timeout)
    [problem] = OnePass(2).check("engine.init_args", facts)
    assert problem.key == "engine.init_args.clients" and reason in str(problem)
    assert OnePass("auto").check("engine.init_args", facts) == OnePass(1).check("engine.init_args", facts) == []


def test_what_clients_need_of_the_model_says_whether_several_of_them_can_share_a_pass():
    def missing(engine, algorithm, objective):
        return (engine.needs - algorithm.offers) | ((algorithm.needs | objective.needs) - engine.offers)

    for algorithm in (BlockExpansion(), Unfreeze([0]), FedIT(rank=2), Gated(FedBE())):
        assert not missing(OnePass(2), algorithm, Plain())
    for algorithm in (FLoRA(rank=2), Gated(FLoRA(rank=2)), LocalOnly(BlockExpansion())):
        assert missing(OnePass(2), algorithm, Plain()) == {Trait.COPIED_IN_AND_OUT}
    for objective in (FedProx(), Anchor(), Scaffold(), Anchor(objective=FedProx())):
        assert missing(OnePass(2), BlockExpansion(), objective) == {Trait.SINGLE_CLIENT_STEPS}
    for engine in (InProcess(), OnePass("auto"), OnePass(1)):
        assert not missing(engine, FLoRA(rank=2), FedProx())


@pytest.mark.parametrize("objective", [FedProx(1.0), Anchor(sequences=4, sequence_length=8)])
def test_auto_is_one_by_one_where_an_objective_acts_on_one_client_s_model(tmp_path, objective):
    loop, _ = run(tmp_path / "run", "auto", rounds=1, objective=objective)
    assert loop.engine.state_dict() == {"clients_in_one_pass": 1}


class Doubled(Plain):
    """Says that it is the model's own loss, and is not."""

    def local(self, model, task, kept):
        return FedProx(1.0).local(model, task, kept)


def test_an_objective_that_acts_on_one_client_s_model_unannounced_is_followed_one_by_one(tmp_path):
    alone, together = run(tmp_path / "alone", objective=Doubled()), run(tmp_path / "run", 4, objective=Doubled())
    state = together[0].server.state
    assert all(torch.equal(tensor, state[name]) for name, tensor in alone[0].server.state.items())


def test_defaults_written_out_go_with_one_pass():
    options = {"max_steps": 3, "accumulate_grad_batches": 1, "num_nodes": 1, "callbacks": [], "fast_dev_run": False}
    assert OnePass(2).check("engine.init_args", Facts(trainer=options)) == []


def test_a_number_below_one_is_a_mistake():
    [problem] = OnePass(0).check("engine.init_args", Facts())
    assert problem.key == "engine.init_args.clients"
