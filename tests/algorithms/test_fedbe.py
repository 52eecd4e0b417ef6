import json
import math

import pytest
import torch
from toy import ToyData, resumed, toy_loop
from transformers import AutoModelForCausalLM

from fedbe.adaptation.placed_blocks import label_counts
from fedbe.aggregation import FedAdam
from fedbe.algorithms import BlockExpansion, FedAvg, FedBE, FedIT, FedSALoRA, FLoRA, Gated, LocalOnly, Unfreeze
from fedbe.algorithms.blocks.fedbe import of_equal_length
from fedbe.allocation import GivenFleet, Profile, SimulatedClock
from fedbe.allocation.allocator import Allocator
from fedbe.allocation.scores import GradientScore, LabelDivergenceScore, LossScore, RandomScore, StaticScore
from fedbe.callbacks import CheckpointCallback
from fedbe.errors import Facts, UpdateError
from fedbe.expansion.gate import find_gate
from fedbe.expansion.growth import Plateau
from fedbe.expansion.placement import AdaptivePlacement, FixedPlacement
from fedbe.messages import Update
from fedbe.modeling.passes import evaluation_mode
from fedbe.objectives import Scaffold
from fedbe.traits import ALL, Trait

STRONG = Profile(1e9, 5e6, 1e6, 1e6)
WEAK = Profile(1e9, 1e6, 1e5, 1e6)
FORGETFUL = Profile(1e3, 1e6, 1e5, 1e6)
ALWAYS_STALLED = {"patience": 1, "min_gain": 1.0}


def fedbe(**options):
    return FedBE(**({"placement": FixedPlacement([0, 1, 2])} | options))


def clock(*profiles, default=WEAK, late="wait", deadline=None):
    given = {f"client-{k}": profile for k, profile in enumerate(profiles)}
    return SimulatedClock(GivenFleet(given, default), late, deadline)


def mixed(folder, algorithm, **changes):
    """Two strong clients and two weak ones."""
    return toy_loop(folder, algorithm=algorithm, clock=clock(STRONG, STRONG), **changes)


def outputs(model):
    with evaluation_mode(model):
        return model(input_ids=torch.arange(10)[None]).logits.clone()


def test_without_simulated_devices_every_client_trains_every_block(tmp_path):
    first = toy_loop(tmp_path / "a", algorithm=fedbe())
    second = toy_loop(tmp_path / "b", algorithm=BlockExpansion([0, 1, 2]))
    first.run()
    second.run()
    state, expected = first.server.state, second.server.state
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_weak_client_trains_near_the_output_and_nobody_waits_for_more(tmp_path):
    loop = mixed(tmp_path / "run", fedbe())
    loop.run()
    for record in loop.history[1:]:
        assert record["allocation"]["client-0"] == ["block_0", "block_1", "block_2"]
        assert record["allocation"]["client-3"] == ["block_2"]
        told = record["explanation"]["clients"]["client-3"]
        assert told["limit"] == "time" and told["can_train"] and told["value"] > 0
        assert max(record["client_seconds"].values()) == pytest.approx(record["client_seconds"]["client-3"])
        assert not record["explanation"]["missing_trainers"]
    assert loop.summary["simulated_seconds"] == pytest.approx(loop.history[-1]["simulated_seconds"])


def test_predicted_times_are_those_of_the_clock(tmp_path):
    loop = mixed(tmp_path / "run", fedbe(), rounds=1)
    loop.run()
    record = loop.history[-1]
    told = record["explanation"]["clients"]
    for client, seconds in record["client_seconds"].items():
        assert told[client]["time"] == pytest.approx(seconds)


def test_all_methods_are_timed_by_the_same_clock(tmp_path):
    seconds = {}
    for name, algorithm in (("fedbe", fedbe()), ("all", BlockExpansion([0, 1, 2])), ("full", FedAvg())):
        loop = mixed(tmp_path / name, algorithm, rounds=1)
        seconds[name] = loop.run()["simulated_seconds"]
    assert seconds["fedbe"] < seconds["all"] and seconds["fedbe"] < seconds["full"]


def test_a_client_that_cannot_afford_a_block_is_reported(tmp_path):
    loop = toy_loop(tmp_path / "run", algorithm=fedbe(), rounds=1, clock=clock(STRONG, default=FORGETFUL))
    loop.run()
    record = loop.history[-1]
    assert record["idle"] == ["client-1", "client-2", "client-3"] and list(record["client_seconds"]) == ["client-0"]
    assert not record["explanation"]["clients"]["client-3"]["can_train"]


def test_as_rounds_become_longer_slow_clients_join(tmp_path):
    first = mixed(tmp_path / "first", fedbe(), rounds=1)
    first.run()
    quick, slow = (first.history[-1]["client_seconds"][client] for client in ("client-0", "client-3"))
    assert quick < slow / 1.1
    loop = mixed(tmp_path / "run", fedbe(round_seconds=1.05 * quick, round_growth=slow / quick), rounds=2)
    loop.run()
    assert loop.history[1]["idle"] == ["client-2", "client-3"] and loop.history[2]["idle"] == []
    # After thousands of rounds everybody has time for everything.
    assert set(loop.algorithm.strategy.allocate(["client-3"], 100_000)["client-3"]) == {"block_0", "block_1", "block_2"}


def test_too_little_memory_is_noted_for_methods_that_do_not_allocate(tmp_path):
    loop = toy_loop(tmp_path / "run", algorithm=FedAvg(), rounds=1, clock=clock(STRONG, default=FORGETFUL))
    loop.run()
    assert set(loop.history[-1]["lacking_memory"]) == {"client-1", "client-2", "client-3"}
    assert all(missing > 0 for missing in loop.history[-1]["lacking_memory"].values())


@pytest.mark.parametrize("late", ["drop", "partial"])
def test_late_clients_are_dropped_or_do_part_of_their_work(tmp_path, late):
    waiting = mixed(tmp_path / "wait", BlockExpansion([1]), rounds=1)
    waiting.run()
    times = waiting.history[-1]["client_seconds"]
    deadline = 0.9 * times["client-3"]
    strict = clock(STRONG, STRONG, late=late, deadline=deadline)
    loop = toy_loop(tmp_path / late, algorithm=BlockExpansion([1]), rounds=1, clock=strict)
    loop.run()
    record = loop.history[-1]
    assert record["simulated_seconds"] <= deadline * (1 + 1e-6)
    assert record["late"] == (["client-2", "client-3"] if late == "drop" else [])
    assert record["client_seconds"]["client-0"] == pytest.approx(times["client-0"])
    if late == "partial":
        assert record["client_seconds"]["client-3"] < times["client-3"]


def test_who_is_not_there_is_not_sampled(tmp_path):
    rarely = Profile(1e9, 1e6, 1e6, 1e6, availability=1e-6)
    there = clock(STRONG, rarely, default=STRONG)
    loop = toy_loop(tmp_path / "run", algorithm=fedbe(), cohort=3, clock=there)
    loop.run()
    assert all(record["cohort"] == ["client-0", "client-2", "client-3"] for record in loop.history[1:])


def test_clients_probe_and_the_choice_is_explained(tmp_path):
    algorithm = FedBE(placement=AdaptivePlacement(max_blocks=2), probe_clients=3)
    loop = toy_loop(tmp_path / "run", algorithm=algorithm, rounds=1)
    before = outputs(loop.model)
    loop.setup()
    assert torch.equal(outputs(loop.model), before)
    told = algorithm.strategy.explanation()
    assert told["positions"] == list(algorithm.adaptation.expansion.positions) and 1 <= len(told["positions"]) <= 2
    assert [reason["position"] for reason in told["placement"]["reasons"]] == [0, 1, 2]
    assert all(reason["why"] and reason["score"] > 0 for reason in told["placement"]["reasons"])
    json.dumps(told)


@pytest.mark.parametrize(
    "score",
    [LossScore(), RandomScore(), StaticScore("top-first"), LabelDivergenceScore()],
    ids=lambda s: type(s).__name__,
)
def test_every_score_allocates_within_the_budgets(tmp_path, score):
    loop = mixed(tmp_path / "run", fedbe(score=score, allocator=Allocator(0)))
    loop.run()
    for record in loop.history[1:]:
        assert len(record["allocation"]["client-0"]) == 3 and len(record["allocation"]["client-3"]) == 1


def test_labels_are_counted_over_all_batches_and_padded_to_the_same_classes():
    batches = [{"labels": torch.tensor([0, 2, -100])}, {"labels": torch.tensor([[1, 2]])}]
    assert label_counts(iter(batches)) == (1, 1, 2)
    assert of_equal_length({"a": (1,), "b": (0, 3)}) == {"a": (1, 0), "b": (0, 3)}


def test_growth_keeps_the_function_and_renames_what_belongs_to_parameters(tmp_path):
    server = FedAdam(learning_rate=0.01)
    algorithm = FedBE(placement=AdaptivePlacement(max_blocks=1), plateau=Plateau(**ALWAYS_STALLED))
    loop = toy_loop(tmp_path / "run", algorithm=algorithm, server_optimizer=server, rounds=3)
    loop.setup()
    loop.on_run_start()
    blocks = algorithm.adaptation
    positions = [blocks.expansion.positions]
    for number in (1, 2, 3):  # the first score is always a gain
        loop.round.begin(number)
        loop._train()
        before, moments = outputs(loop.model), {n: m["m"].sum().item() for n, m in server.moments.items()}
        loop.record.downstream = {"accuracy": 0.0}
        loop.restructured(loop.server.grow(loop.record.to_dict(), loop._inputs))
        assert torch.equal(outputs(loop.model), before)
        positions.append(blocks.expansion.positions)
        after = {n: m["m"].sum().item() for n, m in server.moments.items()}
        state = loop.server.state
        assert sorted(after.values()) == sorted(moments.values()) and set(after) <= set(state)
        assert all(torch.equal(loop.model.get_parameter(n), t) for n, t in state.items())
        assert algorithm.strategy.score.block_names == tuple(blocks.units())
    assert [len(p) for p in positions] == [1, 1, 2, 3] and sorted(blocks.units()) == [
        "block_0",
        "block_1",
        "block_2",
    ]


def test_a_run_that_has_grown_continues_to_the_same_result(tmp_path):
    def make(name, rounds):
        algorithm = Gated(
            FedBE(placement=AdaptivePlacement(max_blocks=1), plateau=Plateau(**ALWAYS_STALLED)),
            sequences=4, sequence_length=8,
        )  # fmt: skip
        return mixed(tmp_path / name, algorithm, rounds=rounds, callbacks=[CheckpointCallback()])

    whole, first, second = make("whole", 4), make("first", 2), make("first", 4)
    whole.run()
    first.run()
    resumed(second)
    while not second.done:
        second.advance()
    assert whole.algorithm.adaptation.expansion == second.algorithm.adaptation.expansion
    state, continued = whole.server.state, second.server.state
    assert all(torch.equal(state[name], continued[name]) for name in state)
    assert whole.history[-1]["allocation"] == second.history[-1]["allocation"]


def test_scaffold_goes_on_after_growth(tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    objective = Scaffold()
    algorithm = FedBE(placement=AdaptivePlacement(max_blocks=1), plateau=Plateau(**ALWAYS_STALLED))
    loop = toy_loop(tmp_path / "run", algorithm=algorithm, objective=objective, optimizer=sgd, rounds=3)
    loop.run()
    assert set(objective.control) == set(loop.server.state) and len(algorithm.adaptation.expansion.positions) == 3


def gated_loop(folder, inner=None, **changes):
    return toy_loop(folder, algorithm=Gated(inner or BlockExpansion([0, 2]), sequences=4, sequence_length=8), **changes)


def test_the_gate_changes_nothing_of_what_the_blocks_learn(tmp_path):
    gated, plain = gated_loop(tmp_path / "a"), toy_loop(tmp_path / "b", algorithm=BlockExpansion([0, 2]))
    gated.run()
    plain.run()
    for name, tensor in plain.server.state.items():
        torch.testing.assert_close(gated.server.state[name], tensor, rtol=0, atol=0)


def test_the_gate_learns_to_tell_clients_from_the_base(tmp_path):
    loop = gated_loop(tmp_path / "run", rounds=6)
    loop.run()
    gate = find_gate(loop.model)
    loop.model(input_ids=ToyData().client_dataset("client-0").rows)
    own = torch.sigmoid(gate(gate.features)).mean().item()
    base = torch.sigmoid(gate(loop.algorithm.gate._negatives)).mean().item()
    assert own > base + 0.2
    names = loop.algorithm.gate.trainable_names
    assert set(loop.server.state) >= set(names) and len(names) == 2


def test_shut_it_is_the_base_model_to_the_bit(tmp_path):
    loop = gated_loop(tmp_path / "run")
    base = outputs(loop.model)
    loop.run()
    assert not torch.equal(outputs(loop.model), base)
    find_gate(loop.model).mode = "shut"
    assert torch.equal(outputs(loop.model), base)


BARE = [FedAvg(), Unfreeze([1]), FLoRA(), FedSALoRA(), LocalOnly(BlockExpansion(1)), Gated(BlockExpansion(1))]


@pytest.mark.parametrize("inner", BARE, ids=lambda a: type(a).__name__)
def test_what_cannot_be_gated_is_refused(inner):
    (problem,) = Gated(inner).check("algorithm.init_args", Facts(depth=3))
    assert (problem.key, problem.value) == ("algorithm.init_args.algorithm", type(inner).__name__)


def test_mistakes_in_the_gate_and_in_what_is_gated_are_found_before_work():
    problems = Gated(BlockExpansion(4), 3, sequences=1, weight=0, openness=1).check(
        "algorithm.init_args", Facts(depth=3)
    )
    assert [problem.key.removeprefix("algorithm.init_args.") for problem in problems] == [
        "algorithm.init_args.positions", "block", "sequences", "openness", "weight",
    ]  # fmt: skip


def test_the_head_and_the_gate_are_trained_by_whoever_trains_a_block(tmp_path):
    loop = mixed(tmp_path / "run", Gated(fedbe(), sequences=4, sequence_length=8), rounds=1)
    loop.run()
    assert loop.history[-1]["allocation"] == {
        "client-0": ["block_0", "block_1", "block_2", "gate"], "client-1": ["block_0", "block_1", "block_2", "gate"],
        "client-2": ["block_2", "gate"], "client-3": ["block_2", "gate"],
    }  # fmt: skip


def test_what_fedbe_needs_of_a_run_and_leaves_to_others():
    quiet = fedbe(score=RandomScore())
    assert not quiet.needs and quiet.offers == ALL
    for algorithm in (fedbe(), FedBE(score=RandomScore()), Gated(FedBE())):
        assert Trait.SERVER_SEES_REPORTS in algorithm.needs
    assert ALL - fedbe(plateau=Plateau()).offers == {Trait.FIXED_STRUCTURE}


def test_who_probes_follows_from_the_placement_and_the_score():
    names = [f"client-{k}" for k in range(9)]
    assert list(fedbe().strategy.probed(names)) == []
    assert list(fedbe(score=LabelDivergenceScore()).strategy.probed(names)) == names
    drawn = FedBE(probe_clients=4).strategy.probed(names)
    assert len(drawn) == 4 and drawn == sorted(drawn) and set(drawn) < set(names)


def updates(loop, metrics):
    """Two tasks and their updates, as alike as clients are, the second with these metrics."""
    tasks = [loop.server.task(client, 0, 0, loop.algorithm.adaptation.units()) for client in ("client-0", "client-1")]
    for task, number in zip(tasks, (1.0, 5.0), strict=True):
        norms = {f"gradient_norm/{block}": number for block in ("block_0", "block_1", "block_2")}
        told = {"first_loss": 2.0, "last_loss": 1.0, **norms}
        tensors = {name: tensor + number for name, tensor in task.received.items()}
        yield task, Update(task.client_id, tensors, 4, told | (metrics if number == 5.0 else {}))


UNUSABLE = [
    *(
        {"gradient_norm/block_1": value}
        for value in (math.nan, math.inf, -math.inf, "high", None, True, [1.0], 10**400)
    ),
    {"gradient_norm/block_7": 1.0},
    {"gradient_norm/": 1.0},
    *({name: value} for name in ("first_loss", "last_loss") for value in ("low", None, False, 10**400)),
]


@pytest.mark.parametrize("metrics", UNUSABLE, ids=str)
def test_an_update_whose_metrics_the_score_cannot_use_is_refused_before_any_of_it_is_taken_in(tmp_path, metrics):
    refused(tmp_path, GradientScore(), metrics)


@pytest.mark.parametrize("name", ["first_loss", "last_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_the_score_cannot_use_is_refused_before_any_of_the_update_is_taken_in(tmp_path, name, value):
    refused(tmp_path, LossScore(), {name: value})


def refused(folder, score, metrics):
    def server(name):
        loop = toy_loop(folder / name, algorithm=fedbe(score=score if name == "both" else type(score)()))
        loop.setup()
        loop.server.begin_round(0)
        return loop

    both, alone = server("both"), server("alone")
    (first, good), (second, bad) = updates(both, metrics)
    with pytest.raises(UpdateError, match="client-1"):
        both.algorithm.strategy.check_report(second, bad)
    both.server.receive(first, good)
    alone.server.receive(first, good)
    with pytest.raises(UpdateError, match="client-1"):
        both.server.receive(second, bad)
    assert both.algorithm.strategy.state_dict() == alone.algorithm.strategy.state_dict()
    expected, found = alone.server.step(), both.server.step()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_mistakes_in_the_parts_of_fedbe_are_found_before_work():
    algorithm = FedBE(
        placement=AdaptivePlacement(max_blocks=0), allocator=Allocator(-1), plateau=Plateau(patience=0),
        score=StaticScore([-1.0]), round_seconds=0.0, round_growth=0.9, probe_clients=0, probe_batches=0,
        sketch=-1,
    )  # fmt: skip
    keys = {
        problem.key.removeprefix("algorithm.init_args.")
        for problem in algorithm.check("algorithm.init_args", Facts(depth=3))
    }
    assert keys == {
        "placement.init_args.max_blocks", "placement.init_args.min_blocks", "allocator.coverage", "plateau.patience",
        "score.init_args.values", "round_seconds", "round_growth", "probe_clients", "probe_batches", "sketch",
    }  # fmt: skip


def test_clients_report_gradients_of_what_began_as_zeros_of_the_blocks_they_train(tmp_path):
    reports = {}

    class Listener(StaticScore):
        def observe(self, client_id, gradient_norms, loss_before, loss_after, round_index):
            reports[client_id] = gradient_norms, loss_before, loss_after

    algorithm = fedbe(score=Listener())
    loop = mixed(tmp_path / "run", algorithm, rounds=1)
    loop.run()
    watched = algorithm.adaptation.watched(algorithm.adaptation.trainable_names)
    assert watched["block_1"] == ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight")
    assert set(reports["client-0"][0]) == {"block_0", "block_1", "block_2"} and set(reports["client-3"][0]) == {
        "block_2"
    }
    for norms, before, after in reports.values():
        assert all(norm > 0 for norm in norms.values()) and before > 0 and after > 0


def test_adapters_above_the_block_that_the_gate_sees_are_gated_too(tmp_path):
    inner = FedIT(rank=2, dropout=0.0, first_block=1)
    loop = gated_loop(tmp_path / "run", inner, rounds=3)
    base = outputs(loop.model)
    loop.run()
    assert all(".layers.0." not in name for name in inner.adaptation.factor_names)
    assert not torch.equal(outputs(loop.model), base)
    find_gate(loop.model).mode = "shut"
    assert torch.equal(outputs(loop.model), base)
    plain, loading = AutoModelForCausalLM.from_pretrained(loop.folder.model, output_loading_info=True)
    assert not loading["unexpected_keys"] and "not in it" in loop.summary["model"]["note"]
    find_gate(loop.model).mode = "open"
    torch.testing.assert_close(outputs(plain), outputs(loop.model))
