import pytest
import torch
from toy import ToyData, tiny_llama, toy_loop
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fedbe.algorithms import BlockExpansion, Centralized, FedAvg, LocalOnly, PooledData, Unfreeze
from fedbe.callbacks import CommunicationCallback
from fedbe.errors import ConfigError


def prepared(algorithm, model=None):
    model = model or tiny_llama()
    algorithm.prepare(model, {})
    return algorithm, model


def tied_llama():
    config = tiny_llama().config
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def test_full_fine_tuning_trains_every_parameter():
    algorithm, model = prepared(FedAvg())
    assert set(algorithm.trainable_names) == {name for name, _ in model.named_parameters()}


def test_tied_weights_travel_once_and_stay_tied(tmp_path):
    model = tied_llama()
    loop = toy_loop(tmp_path / "run", rounds=1, model=model, algorithm=FedAvg())
    loop.run()
    assert "lm_head.weight" not in loop.state and "model.embed_tokens.weight" in loop.state
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exported = AutoModelForCausalLM.from_pretrained(loop.folder.model)
    assert torch.equal(exported.lm_head.weight, loop.state["model.embed_tokens.weight"])


@pytest.mark.parametrize(("blocks", "expected"), [([2, 0], {0, 2}), (1, {2}), (3, {0, 1, 2}), ([1, 1], {1})])
def test_the_named_or_interleaved_blocks_are_unfrozen_and_nothing_else(blocks, expected):
    algorithm, model = prepared(Unfreeze(blocks))
    prefixes = tuple(f"model.layers.{index}." for index in expected)
    assert set(algorithm.trainable_names) == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    assert list(algorithm.units()) == [f"block_{index}" for index in sorted(expected)]


def test_unfreezing_trains_as_many_parameters_as_expanding_by_as_many_blocks():
    unfrozen, model = prepared(Unfreeze(2))
    expanded, larger = BlockExpansion(2), tiny_llama()
    expanded.prepare(larger, {"input_ids": torch.arange(4)[None]})
    sizes = [
        sum(m.get_parameter(name).numel() for name in a.trainable_names)
        for a, m in ((unfrozen, model), (expanded, larger))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("blocks", [0, 4, [3], [-1], []])
def test_blocks_that_are_not_there_are_a_problem(blocks):
    assert [problem.key for problem in Unfreeze(blocks).check(3)] == ["algorithm.init_args.blocks"]
    with pytest.raises(ConfigError, match="blocks"):
        prepared(Unfreeze(blocks))


def test_local_clients_go_on_from_their_own_tensors_and_send_nothing(tmp_path):
    loop = toy_loop(tmp_path / "run", algorithm=LocalOnly(Unfreeze([1])), callbacks=[CommunicationCallback()])
    loop.setup()
    start = dict(loop.state)
    loop.folder.create({})
    loop.advance()
    first = loop.kept["client-1"]
    loop.advance()
    assert all(torch.equal(start[name], loop.state[name]) for name in start)
    assert all(record["bytes"] == {"up": 0, "down": 0} for record in loop.history)
    alone = toy_loop(tmp_path / "alone", algorithm=LocalOnly(Unfreeze([1])))
    alone.setup()
    alone.kept["client-1"] = first
    alone.progress.started = 2
    update = alone.engine.train_client(alone.task("client-1", ("block_1",)))
    assert all(torch.equal(update.kept[name], loop.kept["client-1"][name]) for name in start)
    assert any(not torch.equal(first[name], update.kept[name]) for name in start)


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


def test_what_cannot_train_locally_is_refused():
    class Restarting(FedAvg):
        restarts = True

    (problem,) = LocalOnly(Restarting()).check(3)
    assert problem.key == "algorithm.init_args.algorithm" and problem.value == "Restarting"
    (problem,) = LocalOnly(Unfreeze([7])).check(3)
    assert problem.key == "algorithm.init_args.algorithm.init_args.blocks"


def test_the_pool_holds_every_client_s_samples_once():
    data = ToyData()
    pooled = PooledData(data)
    rows = torch.cat([data.client_dataset(client).rows for client in data.client_ids])
    dataset = pooled.client_dataset(pooled.client_ids[0])
    assert len(pooled.client_ids) == 1
    assert torch.equal(torch.stack([dataset[i]["input_ids"] for i in range(len(dataset))]), rows)
    batches = list(pooled.client_dataloader("pooled", torch.Generator().manual_seed(0)))
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows)


def test_centralized_training_is_one_client_on_the_pool(tmp_path):
    central = toy_loop(tmp_path / "a", algorithm=Centralized(FedAvg()), data=PooledData(ToyData()))
    plain = toy_loop(tmp_path / "b", algorithm=FedAvg(), data=PooledData(ToyData()))
    central.run()
    plain.run()
    assert central.algorithm.pooled and not plain.algorithm.pooled
    assert all(torch.equal(central.state[name], plain.state[name]) for name in plain.state)
