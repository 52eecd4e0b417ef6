"""What each LoRA method promises of its own, and mistakes that public code has made."""

import copy

import numpy
import pytest
import torch
from lora_tools import (
    METHODS,
    MIXED_RANKS,
    Keeper,
    build,
    distance,
    effective,
    factors,
    loop_of,
    nudge,
    per_client,
    ready,
)
from peft import LoraConfig, PeftModel, get_peft_model
from toy import ToyData, adamw, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from fedbe.adaptation.lora_layers import lora_layers
from fedbe.algorithms import FedExLoRA, FedIT, FedSALoRA, FedTaLoRA, FFALoRA, FlexLoRA, FLoRA, HetLoRA, SLoRA
from fedbe.algorithms.lora.hetlora import change_size
from fedbe.errors import ConfigError, Facts
from fedbe.messages import Update, payload_bytes
from fedbe.seeding import generator
from fedbe.traits import Trait


def one_round(folder, method, change=None, **changes):
    """Return a loop after a round of known updates, and Σ p_k s_k B_k A_k of each layer, in float64."""
    keeper = Keeper()
    loop = ready(folder, method, callbacks=[keeper], **changes)
    loop.engine.act(change or nudge(per_client))
    loop.advance()
    total = sum(update.samples for update in keeper.updates)
    expected, shared = {}, dict(loop.model.named_parameters())
    for adapter in loop.algorithm.adaptation.adapters:
        expected[adapter.weight] = sum(
            u.samples / total * loop.algorithm.adaptation.alpha / u.tensors[adapter.b].shape[1]
            * u.tensors[adapter.b].double() @ u.tensors.get(adapter.a, shared[adapter.a]).double()
            for u in keeper.updates
        )  # fmt: skip
    return loop, keeper, expected


def error(loop, expected):
    """How far the model's weights, adapters included, are from base plus the expected change."""
    after, base = effective(loop.model), tiny_llama(layers=2).state_dict()
    names = {name: name.replace(".base_layer", "") for name in expected}
    return max((after[n].double() - base[n].double() - expected[w]).abs().max().item() for w, n in names.items())


@pytest.mark.parametrize("method", [FLoRA, FedExLoRA, FedTaLoRA, FFALoRA])
def test_exact_methods_reproduce_the_weighted_sum_of_the_clients_changes(tmp_path, method):
    loop, _, expected = one_round(tmp_path / "run", method)
    assert max(change.abs().max() for change in expected.values()) > 0.05
    assert error(loop, expected) < 1e-5


def test_exact_methods_stay_exact_over_rounds(tmp_path):
    keeper = Keeper()
    loop = ready(tmp_path / "run", FLoRA, callbacks=[keeper])
    loop.engine.act(nudge(per_client))
    for _ in range(3):
        loop.advance()
    scaling, total = loop.algorithm.adaptation.scaling(4), 32
    expected = {
        x.weight: sum(u.samples / total * scaling * u.tensors[x.b].double() @ u.tensors[x.a].double()
                      for u in keeper.updates)
        for x in loop.algorithm.adaptation.adapters
    }  # fmt: skip
    assert error(loop, expected) < 1e-5


@pytest.mark.parametrize("method", [FedIT, HetLoRA])
def test_averaging_factors_is_not_exact(tmp_path, method):
    loop, _, expected = one_round(tmp_path / "run", method)
    assert error(loop, expected) > 0.01


def test_fedit_averages_every_client_s_factors_by_samples(tmp_path):
    loop, keeper, _ = one_round(tmp_path / "run", FedIT)
    for name in loop.algorithm.adaptation.trainable_names:
        mean = sum(u.samples * u.tensors[name].double() for u in keeper.updates) / 32
        torch.testing.assert_close(loop.server.state[name].double(), mean, rtol=1e-5, atol=1e-6)


def test_the_clients_ranks_decide_the_scale_of_what_flora_merges(tmp_path):
    options = {"ranks": {"client-0": 1, "client-1": 2}}
    loop, keeper, expected = one_round(tmp_path / "run", FLoRA, options=options)
    assert [u.tensors[loop.algorithm.adaptation.adapters[0].a].shape[0] for u in keeper.updates] == [1, 2, 4]
    assert error(loop, expected) < 1e-5


def test_flora_s_adapters_start_anew_in_each_round(tmp_path):
    loop = ready(tmp_path / "run", FLoRA)
    starts = []
    loop.engine.act(lambda model, task: starts.append({n: t.clone() for n, t in model.named_parameters()}))
    loop.advance()
    loop.advance()
    adapter = loop.algorithm.adaptation.adapters[0]
    assert torch.equal(starts[0][adapter.a], starts[1][adapter.a])
    assert not torch.equal(starts[0][adapter.a], starts[3][adapter.a])
    assert not any(start[adapter.b].any() for start in starts)


@pytest.mark.parametrize("method", [FLoRA, FedExLoRA])
def test_the_change_travels_as_factors_or_whole_whichever_is_smaller(tmp_path, method):
    loop = ready(tmp_path / "run", method, options={"rank": 1}, clients=2)
    loop.engine.act(nudge(per_client))
    terms = 2 if method is FLoRA else 1
    for number in range(10):
        sent = loop.algorithm.strategy.send(loop.server.state, "client-0")
        adapters = sum(payload_bytes([t]) for n, t in sent.items() if ".lora_" in n)
        rank = number * terms
        each = rank * (16 + 16) if rank * (16 + 16) < 16 * 16 else 16 * 16
        assert payload_bytes(sent.values()) - adapters == 8 * each * 4
        loop.advance()


def test_flexlora_gives_the_best_approximation_and_keeps_the_singular_values(tmp_path):
    options = {"rank": 4, "ranks": {"client-0": 1, "client-1": 2}, "alpha": 8.0}
    loop, _, expected = one_round(tmp_path / "run", FlexLoRA, options=options)
    for adapter in loop.algorithm.adaptation.adapters:
        u, sigma, vt = numpy.linalg.svd(expected[adapter.weight].numpy())
        for client, rank in (("client-0", 1), ("client-1", 2), ("client-2", 4)):
            got = loop.algorithm.strategy.send(loop.server.state, client)
            assert got[adapter.a].shape[0] == rank
            delta = (8.0 / rank) * got[adapter.b].double() @ got[adapter.a].double()
            best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
            numpy.testing.assert_allclose(delta.numpy(), best, atol=1e-5)


def test_ffa_lora_never_changes_or_sends_a(tmp_path):
    keeper = Keeper()
    loop = loop_of(tmp_path / "run", FFALoRA, rounds=2, callbacks=[keeper])
    loop.setup()
    before = {x.a: loop.model.get_parameter(x.a).clone() for x in loop.algorithm.adaptation.adapters}
    loop = loop_of(tmp_path / "again", FFALoRA, rounds=2, callbacks=[keeper])
    loop.run()
    assert all(torch.equal(loop.model.get_parameter(name), a) for name, a in before.items())
    assert not any(name in before for u in (*keeper.updates,) for name in u.tensors)
    assert not any(name in before for task in keeper.tasks for name in task.received)


def test_hetlora_weights_clients_by_the_size_of_their_change(tmp_path):
    options = {"ranks": {"client-0": 1, "client-1": 2}, "decay": 1.0}
    loop, keeper, _ = one_round(tmp_path / "run", HetLoRA, options=options)
    adapters = loop.algorithm.adaptation.adapters
    sizes = [
        sum((u.tensors[x.b].double() @ u.tensors[x.a].double()).square().sum() for x in adapters).sqrt().item()
        for u in keeper.updates
    ]
    assert [change_size(u.tensors, adapters) for u in keeper.updates] == pytest.approx(sizes)
    a = adapters[0].a
    # The third row of A is held by the third client alone, and the zeros of the others count.
    share = sizes[2] / sum(sizes)
    torch.testing.assert_close(loop.server.state[a][2], share * keeper.updates[2].tensors[a][2], rtol=1e-5, atol=1e-6)


def test_hetlora_prunes_a_client_whose_tail_shrank_and_tells_only_that_client(tmp_path):
    @torch.no_grad()
    def shrink(model, task):
        nudge(per_client)(model, task)
        if task.round_index == 1 and task.client_id == "client-1":
            for x in loop.algorithm.adaptation.adapters:
                model.get_parameter(x.b)[:, 2:] = 0

    keeper = Keeper()
    loop = ready(tmp_path / "run", HetLoRA, options={"decay": 0.5}, callbacks=[keeper])
    loop.engine.act(shrink)
    loop.advance()
    assert loop.algorithm.strategy.rank_of("client-1") == 4  # B was 0 before: the tail grew
    loop.advance()
    a = loop.algorithm.adaptation.adapters[0].a
    assert [u.tensors[a].shape[0] for u in keeper.updates[3:]] == [4, 2, 4]
    assert loop.algorithm.strategy.send(loop.server.state, "client-1")[a].shape[0] == 2
    assert loop.algorithm.strategy.send(loop.server.state, "client-0")[a].shape[0] == 4
    other = build(HetLoRA)
    other.strategy.load_state_dict(loop.algorithm.strategy.state_dict())
    assert other.strategy.rank_of("client-1") == 2


def test_hetlora_s_penalty_is_part_of_the_loss_while_a_client_trains(tmp_path):
    losses = {}
    for penalty in (0.0, 10.0):
        loop = ready(tmp_path / str(penalty), HetLoRA, options={"decay": 0.5, "penalty": penalty})
        loop.engine.act(nudge(1))
        loop.advance()
        ids = loop.plan.data.validation_dataset().rows
        adaptation = loop.algorithm.adaptation

        def look(model, task, ids=ids, penalty=penalty, adaptation=adaptation):
            added = adaptation.added_loss(model, task)
            losses[penalty] = model(ids, labels=ids).loss.item() + (0.0 if added is None else added().item())

        loop.engine.act(look)
        loop.advance()
        with torch.enable_grad():
            losses[penalty, "after"] = loop.model(ids, labels=ids).loss.item()
    adapters = loop.algorithm.adaptation.adapters
    tail = sum(loop.server.state[x.b][:, 2:].norm() * loop.server.state[x.a][2:].norm() for x in adapters).item()
    assert losses[10.0] - losses[0.0] == pytest.approx(10 * tail, rel=1e-3)
    assert losses[10.0, "after"] == pytest.approx(losses[0.0, "after"], rel=1e-5)


def test_fedsa_clients_keep_their_own_b_and_newcomers_start_at_zero(tmp_path):
    keeper = Keeper()
    loop = ready(tmp_path / "run", FedSALoRA, callbacks=[keeper])
    starts = []

    def change(model, task):
        starts.append({x.b: model.get_parameter(x.b).clone() for x in loop.algorithm.adaptation.adapters})
        nudge(per_client)(model, task)

    loop.engine.act(change)
    loop.advance()
    loop.advance()
    assert Trait.GLOBAL_MODEL not in loop.algorithm.offers
    assert not any(b.any() for start in starts[:3] for b in start.values())
    for update, kept, start in zip(keeper.updates[:3], loop.engine.kept[:3], starts[3:], strict=True):
        assert kept.keys() == start.keys()
        assert not update.tensors.keys() & start.keys()
        assert all(torch.equal(kept[name], start[name]) for name in start)


def test_slora_sends_a_fixed_part_of_the_weights_then_adapters_from_their_change(tmp_path):
    keeper = Keeper()
    options = {"sparse_rounds": 2, "density": 0.05, "rank": 16}
    loop = ready(tmp_path / "run", SLoRA, options=options, callbacks=[keeper])
    loop.advance()
    base = tiny_llama(layers=2).state_dict()
    changed = effective(loop.model)
    moved = sum(int((changed[name] != base[name]).sum()) for name in base)
    assert 0 < moved <= 8 * round(0.05 * 256)
    assert {t.numel() for t in keeper.updates[0].tensors.values()} == {round(0.05 * 256)}
    loop.engine.act()
    loop.advance()
    # At full rank the adapters are the whole change of the first stage, and the weights are the base's again.
    assert distance(effective(loop.model), changed) < 1e-6
    assert all(torch.equal(loop.server.state[name], weight) for name, weight in loop.algorithm.adaptation.base.items())
    loop.advance()
    assert set(keeper.updates[-1].tensors) == set(loop.algorithm.adaptation.factor_names)


def test_slora_s_training_moves_nothing_outside_the_mask(tmp_path):
    loop = ready(tmp_path / "run", SLoRA, options={"density": 0.05})
    task = loop.server.task("client-0", 0, 0, loop.algorithm.strategy.allocate(["client-0"], 0)["client-0"])
    loop.engine.training.train(task)
    base = loop.algorithm.adaptation.base
    for name, places in loop.algorithm.adaptation.places.items():
        outside = torch.ones(256, dtype=torch.bool)
        outside[places] = False
        trained = loop.model.get_parameter(name)
        assert torch.equal(trained.flatten()[outside], base[name].flatten()[outside])
        assert not torch.equal(trained, base[name])


def test_fedit_s_client_step_equals_peft_and_plain_pytorch(tmp_path):
    options = {"alpha": 16.0, "dropout": 0.0}
    loop = ready(tmp_path / "run", FedIT, options=options, clients=1)
    start = {name: tensor.clone() for name, tensor in loop.server.state.items()}
    loop.advance()
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(tiny_llama(layers=2), config)
    parameters = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    model.train()
    optimizer = adamw(list(parameters.values()))
    batches = ToyData(1).client_dataloader("client-0", generator(0, "batches", "client", 0, 0, "client-0"))
    for batch in [*batches, *batches][:3]:
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(loop.server.state[name], parameter.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [FedIT, FFALoRA])
def test_an_exported_adapter_gives_the_evaluated_model_on_the_base(tmp_path, method):
    loop = ready(tmp_path / "run", method, options={"export": "adapter"})
    loop.engine.act(nudge(3))
    loop.advance()
    report = loop.algorithm.adaptation.export(loop.model, tmp_path / "adapter", None)
    assert not report.plain and "peft" in report.reason
    model = PeftModel.from_pretrained(tiny_llama(layers=2), str(tmp_path / "adapter")).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, loop.model(ids).logits)


def test_alpha_over_r_is_part_of_the_merge(tmp_path):
    loop = ready(tmp_path / "run", FedIT, options={"rank": 4, "alpha": 16.0})
    loop.engine.act(nudge(3))
    loop.advance()
    x = loop.algorithm.adaptation.adapters[0]
    change = effective(loop.model)[x.weight.replace(".base_layer", "")] - loop.model.get_parameter(x.weight)
    torch.testing.assert_close(change, 4.0 * loop.server.state[x.b] @ loop.server.state[x.a], rtol=1e-4, atol=1e-5)


def test_export_leaves_the_live_model_as_it_is(tmp_path):
    loop = ready(tmp_path / "run", FedIT)
    before = copy.deepcopy(loop.model.state_dict())
    loop.algorithm.adaptation.export(loop.model, tmp_path / "model", None)
    after = loop.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="new or empty"):
        loop.algorithm.adaptation.export(loop.model, tmp_path / "model", None)


@pytest.mark.parametrize("method", [FedIT, FLoRA, FedExLoRA, FlexLoRA, SLoRA])
def test_layers_that_store_their_weight_transposed_are_merged_the_right_way(method):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=16)).eval()
    algorithm = build(method, rank=2, target_modules=["c_attn"])
    adaptation, strategy = algorithm.adaptation, algorithm.strategy
    adaptation.prepare(model, {"input_ids": torch.arange(8)[None]})
    strategy.setup(adaptation)
    assert [layer.get_base_layer().weight.shape for _, layer in lora_layers(model)] == [(8, 24)]
    state = {name: model.get_parameter(name).detach().clone() for name in adaptation.state_names}
    (x,) = adaptation.adapters
    base = model.get_parameter(x.weight).detach().clone()
    if method is SLoRA:
        b, a = strategy.factors(x.oriented(torch.outer(torch.arange(8.0), torch.arange(24.0))), state[x.a])
        assert b.shape == (24, 2) and a.shape == (2, 8)
        return
    aggregator = strategy.aggregator(state)
    b, a = factors(0, 2, 24, 8)
    update = Update("x", {x.a: a, x.b: b}, 3)
    aggregator.check(update)
    aggregator.add(update)
    with torch.no_grad():
        for name, tensor in aggregator.result().items():
            model.get_parameter(name).copy_(tensor)
    merged = effective(model)[x.weight.replace(".base_layer", "")]
    scale = adaptation.scaling(2)
    torch.testing.assert_close(merged, base + scale * (b @ a).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_unequal_ranks_are_refused_where_factors_are_averaged(method):
    problems = build(method, ranks=[2, 4]).check("algorithm.init_args", Facts(depth=2))
    assert bool(problems) != (method in MIXED_RANKS)
    assert all(p.key == "algorithm.init_args.ranks" and p.value == [2, 4] and p.remedy for p in problems)


@pytest.mark.parametrize(
    ("method", "options", "key"),
    [
        (FLoRA, {"export": "adapter"}, "export"),
        (FedExLoRA, {"export": "adapter"}, "export"),
        (FedIT, {"rank": 0}, "rank"),
        (FedIT, {"alpha": 0.0}, "alpha"),
        (FedIT, {"dropout": 1.0}, "dropout"),
        (FedIT, {"target_modules": []}, "target_modules"),
        (FLoRA, {"ranks": []}, "ranks"),
        (FLoRA, {"ranks": {"x": 0}}, "ranks"),
        (HetLoRA, {"decay": 0.0}, "decay"),
        (HetLoRA, {"penalty": -1.0}, "penalty"),
        (SLoRA, {"sparse_rounds": 0}, "sparse_rounds"),
        (SLoRA, {"density": 0.0}, "density"),
    ],
)
def test_arguments_that_cannot_run_are_named(method, options, key):
    assert [p.key for p in build(method, **options).check("algorithm.init_args", Facts(depth=2))] == [
        f"algorithm.init_args.{key}"
    ]


def test_the_first_adapted_block_is_one_of_the_model_s_where_its_depth_is_known():
    found = [
        [problem.key for problem in build(FedIT, first_block=block).check("algorithm.init_args", Facts(depth=depth))]
        for block, depth in ((0, 2), (1, 2), (2, 2), (-1, 2), (0, 0), (5, 0), (-1, 0))
    ]
    wrong = ["algorithm.init_args.first_block"]
    assert found == [[], [], wrong, wrong, [], [], wrong]


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), ("attention", 8), (["q_proj"], 2), (None, 4)])
def test_target_modules_are_all_linear_attention_named_or_by_architecture(targets, count):
    adaptation = build(FedIT, target_modules=targets).adaptation
    adaptation.prepare(tiny_llama(layers=2), {"input_ids": torch.arange(12)[None]})
    assert len(adaptation.adapters) == count


@pytest.mark.parametrize("options", [{"target_modules": ["no_proj"]}, {"rank": 17}])
def test_layers_that_do_not_exist_and_ranks_that_are_too_large_are_errors(options):
    adaptation = build(FedIT, **options).adaptation
    for key in ("algorithm.init_args", "algorithm.init_args.algorithm.init_args"):
        adaptation.key = key
        with pytest.raises(ConfigError) as raised:
            adaptation.prepare(tiny_llama(layers=2), {"input_ids": torch.arange(12)[None]})
        assert [problem.key for problem in raised.value.problems] == [f"{key}.{next(iter(options))}"]


def test_listed_ranks_go_to_clients_by_name():
    adaptation = FLoRA(ranks=[2, 4, 8]).adaptation
    assert adaptation.max_rank == 8
    ranks = [adaptation.rank_of(f"client-{k}") for k in range(60)]
    assert set(ranks) == {2, 4, 8}
    assert ranks == [adaptation.rank_of(f"client-{k}") for k in range(60)]
