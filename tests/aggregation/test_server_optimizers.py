import numpy as np
import pytest
import torch

from fedbe.aggregation import FedAdagrad, FedAdam, FedAvgM, FedYogi, Mean
from fedbe.errors import Facts

ROUNDS = 5


def means(seed=0, shape=(3, 4)):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=shape).astype(np.float32) for _ in range(ROUNDS)]


def by_hand(kind, start, rounds, eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3):
    """The rules written out in float64, element by element."""
    w = start.astype(np.float64).copy()
    m, v = np.zeros_like(w), np.full_like(w, 0.0 if kind == "momentum" else tau**2)
    for mean in rounds:
        for index in np.ndindex(w.shape):
            d = float(mean[index]) - w[index]
            if kind == "momentum":
                m[index] = beta_1 * m[index] + d
                w[index] += eta * m[index]
                continue
            m[index] = beta_1 * m[index] + (1 - beta_1) * d
            if kind == "adagrad":
                v[index] += d * d
            elif kind == "adam":
                v[index] = beta_2 * v[index] + (1 - beta_2) * d * d
            elif v[index] > d * d:
                v[index] -= (1 - beta_2) * d * d
            else:
                v[index] += (1 - beta_2) * d * d
            w[index] += eta * m[index] / (v[index] ** 0.5 + tau)
    return w


def run(optimizer, start, rounds):
    state = {"w": torch.from_numpy(start.copy())}
    for mean in rounds:
        state = optimizer.step(state, {"w": torch.from_numpy(mean)}, {"w"})
    return state["w"].numpy()


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("momentum", FedAvgM(momentum=0.9, learning_rate=0.1)),
        ("adagrad", FedAdagrad(learning_rate=0.1, beta_1=0.9)),
        ("adam", FedAdam(learning_rate=0.1)),
        ("yogi", FedYogi(learning_rate=0.1)),
    ],
)
def test_five_rounds_agree_with_the_rule_written_by_hand(kind, optimizer):
    start = means(1)[0]
    np.testing.assert_allclose(run(optimizer, start, means()), by_hand(kind, start, means()), rtol=2e-4, atol=1e-5)


def test_momentum_is_that_of_sgd_with_minus_the_update_for_a_gradient():
    start, parameter = means(1)[0], torch.nn.Parameter(torch.from_numpy(means(1)[0]))
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    for mean in means():
        parameter.grad = parameter.detach() - torch.from_numpy(mean)
        sgd.step()
    np.testing.assert_allclose(run(FedAvgM(0.9, 0.1), start, means()), parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adam_squares_the_update_and_not_its_momentum():
    optimizer = FedAdam(beta_1=0.9, beta_2=0.5, tau=1e-3)
    optimizer.step({"w": torch.zeros(1)}, {"w": torch.full((1,), 2.0)}, {"w"})
    assert optimizer.moments["w"]["m"].item() == pytest.approx(0.2)
    assert optimizer.moments["w"]["v"].item() == pytest.approx(0.5 * 1e-6 + 0.5 * 4.0)


def test_yogi_lets_its_second_moment_fall_no_faster_than_the_squared_update():
    optimizer = FedYogi(beta_2=0.9)
    optimizer.moments["w"] = {"m": torch.zeros(1), "v": torch.full((1,), 100.0)}
    optimizer.step({"w": torch.zeros(1)}, {"w": torch.ones(1)}, {"w"})
    assert optimizer.moments["w"]["v"].item() == pytest.approx(100 - 0.1 * 1)


def test_mean_takes_the_mean_to_the_bit():
    state, mean = {"w": torch.from_numpy(means(1)[0])}, {"w": torch.from_numpy(means(2)[0])}
    assert Mean().step(state, mean, {"w"})["w"] is mean["w"]


def test_momentum_without_memory_at_rate_one_is_the_mean():
    np.testing.assert_allclose(run(FedAvgM(momentum=0.0), means(1)[0], means()), means()[-1], atol=1e-6)


@pytest.mark.parametrize("kind", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_a_tensor_that_nobody_trained_keeps_its_value_and_its_moments(kind):
    optimizer = kind()
    state = {"a": torch.zeros(2), "b": torch.ones(2)}
    state = optimizer.step(state, {"a": torch.ones(2), "b": torch.zeros(2)}, {"a", "b"})
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    after = optimizer.step(state, {"a": torch.full((2,), 3.0), "b": state["b"]}, {"a"})
    assert torch.equal(after["b"], state["b"]) and not torch.equal(after["a"], state["a"])
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.endswith(":b")


def test_integer_tensors_pass_through_and_types_stay():
    state = {"count": torch.tensor([3]), "half": torch.zeros(2, dtype=torch.bfloat16)}
    mean = {"count": torch.tensor([7]), "half": torch.ones(2, dtype=torch.bfloat16)}
    after = FedAdam(learning_rate=0.1).step(state, mean, set(state))
    assert after["count"].item() == 7 and after["half"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Mean, FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_a_restored_optimizer_goes_on_to_the_same_values(kind):
    whole, rounds = kind(), [{"x.y": torch.from_numpy(mean)} for mean in means()]
    state = {"x.y": torch.zeros(3, 4)}
    for mean in rounds[:3]:
        state = whole.step(state, mean, {"x.y"})
    other = kind()
    other.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    for mean in rounds[3:]:
        expected, got = whole.step(state, mean, {"x.y"}), other.step(state, mean, {"x.y"})
        assert torch.equal(expected["x.y"], got["x.y"])
        state = expected


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [
        (FedAvgM(momentum=1.0), "momentum"),
        (FedAvgM(learning_rate=0.0), "learning_rate"),
        (FedAdagrad(tau=0.0), "tau"),
        (FedAdam(beta_1=-0.1), "beta_1"),
        (FedYogi(beta_2=1.5), "beta_2"),
    ],
)
def test_a_number_out_of_range_is_a_problem_with_its_key(optimizer, key):
    assert [problem.key for problem in optimizer.check("federation.server_optimizer.init_args", Facts())] == [
        f"federation.server_optimizer.init_args.{key}"
    ]
    assert type(optimizer)().check("federation.server_optimizer.init_args", Facts()) == []
