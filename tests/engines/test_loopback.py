"""Parties that share nothing but bytes come to what `fedbe fit` comes to in one process, to the bit, in every case."""

import pytest
import torch
from parties import CLIENTS, NoRows, Tapped, client, federated, in_process, outcome, over_bytes
from toy import tiny_llama

from fedbe.aggregation import (
    CoordinateMedian,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    Krum,
    NormClipping,
    PrivateMean,
    TrimmedMean,
)
from fedbe.algorithms import (
    Centralized,
    FedAvg,
    FedBE,
    FedExLoRA,
    FedIT,
    FedSALoRA,
    FedTaLoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    Gated,
    HetLoRA,
    LocalOnly,
    SLoRA,
    Unfreeze,
)
from fedbe.algorithms.blocks.block_expansion import BlockExpansion
from fedbe.allocation import GivenFleet, LossScore, Profile, SimulatedClock
from fedbe.callbacks import FaultInjection
from fedbe.client.schedule import Schedule
from fedbe.engines import InProcess
from fedbe.engines.loopback import LoopbackChannel
from fedbe.engines.remote import RemoteEngine
from fedbe.errors import ConfigError
from fedbe.evaluation import SampledTextTask
from fedbe.expansion.growth import Plateau
from fedbe.expansion.placement import AdaptivePlacement, FixedPlacement
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.objectives import Anchor, FedProx, Scaffold
from fedbe.prefix import PrefixReuse

WRITES = {"sequences": 6, "sequence_length": 8}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def devices(**settings):
    def device(flops, memory=1e9):
        return Profile(memory, flops, 1e6, 1e6)

    profiles = {"client-0": device(4e8), "client-1": device(2e7)}
    return SimulatedClock(GivenFleet(profiles, device(1e7)), **settings)


def grows():
    return FedBE(AdaptivePlacement(max_blocks=2, min_blocks=1), plateau=Plateau(patience=1, min_gain=1.0), sketch=4)


CASES = {
    "blocks": lambda: {"algorithm": BlockExpansion([0, 2]), "rounds": 3, "cohort": 2},
    "blocks, a schedule over the run": lambda: {"schedule": Schedule("cosine", 2, "run")},
    "blocks, dropout, whole epochs, clipped": lambda: {
        "model": tiny_llama(dropout=0.5),
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    },
    "blocks, a general task": lambda: {"general_tasks": [SampledTextTask(**WRITES)]},
    "blocks on a prefix": lambda: {"algorithm": BlockExpansion([2]), "prefix": PrefixReuse(), "rounds": 3},
    "existing blocks": lambda: {"algorithm": Unfreeze([1])},
    "FedBE, probes and growth": lambda: {"algorithm": grows(), "rounds": 4},
    "FedBE, probes, allocation and growth": lambda: {"algorithm": grows(), "rounds": 4, "clock": devices()},
    "FedBE, allocation by gradients": lambda: {
        "algorithm": FedBE(FixedPlacement([0, 1, 2]), round_seconds=0.55), "clock": devices(), "rounds": 3,
    },
    "FedBE, allocation by losses": lambda: {
        "algorithm": FedBE(FixedPlacement([0, 1, 2]), LossScore(), round_seconds=0.55), "clock": devices(), "rounds": 3,
    },
    "FedBE, growth, control variates": lambda: {
        "algorithm": grows(), "objective": Scaffold(), "optimizer": sgd, "rounds": 4,
    },
    "gated blocks": lambda: {"algorithm": Gated(BlockExpansion([1]), **WRITES)},
    "gated FedBE that grows": lambda: {"algorithm": Gated(grows(), **WRITES), "rounds": 4, "clock": devices()},
    "gated adapters": lambda: {"algorithm": Gated(FedIT(rank=2, first_block=1), **WRITES)},
    "anchor": lambda: {"objective": Anchor(**WRITES)},
    "anchor around FedProx": lambda: {"objective": Anchor(objective=FedProx(0.5), top=8, **WRITES)},
    "FedProx": lambda: {"objective": FedProx(0.5)},
    "SCAFFOLD": lambda: {"objective": Scaffold(), "optimizer": sgd, "rounds": 3, "cohort": 2},
    "FedIT": lambda: {"algorithm": FedIT(rank=2, dropout=0.2)},
    "FedIT, exported as an adapter": lambda: {"algorithm": FedIT(rank=2, export="adapter")},
    "FFA-LoRA": lambda: {"algorithm": FFALoRA(rank=2)},
    "FLoRA": lambda: {"algorithm": FLoRA(rank=2, ranks={"client-1": 1, "client-2": 3})},
    "FedEx-LoRA": lambda: {"algorithm": FedExLoRA(rank=2), "rounds": 3, "cohort": 2},
    "FlexLoRA": lambda: {"algorithm": FlexLoRA(rank=4, ranks=[2, 3, 4])},
    "HetLoRA, pruning": lambda: {
        "algorithm": HetLoRA(rank=4, ranks={"client-1": 2, "client-2": 4}, decay=0.5, penalty=1.0), "rounds": 3,
    },
    "SLoRA": lambda: {"algorithm": SLoRA(rank=2, sparse_rounds=1, density=0.1), "rounds": 3},
    "FedTaLoRA": lambda: {"algorithm": FedTaLoRA(rank=2)},
    "full tuning": lambda: {"algorithm": FedAvg()},
    "blocks alone": lambda: {"algorithm": LocalOnly(BlockExpansion([1])), "rounds": 3, "cohort": 2},
    "adapters alone": lambda: {"algorithm": LocalOnly(FedIT(rank=2))},
    "private mean": lambda: {"averaging": PrivateMean(0.5, 0.05, reproducible=True)},
    "norm clipping": lambda: {"averaging": NormClipping(0.3)},
    "median": lambda: {"averaging": CoordinateMedian()},
    "trimmed mean": lambda: {"averaging": TrimmedMean(0.34)},
    "Krum": lambda: {"averaging": Krum(malicious=0)},
    "FedAvgM": lambda: {"server_optimizer": FedAvgM(momentum=0.5), "rounds": 3},
    "FedAdagrad": lambda: {"server_optimizer": FedAdagrad(learning_rate=0.01), "rounds": 3},
    "FedAdam": lambda: {"server_optimizer": FedAdam(learning_rate=0.01), "algorithm": FedIT(rank=2), "rounds": 3},
    "FedYogi": lambda: {"server_optimizer": FedYogi(learning_rate=0.01), "rounds": 3},
    "clients that do a part": lambda: {"clock": devices(late="partial", deadline_seconds=0.5)},
    "late clients": lambda: {"clock": devices(late="drop", deadline_seconds=0.5)},
    "faulty clients": lambda: {"callbacks": [FaultInjection("nan", clients=["client-1"], rounds=[1])], "rounds": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_equal(found, expected):
    assert found["rounds"] == expected["rounds"]
    assert found["summary"] == expected["summary"]
    assert found["model"].keys() == expected["model"].keys() and expected["model"]
    assert [name for name, tensor in expected["model"].items() if not torch.equal(found["model"][name], tensor)] == []


SHOWN = {
    "FedBE, probes and growth": lambda last: last["explanation"]["positions"] == [0, 1, 2],
    "FedBE, growth, control variates": lambda last: last["explanation"]["positions"] == [0, 1, 2],
    "gated FedBE that grows": lambda last: last["explanation"]["positions"] == [0, 1, 2],
    "FedBE, allocation by gradients": lambda last: len(set(map(tuple, last["allocation"].values()))) > 1,
    "FedBE, allocation by losses": lambda last: len(set(map(tuple, last["allocation"].values()))) > 1,
    "late clients": lambda last: last["late"] == ["client-2"],
    "blocks alone": lambda last: last["personalised"]["min"] < last["personalised"]["max"],
}
"""Case → whether the record of its last round shows what it is about."""


@pytest.mark.filterwarnings("ignore:The base model scores 0 on:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_federation_over_bytes_is_one_in_this_process_to_the_bit(case, tmp_path):
    make = CASES[case]
    clocked = "clock" in make()
    in_process(make, tmp_path / "here")
    over_bytes(make, tmp_path / "there")
    found, expected = (outcome(tmp_path / place, clocked) for place in ("there", "here"))
    check_equal(found, expected)
    assert SHOWN.get(case, bool)(expected["rounds"][-1])


class Discreet(InProcess):
    """Does not look at what clients keep, which a server of a real federation cannot."""

    def peek(self, task, names):
        return {}


def test_a_b_that_stays_with_the_client_is_the_one_thing_that_a_simulation_sees_and_a_server_does_not(tmp_path):
    def make():
        return {"algorithm": FedSALoRA(rank=2), "rounds": 3, "cohort": 2}

    in_process(make, tmp_path / "here")
    in_process(make, tmp_path / "discreet", Discreet())
    over_bytes(make, tmp_path / "there")
    here, discreet, there = (outcome(tmp_path / place) for place in ("here", "discreet", "there"))
    check_equal(there, discreet)
    for first, second in zip(there["rounds"], here["rounds"], strict=True):
        assert {**first, "downstream": None, "retention": None} == {**second, "downstream": None, "retention": None}
    assert there["summary"]["personalised"] == here["summary"]["personalised"]
    assert there["rounds"][-1]["downstream"] == there["rounds"][0]["downstream"]  # with B = 0 it is the base model


def test_what_needs_all_data_in_one_place_is_refused_with_words(tmp_path):
    def make():
        return {"algorithm": Centralized(FedIT(rank=2))}

    run = federated(make, tmp_path / "run", NoRows(), RemoteEngine(LoopbackChannel(), 3))
    with pytest.raises(ConfigError, match="needs clients and their data in this process") as caught:
        run.fit()
    assert [problem.key for problem in caught.value.problems] == ["algorithm"]


def test_a_cohort_larger_than_the_clients_that_came_is_refused_before_any_of_them_works(tmp_path):
    clients = [client(dict, name) for name in CLIENTS]
    channel = Tapped(clients)
    with pytest.raises(ConfigError, match=r"federation\.cohort = 4: .* from 1 to 3"):
        federated(dict, tmp_path / "run", NoRows(), RemoteEngine(channel, 3), cohort=4).fit()
    assert {type(sent.message).__name__ for sent in channel.seen} == {"Greeting", "Farewell"}


class Interrupted(FederatedCallback):
    """Ends the run once, after a round that is on disk."""

    phase = Phase.DISPLAY
    come = False

    def on_round_written(self, run):
        if run.record.round == 2 and not Interrupted.come:
            Interrupted.come = True
            raise KeyboardInterrupt


CONTINUED = {
    "B of one's own": lambda: {"algorithm": FedSALoRA(rank=2)},
    "control variates": lambda: {"objective": Scaffold(), "optimizer": sgd},
    "a gate after probes": lambda: {"algorithm": Gated(FedBE(), **WRITES), "clock": devices()},
}


@pytest.mark.parametrize("case", CONTINUED)
def test_clients_that_are_still_there_go_on_with_a_server_that_continues(case, tmp_path, monkeypatch):
    def make():
        return {**CONTINUED[case](), "rounds": 4, "cohort": 2, "callbacks": [Interrupted()]}

    monkeypatch.setattr(Interrupted, "come", True)
    in_process(make, tmp_path / "here", Discreet())
    monkeypatch.setattr(Interrupted, "come", False)
    clients = [client(make, name) for name in CLIENTS]
    with pytest.raises(KeyboardInterrupt):
        over_bytes(make, tmp_path / "there", clients)
    over_bytes(make, tmp_path / "there", clients, ckpt_path="last")
    clocked = "clock" in make()
    check_equal(*(outcome(tmp_path / place, clocked) for place in ("there", "here")))
