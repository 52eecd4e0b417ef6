import pytest
import torch
from toy import ToyData, tiny_llama, toy_loop
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fedbe.adaptation.existing_blocks import ExistingBlocks
from fedbe.adaptation.whole_model import WholeModel
from fedbe.algorithms import (
    BlockExpansion,
    Centralized,
    FedAvg,
    FedBE,
    FedIT,
    FedSALoRA,
    FlexLoRA,
    FLoRA,
    Gated,
    LocalOnly,
    PooledData,
    Unfreeze,
)
from fedbe.callbacks import CommunicationCallback
from fedbe.client.memory import Kept
from fedbe.errors import ConfigError, Facts
from fedbe.expansion.growth import Plateau
from fedbe.traits import ALL, Trait

FACTS = Facts(depth=3)
AT = "algorithm.init_args"


def prepared(algorithm, model=None):
    """What is trained, in a model."""
    model = model or tiny_llama()
    algorithm.adaptation.prepare(model, {})
    return algorithm.adaptation, model


def tied_llama():
    config = tiny_llama().config
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def test_full_fine_tuning_trains_every_parameter():
    whole, model = prepared(FedAvg())
    assert set(whole.trainable_names) == {name for name, _ in model.named_parameters()}


def test_tied_weights_travel_once_and_stay_tied(tmp_path):
    model = tied_llama()
    loop = toy_loop(tmp_path / "run", rounds=1, model=model, algorithm=FedAvg())
    loop.run()
    state = loop.server.state
    assert "lm_head.weight" not in state and "model.embed_tokens.weight" in state
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exported = AutoModelForCausalLM.from_pretrained(loop.folder.model)
    assert torch.equal(exported.lm_head.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize(("blocks", "expected"), [([2, 0], {0, 2}), (1, {2}), (3, {0, 1, 2}), ([1, 1], {1})])
def test_the_named_or_interleaved_blocks_are_unfrozen_and_nothing_else(blocks, expected):
    unfrozen, model = prepared(Unfreeze(blocks))
    prefixes = tuple(f"model.layers.{index}." for index in expected)
    assert set(unfrozen.trainable_names) == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    assert list(unfrozen.units()) == [f"block_{index}" for index in sorted(expected)]


def test_unfreezing_trains_as_many_parameters_as_expanding_by_as_many_blocks():
    unfrozen, model = prepared(Unfreeze(2))
    expanded, larger = BlockExpansion(2).adaptation, tiny_llama()
    expanded.prepare(larger, {"input_ids": torch.arange(4)[None]})
    sizes = [
        sum(m.get_parameter(name).numel() for name in a.trainable_names)
        for a, m in ((unfrozen, model), (expanded, larger))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("blocks", [0, 4, [3], [-1], []])
def test_blocks_that_are_not_there_are_a_problem(blocks):
    assert [problem.key for problem in Unfreeze(blocks).check(AT, FACTS)] == ["algorithm.init_args.blocks"]
    with pytest.raises(ConfigError, match="blocks"):
        prepared(Unfreeze(blocks))


def kept(loop, client):
    """What a client keeps after the last round."""
    return loop.engine.memory.get(client, loop.round.index).tensors


def test_local_clients_go_on_from_their_own_tensors_and_send_nothing(tmp_path):
    loop = toy_loop(tmp_path / "run", algorithm=LocalOnly(Unfreeze([1])), callbacks=[CommunicationCallback()])
    loop.setup()
    start = dict(loop.server.state)
    loop.folder.create({})
    loop.advance()
    first = kept(loop, "client-1")
    loop.advance()
    assert all(torch.equal(start[name], loop.server.state[name]) for name in start)
    assert all(record["bytes"] == {"up": 0, "down": 0} for record in loop.history)
    alone = toy_loop(tmp_path / "alone", algorithm=LocalOnly(Unfreeze([1])))
    alone.setup()
    alone.engine.memory.put("client-1", 0, Kept(first), None)
    alone.server.accepted["client-1"] = 0
    task = alone.server.task("client-1", 0, 1, ("block_1",))
    update = alone.engine.training.train(task)
    own = alone.engine.memory.get("client-1", 1).tensors
    assert not update.tensors and not task.received
    assert all(torch.equal(own[name], kept(loop, "client-1")[name]) for name in start)
    assert any(not torch.equal(first[name], own[name]) for name in start)


@pytest.mark.parametrize("inner", [FlexLoRA(rank=2), FedBE(), FedAvg()], ids=lambda a: type(a).__name__)
def test_whatever_rule_the_server_has_for_updates_local_clients_leave_the_global_model_at_the_start(tmp_path, inner):
    loop = toy_loop(tmp_path / "run", algorithm=LocalOnly(inner))
    loop.setup()
    start = dict(loop.server.state)
    loop.folder.create({})
    loop.advance()
    assert not loop.record.failures and loop.record.rolled_back is None
    assert all(torch.equal(start[name], loop.server.state[name]) for name in start)
    assert kept(loop, "client-0").keys() == set(inner.adaptation.trainable_names)


def test_the_report_of_an_exported_start_says_what_it_is(tmp_path):
    notes = {}
    for name, algorithm in (("local", LocalOnly(Unfreeze([1]))), ("plain", Unfreeze([1]))):
        loop = toy_loop(tmp_path / name, algorithm=algorithm, rounds=1)
        loop.run()
        notes[name] = loop.summary["model"]["note"]
    assert notes["local"] == f"{notes['plain']} It is the start: clients keep what they trained to themselves."


def test_personalised_scores_are_those_of_each_client_s_own_model(tmp_path):
    class OwnData(ToyData):
        def client_val_dataloader(self, client_id):
            return self._eval_dataloader(self.rows(int(client_id[-1]), 8, "own validation"))

    changes = {"rounds": 3, "trainer": {"max_steps": 8}, "data": OwnData()}
    loop = toy_loop(tmp_path / "run", algorithm=LocalOnly(Unfreeze([0, 2])), **changes)
    summary = loop.run()
    base, *_, last = loop.history
    assert last["downstream"] == base["downstream"]
    scores = last["personalised"]
    assert scores["min"] <= scores["mean"] <= scores["max"]
    assert scores["loss"] < base["personalised"]["loss"] - 0.05
    assert summary["personalised"].keys() == scores.keys()


def test_methods_with_one_model_report_no_personalised_score(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=1, algorithm=FedAvg())
    assert loop.run()["personalised"] is None and loop.history[-1]["personalised"] is None


WITHOUT = {
    "GLOBAL_MODEL": FedSALoRA(),
    "LASTING_TENSORS": FLoRA(),
    "AGGREGATION": LocalOnly(FedAvg()),
    "FIXED_STRUCTURE": Gated(FedBE(plateau=Plateau())),
}


@pytest.mark.parametrize("trait", WITHOUT)
def test_what_cannot_train_locally_is_refused(trait):
    inner = WITHOUT[trait]
    assert trait in {missing.name for missing in ALL - inner.offers}
    (problem,) = LocalOnly(inner).check(AT, FACTS)
    assert problem.key == "algorithm.init_args.algorithm" and problem.value == type(inner).__name__
    assert ("plateau" in problem.remedy) == (trait == "FIXED_STRUCTURE")


def test_a_control_reports_the_mistakes_of_what_it_is_about():
    for control in (LocalOnly, Centralized):
        (problem,) = control(Unfreeze([7])).check(AT, FACTS)
        assert problem.key == "algorithm.init_args.algorithm.init_args.blocks"


@pytest.mark.parametrize("algorithm", [Centralized(LocalOnly(FedAvg())), LocalOnly(Centralized(FedAvg()))])
def test_of_two_controls_one_within_the_other_neither_wins_in_silence(algorithm):
    (problem,) = algorithm.check(AT, FACTS)
    assert problem.key == "algorithm.init_args.algorithm" and problem.value == type(algorithm.algorithm).__name__


def test_a_control_trains_the_same_by_the_same_strategy():
    for control in (LocalOnly, Centralized):
        inner = FedIT(rank=2)
        algorithm = control(inner)
        assert algorithm.adaptation is inner.adaptation and algorithm.strategy is inner.strategy
        assert type(algorithm.topology) is not type(inner.topology)


@pytest.mark.parametrize("adaptation", [WholeModel(), ExistingBlocks([1])], ids=lambda a: type(a).__name__)
def test_what_trains_the_base_says_so(adaptation):
    assert ALL - adaptation.offers == {Trait.UNCHANGED_BASE}
    assert BlockExpansion([1]).offers == ALL


def test_centralized_training_is_one_client_on_the_pool(tmp_path):
    central = toy_loop(tmp_path / "a", algorithm=Centralized(FedAvg()), data=PooledData(ToyData()))
    plain = toy_loop(tmp_path / "b", algorithm=FedAvg(), data=PooledData(ToyData()))
    central.run()
    plain.run()
    assert central.algorithm.topology.pooled and not plain.algorithm.topology.pooled
    state, expected = central.server.state, plain.server.state
    assert all(torch.equal(state[name], expected[name]) for name in expected)
