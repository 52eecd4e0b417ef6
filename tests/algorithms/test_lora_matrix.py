"""What every LoRA method has in common."""

import json

import pytest
import torch
from lora_tools import (
    MERGING,
    METHODS,
    MIXED_RANKS,
    Keeper,
    build,
    distance,
    effective,
    identical,
    loop_of,
    nudge,
    per_client,
    ready,
)
from toy import resumed, tiny_llama
from transformers import AutoModelForCausalLM, DistilBertConfig, DistilBertForSequenceClassification

from fedbe.adaptation.lora_layers import merged_copy
from fedbe.algorithms import FedSALoRA, FFALoRA, SLoRA
from fedbe.callbacks import CheckpointCallback, CommunicationCallback
from fedbe.errors import ExpansionError
from fedbe.messages import payload_bytes

ALL = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def run_state(folder, method, **changes):
    loop = loop_of(folder, method, clients=2, **changes)
    loop.run()
    return loop.server.state


@ALL
def test_adapters_change_no_output_to_the_bit_and_leave_the_global_generator_alone(method):
    model = tiny_llama()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(method).adaptation.prepare(model, {"input_ids": ids})
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(model(ids).logits, before)


@ALL
def test_one_client_equals_training_alone(tmp_path, method):
    loop = ready(tmp_path / "run", method, clients=1)
    if method is SLoRA:
        loop.advance()  # its first stage
    alone = {}

    def look(model, task):
        nudge(5)(model, task)
        alone.update(effective(model))

    loop.engine.act(look)
    loop.advance()
    assert distance(effective(loop.model), alone) < 1e-5


@ALL
def test_the_order_of_the_clients_does_not_matter(tmp_path, method):
    results = []
    for order in (1, -1):
        loop = ready(tmp_path / str(order), method)
        loop.engine.act(nudge(lambda task: 100 + int(task.client_id.split("-")[1])))
        cohort = loop.plan.data.client_ids[::order]
        loop.round.sampler = type("Fixed", (), {"sample": lambda self, *_, cohort=cohort: list(cohort)})()
        loop.advance()
        loop.advance()
        results.append(effective(loop.model))
    assert distance(*results) < 1e-4


@ALL
def test_clients_that_take_no_step_change_nothing(tmp_path, method):
    loop = ready(tmp_path / "run", method)
    loop.advance()
    trained = effective(loop.model)
    assert method is FedSALoRA or distance(trained, dict(tiny_llama(layers=2).state_dict())) > 1e-4
    loop.engine.act()
    loop.advance()
    assert distance(effective(loop.model), trained) < 2e-6


@ALL
def test_frozen_weights_do_not_move_but_for_those_the_method_merges(tmp_path, method):
    loop = loop_of(tmp_path / "run", method, rounds=2, clients=2)
    base = tiny_llama(layers=2).state_dict()
    loop.run()
    after = loop.model.state_dict()
    moved = {n for n in base if (m := n.replace("proj.weight", "proj.base_layer.weight")) in after
             and not torch.equal(after[m], base[n])}  # fmt: skip
    moved |= {n for n in base if n in after and not torch.equal(after[n], base[n])}
    targets = {a.weight.replace(".base_layer", "") for a in loop.algorithm.adaptation.adapters}
    assert len(targets) == 8
    assert moved == (targets if method in MERGING else set())
    if method in MERGING:
        assert all(torch.equal(loop.algorithm.adaptation.base[f"{n[:-7]}.base_layer.weight"], base[n]) for n in moved)


@ALL
def test_the_aggregate_of_identical_updates_is_that_update(tmp_path, method):
    loop = ready(tmp_path / "run", method)
    if method is SLoRA:
        loop.advance()
    same = []

    def look(model, task):
        nudge(7)(model, task)
        same.append(effective(model))

    loop.engine.act(look)
    loop.advance()
    assert len(same) == 3
    assert distance(same[0], same[2]) == 0
    assert distance(effective(loop.model), same[0]) < 1e-5


@ALL
def test_the_export_is_plain_and_equals_the_evaluated_model(tmp_path, method):
    loop = loop_of(tmp_path / "run", method, rounds=2)
    loop.engine.act(nudge(per_client))
    loop.run()
    assert loop.summary["model"]["plain"]
    model = AutoModelForCausalLM.from_pretrained(loop.folder.model).eval()
    ids = loop.plan.data.validation_dataset().rows
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, loop.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == tiny_llama(layers=2).state_dict().keys()


@ALL
def test_bytes_counted_are_the_tensors_sent(tmp_path, method):
    keeper = Keeper()
    loop = loop_of(tmp_path / "run", method, rounds=2, callbacks=[CommunicationCallback(), keeper])
    loop.engine.act(nudge(per_client))
    loop.run()
    records = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    up = [sum(payload_bytes(u.tensors.values()) for u in keeper.updates[i : i + 3]) for i in (0, 3)]
    down = [sum(payload_bytes(t.received.values()) for t in keeper.tasks[i : i + 3]) for i in (0, 3)]
    assert [r["bytes"] for r in records[1:]] == [{"up": u, "down": d} for u, d in zip(up, down, strict=True)]
    adaptation, rank = loop.algorithm.adaptation, loop.algorithm.adaptation.rank
    a = sum(loop.model.get_parameter(x.a).shape[1] for x in adaptation.adapters) * rank * 4
    b = sum(loop.model.get_parameter(x.b).shape[0] for x in adaptation.adapters) * rank * 4
    assert up[1] == 3 * {FFALoRA: b, FedSALoRA: a}.get(method, a + b)


@ALL
def test_the_same_seed_gives_the_same_state_and_another_seed_another(tmp_path, method):
    first = run_state(tmp_path / "a", method)
    again = run_state(tmp_path / "b", method)
    other = run_state(tmp_path / "c", method, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@ALL
def test_a_client_s_model_depends_on_what_it_received_alone(tmp_path, method):
    keeper = Keeper()
    loop = loop_of(tmp_path / "run", method, rounds=2, clients=2, callbacks=[keeper])
    loop.run()
    task, update = keeper.tasks[-1], keeper.updates[-1]
    # Elsewhere, on a model that has seen nothing of the run.
    elsewhere = loop_of(tmp_path / "elsewhere", method, rounds=2, clients=2)
    elsewhere.setup()
    if task.resumes is not None:
        own_tensors = loop.engine.memory.get(task.client_id, task.resumes)
        elsewhere.engine.memory.put(task.client_id, task.resumes, own_tensors, None)
    own = elsewhere.engine.training.train(task)
    assert own.tensors.keys() == update.tensors.keys()
    assert all(torch.equal(own.tensors[name], update.tensors[name]) for name in own.tensors)


@ALL
def test_a_run_continues_from_its_checkpoint(tmp_path, method):
    whole = loop_of(tmp_path / "a", method, rounds=3, cohort=2, callbacks=[CheckpointCallback()])
    whole.engine.act(nudge(per_client))
    whole.run()
    half = ready(tmp_path / "b", method, rounds=3, cohort=2, callbacks=[CheckpointCallback()])
    half.engine.act(nudge(per_client))
    half.advance()
    half.advance()
    rest = resumed(loop_of(tmp_path / "b", method, rounds=3, cohort=2, callbacks=[CheckpointCallback()]))
    rest.engine.act(nudge(per_client))
    rest.advance()
    assert identical(whole.server.state, rest.server.state)


@ALL
def test_a_new_task_head_trains_along(tmp_path, method):
    config = DistilBertConfig(
        vocab_size=16, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16, num_labels=3
    )
    model = DistilBertForSequenceClassification(config).eval()
    algorithm = build(method)
    adaptation = algorithm.adaptation
    adaptation.prepare(model, {"input_ids": torch.arange(8)[None]})
    head = {name for name, _ in model.named_parameters() if name.startswith(("classifier", "pre_classifier"))}
    assert len(head) == 4
    assert head <= set(adaptation.trainable_names)
    state = {name: model.get_parameter(name).detach().clone() for name in adaptation.state_names}
    algorithm.strategy.setup(adaptation)
    assert head <= set(algorithm.strategy.send(state, "x"))
    with torch.no_grad():
        assert merged_copy(model)(torch.arange(8)[None]).logits.shape == (1, 3)


@ALL
def test_a_wrong_start_is_noticed(method, monkeypatch):
    from peft.tuners.lora import LoraLayer

    def nonzero(self, name, how):
        torch.nn.init.ones_(self.lora_B[name].weight)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", nonzero)
    with pytest.raises(ExpansionError, match="unchanged outputs"):
        build(method).adaptation.prepare(tiny_llama(), {"input_ids": torch.arange(12)[None]})


@pytest.mark.parametrize("method", MIXED_RANKS, ids=lambda method: method.__name__)
def test_a_client_of_a_smaller_rank_trains_and_sends_that_rank(tmp_path, method):
    keeper = Keeper()
    ranks = {"client-0": 1, "client-1": 2}
    optimizer = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)}
    loop = loop_of(tmp_path / "run", method, options={"ranks": ranks}, rounds=2, callbacks=[keeper], **optimizer)
    tails = []
    adaptation, strategy = loop.algorithm.adaptation, loop.algorithm.strategy
    finish = adaptation.finish

    def look(model, task, kept):
        rank = strategy.rank_of(task.client_id)
        tails.extend(model.get_parameter(x.a)[rank:].abs().sum().item() for x in adaptation.adapters)
        tails.extend(model.get_parameter(x.b)[:, rank:].abs().sum().item() for x in adaptation.adapters)
        return finish(model, task, kept)

    adaptation.finish = look
    loop.run()
    assert max(tails) == 0
    for update, rank in zip(keeper.updates, [1, 2, 4], strict=False):
        assert {update.tensors[x.a].shape[0] for x in adaptation.adapters} == {rank}
        assert {update.tensors[x.b].shape[1] for x in adaptation.adapters} == {rank}
