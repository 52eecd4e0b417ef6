import pytest
import torch
from torch import nn
from toy import ToyData, adamw, resumed, toy_loop

from fedbe.aggregation import FedAdam
from fedbe.algorithms import FedAvg, FLoRA, LocalOnly, Unfreeze
from fedbe.callbacks import CheckpointCallback
from fedbe.errors import Facts, UpdateError
from fedbe.federation import run_state
from fedbe.messages import FitTask, Update
from fedbe.objectives import FedProx, Objective, Plain, Scaffold
from fedbe.traits import Trait


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def toy_with(folder, objective, **changes):
    return toy_loop(folder, objective=objective, algorithm=Unfreeze([1]), optimizer=sgd, **changes)


def task(names, extra=()):
    return FitTask("client", 0, 0, {}, tuple(names), extra=dict(extra))


def own_controls(loop):
    """What each client's objective keeps, by the client's name."""
    kept = {}
    for key, tensor in loop.engine.tensors(loop.server.accepted).items():
        part, _, client, name = key.split("/")
        if part == "objective":
            kept.setdefault(client, {})[name] = tensor
    return kept


def one_weight(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_plain_leaves_loss_and_gradients_alone():
    model = one_weight(1.0)
    local = Plain().local(model, task(["weight"]), {})
    model.weight.grad = torch.full((1, 1), 3.0)
    local.correct_gradients(0.1)
    assert local.loss(torch.tensor(5.0), {}).item() == 5.0 and model.weight.grad.item() == 3.0


def test_fedprox_adds_half_mu_times_the_squared_distance():
    model = one_weight(1.0)
    local = FedProx(mu=0.5).local(model, task(["weight"]), {})
    with torch.no_grad():
        model.weight.fill_(4.0)
    loss = local.loss(torch.tensor(2.0), {})
    loss.backward()
    assert loss.item() == 2.0 + 0.25 * 9.0
    assert model.weight.grad.item() == 0.5 * 3.0


def test_fedprox_holds_clients_near_the_global_model(tmp_path):
    def distance(mu):
        loop = toy_with(tmp_path / str(mu), FedProx(mu), rounds=1)
        loop.setup()
        task = loop.server.task("client-3", 0, 0, ("block_1",))
        update = loop.engine.training.train(task)
        return sum((t - task.received[n]).square().sum().item() for n, t in update.tensors.items())

    assert distance(5.0) < 0.9 * distance(0.0)


def test_one_scaffold_client_by_hand():
    model = one_weight(1.0)
    server, own = {"weight": torch.full((1, 1), 0.5)}, {"weight": torch.full((1, 1), 0.2)}
    local = Scaffold().local(model, task(["weight"], server), own)
    for gradient in (2.0, 1.0):
        model.weight.grad = torch.full((1, 1), gradient)
        local.correct_gradients(0.1)
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad
    sent, kept = local.finish()
    y = 1.0 - 0.1 * (2.0 - 0.2 + 0.5) - 0.1 * (1.0 - 0.2 + 0.5)
    expected = 0.2 - 0.5 + (1.0 - y) / (2 * 0.1)
    assert model.weight.item() == pytest.approx(y)
    assert kept["weight"].item() == pytest.approx(expected, rel=1e-5) == pytest.approx(1.5)
    assert sent["weight"].item() == pytest.approx(expected - 0.2, rel=1e-5)


def test_the_server_divides_by_all_clients_and_only_at_the_end_of_the_round():
    scaffold = Scaffold()
    scaffold.setup({"weight": torch.zeros(1)}, clients=4)
    for value in (1.0, 3.0):
        scaffold.receive(Update("x", {}, 1, extra={"weight": torch.full((1,), value)}))
        assert scaffold.send(["weight"])["weight"].item() == 0.0
    scaffold.step()
    assert scaffold.send(["weight"])["weight"].item() == (1.0 + 3.0) / 4


@pytest.mark.parametrize(
    "change", [{"weight": torch.full((1,), float("nan"))}, {"weight": torch.zeros(2)}, {"other": torch.zeros(1)}]
)
def test_a_control_variate_that_cannot_be_added_is_refused_with_the_client_s_name_and_nothing_of_it_is_kept(change):
    scaffold = Scaffold()
    scaffold.setup({"weight": torch.zeros(1), "bias": torch.zeros(1)}, clients=1)
    with pytest.raises(UpdateError, match="client-7"):
        scaffold.check_update(Update("client-7", {}, 1, extra={"bias": torch.ones(1), **change}))
    scaffold.step()
    assert all(not control.any() for control in scaffold.send(["weight", "bias"]).values())


def test_with_full_participation_the_server_s_control_is_the_mean_of_the_clients(tmp_path):
    loop = toy_with(tmp_path / "run", Scaffold(), rounds=3)
    loop.run()
    own, controls = own_controls(loop), loop.plan.objective.control
    assert len(own) == 4
    for name, control in controls.items():
        mean = torch.stack([kept[name] for kept in own.values()]).mean(0)
        torch.testing.assert_close(control, mean, rtol=1e-4, atol=1e-6)
    assert max(control.abs().max() for control in controls.values()) > 1e-3


def test_a_round_with_scaffold_is_the_rule_on_a_plain_loop(tmp_path):
    loop = toy_with(tmp_path / "run", Scaffold(), rounds=2, data=ToyData(clients=2, samples=(4, 4)))
    loop.setup()
    loop.folder.create({})
    loop.advance()
    c = {name: t.clone() for name, t in loop.plan.objective.control.items()}
    own = {name: t.clone() for name, t in own_controls(loop)["client-1"].items()}
    task = loop.server.task("client-1", 0, 1, ("block_1",))
    update = loop.engine.training.train(task)
    loop.plan.topology.begin(loop.model, loop.plan.adaptation, task, {})
    rows = loop.plan.data.client_dataset("client-1").rows
    for _ in range(3):
        loop.model.zero_grad()
        loop.model(input_ids=rows, labels=rows).loss.backward()
        for name in task.trainable_names:
            parameter = loop.model.get_parameter(name)
            parameter.data -= 0.1 * (parameter.grad - own[name] + c[name])
    for name, tensor in update.tensors.items():
        torch.testing.assert_close(tensor, loop.model.get_parameter(name).data, rtol=1e-4, atol=1e-6)


def test_scaffold_continues_from_a_checkpoint_to_the_same_tensors(tmp_path):
    whole = toy_with(tmp_path / "a", Scaffold(), rounds=3, cohort=3, server_optimizer=FedAdam())
    whole.run()
    half = toy_with(
        tmp_path / "b", Scaffold(), rounds=3, cohort=3, server_optimizer=FedAdam(), callbacks=[CheckpointCallback()]
    )
    half.setup()
    half.on_run_start()
    half.advance()
    half.advance()
    rest = toy_with(
        tmp_path / "b", Scaffold(), rounds=3, cohort=3, server_optimizer=FedAdam(), callbacks=[CheckpointCallback()]
    )
    resumed(rest)
    while not rest.done:
        rest.advance()
    first, second = run_state.tensors(whole), run_state.tensors(rest)
    assert first.keys() == second.keys() and any(key.startswith("engine/objective/") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_scaffold_refuses_all_but_plain_sgd():
    assert Scaffold().check("client.objective.init_args", Facts(optimizer=sgd)) == []
    for optimizer in (adamw, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        (problem,) = Scaffold().check("client.objective.init_args", Facts(optimizer=optimizer))
        assert problem.key == "client.optimizer" and "plain SGD" in problem.remedy


def test_a_negative_mu_is_a_problem():
    problems = FedProx(-1.0).check("client.objective.init_args", Facts())
    assert [problem.key for problem in problems] == ["client.objective.init_args.mu"]


@pytest.mark.parametrize(
    ("algorithm", "objective", "missing"),
    [
        (FedAvg(), Scaffold(), set()),
        (LocalOnly(FedAvg()), Plain(), set()),
        (LocalOnly(FedAvg()), FedProx(), {Trait.GLOBAL_MODEL}),
        (LocalOnly(FedAvg()), Scaffold(), {Trait.GLOBAL_MODEL}),
        (FLoRA(rank=2), FedProx(), set()),
        (FLoRA(rank=2), Scaffold(), {Trait.LASTING_TENSORS}),
    ],
)
def test_objectives_need_what_their_rule_rests_on(algorithm, objective, missing):
    assert objective.needs - algorithm.offers == missing


def test_an_objective_of_one_s_own_acts_on_one_client_unless_it_says_otherwise():
    class Own(Objective):
        """Whatever."""

    assert Own().needs == {Trait.SINGLE_CLIENT_STEPS} and Plain().needs == set()
    assert Trait.SERVER_SEES_REPORTS in Scaffold().needs
