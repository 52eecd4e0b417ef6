"""Our server optimizers beside Flower's, on the same updates of the same clients.

FedAvgM is one rule in both. In the other three Flower departs from algorithm 2 of arXiv 2003.00295, which we follow:
v starts at 0 instead of τ² or more, and FedAdam corrects for the bias of m and v, with an exponent that is one more
than the number of the round. Each test takes exactly that difference away and finds the rest equal.
"""

import numpy as np
import pytest
import torch

from fedbe.aggregation import FedAdagrad, FedAdam, FedAvgM, FedYogi, HolderMean
from fedbe.messages import Update

common = pytest.importorskip("flwr.common")
flower = pytest.importorskip("flwr.server.strategy")

ETA, BETA_1, BETA_2, TAU = 0.1, 0.9, 0.99, 0.5
DRAW = np.random.default_rng(0)
START = DRAW.normal(size=(3, 4)).astype(np.float32)
ROUNDS = [[(DRAW.normal(size=START.shape).astype(np.float32), samples) for samples in (3, 5, 8)] for _ in range(5)]


def ours(optimizer, learning_rate=lambda round_number: ETA):
    """The global tensor after each round."""
    state, seen = {"w": torch.from_numpy(START.copy())}, []
    for number, clients in enumerate(ROUNDS, 1):
        optimizer.learning_rate = learning_rate(number)
        mean = HolderMean(state)
        for name, (tensor, samples) in enumerate(clients):
            mean.add(Update(str(name), {"w": torch.from_numpy(tensor)}, samples))
        state = optimizer.step(state, mean.result(), {"w"})
        seen.append(state["w"].numpy())
    return np.stack(seen)


def theirs(kind, v=None, **options):
    strategy = kind(initial_parameters=common.ndarrays_to_parameters([START]), **options)
    if v is not None:
        strategy.v_t = [np.full_like(START, v)]
    done, seen = common.Status(common.Code.OK, ""), []
    for number, clients in enumerate(ROUNDS, 1):
        replies = [(None, common.FitRes(done, common.ndarrays_to_parameters([w]), n, {})) for w, n in clients]
        parameters, _ = strategy.aggregate_fit(number, replies, [])
        seen.append(common.parameters_to_ndarrays(parameters)[0])
    return np.stack(seen)


def close(first, second):
    return np.allclose(first, second, rtol=1e-5, atol=1e-6)


def test_momentum_is_the_same_rule():
    options = {"server_momentum": BETA_1, "server_learning_rate": ETA}
    assert close(ours(FedAvgM(BETA_1)), theirs(flower.FedAvgM, **options))


ADAPTIVE = {
    "adagrad": (lambda tau: FedAdagrad(beta_1=0.0, tau=tau), flower.FedAdagrad, {}),
    "yogi": (lambda tau: FedYogi(ETA, BETA_1, BETA_2, tau), flower.FedYogi, {"beta_1": BETA_1, "beta_2": BETA_2}),
}


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_adagrad_and_yogi_differ_in_the_start_of_the_second_moment_only(rule):
    own, kind, options = ADAPTIVE[rule]
    expected = ours(own(TAU))
    assert close(expected, theirs(kind, v=TAU**2, eta=ETA, tau=TAU, **options))
    assert not close(expected, theirs(kind, eta=ETA, tau=TAU, **options))
    assert close(ours(own(1e-9)), theirs(kind, eta=ETA, tau=1e-9, **options))  # Flower's default: τ² is nothing


def test_adam_differs_in_the_start_of_the_second_moment_and_in_the_bias_correction_only():
    def corrected(number, offset=1):
        steps = number + offset
        return ETA * (1 - BETA_2**steps) ** 0.5 / (1 - BETA_1**steps)

    options = {"eta": ETA, "beta_1": BETA_1, "beta_2": BETA_2, "tau": TAU}
    whole, started = theirs(flower.FedAdam, **options), theirs(flower.FedAdam, v=TAU**2, **options)
    adam = [ours(FedAdam(ETA, BETA_1, BETA_2, TAU), rate) for rate in (corrected, lambda number: ETA)]
    assert close(adam[0], started)
    assert not close(adam[0], whole) and not close(adam[1], started)
    # Kingma and Ba (arXiv 1412.6980) count the first step as 1.
    assert not close(ours(FedAdam(ETA, BETA_1, BETA_2, TAU), lambda number: corrected(number, 0)), started)
