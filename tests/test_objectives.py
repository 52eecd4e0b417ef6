import pytest
import torch
from torch import nn
from toy import ToyData, adamw, resumed, toy_loop

from fedbe.aggregation import FedAdam
from fedbe.algorithms import Unfreeze
from fedbe.callbacks import CheckpointCallback
from fedbe.errors import Facts, UpdateError
from fedbe.messages import ClientTask, Update
from fedbe.objectives import FedProx, Plain, Scaffold


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def toy_with(folder, objective, **changes):
    loop = toy_loop(folder, objective=objective, algorithm=Unfreeze([1]), optimizer=sgd, **changes)
    loop.engine.objective = objective
    return loop


def task(names, extra=(), kept=()):
    return ClientTask("client", 0, 0, {}, tuple(names), extra=dict(extra), objective_kept=dict(kept))


def one_weight(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_plain_leaves_loss_and_gradients_alone():
    model = one_weight(1.0)
    local = Plain().local(model, task(["weight"]))
    model.weight.grad = torch.full((1, 1), 3.0)
    local.correct_gradients(0.1)
    assert local.loss(torch.tensor(5.0), {}).item() == 5.0 and model.weight.grad.item() == 3.0


def test_fedprox_adds_half_mu_times_the_squared_distance():
    model = one_weight(1.0)
    local = FedProx(mu=0.5).local(model, task(["weight"]))
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
        loop.progress.started = 1
        task = loop.task("client-3", ("block_1",))
        update = loop.engine.train_client(task)
        return sum((t - task.received[n]).square().sum().item() for n, t in update.tensors.items())

    assert distance(5.0) < 0.9 * distance(0.0)


def test_one_scaffold_client_by_hand():
    model = one_weight(1.0)
    server, own = {"weight": torch.full((1, 1), 0.5)}, {"weight": torch.full((1, 1), 0.2)}
    local = Scaffold().local(model, task(["weight"], server, own))
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


def test_a_control_variate_that_is_not_finite_is_refused_with_the_client_s_name():
    scaffold = Scaffold()
    scaffold.setup({"weight": torch.zeros(1)}, clients=1)
    with pytest.raises(UpdateError, match="client-7"):
        scaffold.receive(Update("client-7", {}, 1, extra={"weight": torch.full((1,), float("nan"))}))


def test_with_full_participation_the_server_s_control_is_the_mean_of_the_clients(tmp_path):
    loop = toy_with(tmp_path / "run", Scaffold(), rounds=3)
    loop.run()
    assert len(loop.objective_kept) == 4
    for name, control in loop.objective.control.items():
        mean = torch.stack([kept[name] for kept in loop.objective_kept.values()]).mean(0)
        torch.testing.assert_close(control, mean, rtol=1e-4, atol=1e-6)
    assert max(control.abs().max() for control in loop.objective.control.values()) > 1e-3


def test_a_round_with_scaffold_is_the_rule_on_a_plain_loop(tmp_path):
    loop = toy_with(tmp_path / "run", Scaffold(), rounds=2, data=ToyData(clients=2, samples=(4, 4)))
    loop.setup()
    loop.folder.create({})
    loop.advance()
    c = {name: t.clone() for name, t in loop.objective.control.items()}
    own = {name: t.clone() for name, t in loop.objective_kept["client-1"].items()}
    loop.progress.started = 2
    task = loop.task("client-1", ("block_1",))
    update = loop.engine.train_client(task)
    loop.algorithm.begin(loop.model, task)
    rows = loop.data.client_dataset("client-1").rows
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
    first, second = whole.tensors(), rest.tensors()
    assert first.keys() == second.keys() and any(key.startswith("objective_kept/client-") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_scaffold_refuses_all_but_plain_sgd():
    assert Scaffold().check("client.objective.init_args", Facts(optimizer=sgd)) == []
    for optimizer in (adamw, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        (problem,) = Scaffold().check("client.objective.init_args", Facts(optimizer=optimizer))
        assert problem.key == "client.optimizer" and "plain SGD" in problem.remedy


def test_a_negative_mu_is_a_problem():
    assert [problem.key for problem in FedProx(-1.0).check("client.objective.init_args", Facts())] == [
        "client.objective.init_args.mu"
    ]
