"""What goes with what: by the traits of the parts, as the rules before them refused it."""

from importlib import import_module
from itertools import product

import pytest

from fedbe import algorithms
from fedbe.aggregation import (
    Averaging,
    CoordinateMedian,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    Krum,
    Mean,
    NormClipping,
    PrivateMean,
    SampleWeighted,
    ServerOptimizer,
    TrimmedMean,
)
from fedbe.algorithms import (
    Algorithm,
    BlockExpansion,
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
from fedbe.allocation import LabelDivergenceScore, RandomScore, StaticScore
from fedbe.callbacks import CheckpointCallback, EarlyStopping, FaultInjection, KeepBest, RollbackGuard
from fedbe.config.rules import INSTEAD, SENTENCES, conflicts
from fedbe.engines import Forked, InProcess, OnePass
from fedbe.expansion import FixedPlacement, Plateau, RandomPlacement
from fedbe.objectives import Anchor, FedProx, Objective, Plain, Scaffold
from fedbe.traits import ALL, Part, Trait

OBJECTIVES = {
    "Plain": Plain(),
    "FedProx": FedProx(),
    "Scaffold": Scaffold(),
    "Anchor": Anchor(),
    "Anchor of FedProx": Anchor(objective=FedProx()),
    "Anchor of Scaffold": Anchor(objective=Scaffold()),
}
AVERAGING = {
    "SampleWeighted": SampleWeighted(),
    "NormClipping": NormClipping(1.0),
    "CoordinateMedian": CoordinateMedian(),
    "TrimmedMean": TrimmedMean(),
    "Krum": Krum(),
    "PrivateMean": PrivateMean(1.0),
}
OPTIMIZERS = {
    "Mean": Mean(),
    "FedAvgM": FedAvgM(),
    "FedAdagrad": FedAdagrad(),
    "FedAdam": FedAdam(),
    "FedYogi": FedYogi(),
}
ENGINES = {"InProcess": InProcess(), "Forked": Forked(2), "OnePass": OnePass(4), "OnePass auto": OnePass("auto")}

GLOBAL = {"FedProx", "Scaffold", "Anchor of FedProx", "Anchor of Scaffold"}
LASTING = {"Scaffold", "Anchor of Scaffold"}
RULES = AVERAGING.keys() - {"SampleWeighted"}
MOMENTS = OPTIMIZERS.keys() - {"Mean"}
PRIVATE, ONE_PASS, NOTHING = {"PrivateMean"}, {"OnePass"}, set()

# What the rules refused before there were traits, computed on every combination of the parts here: algorithm →
# objectives, rules of averaging, server optimizers, engines. No combination was refused that none of these refuses.
BEFORE = {
    "BlockExpansion": (BlockExpansion(2), NOTHING, NOTHING, NOTHING, NOTHING),
    "Unfreeze": (Unfreeze(2), NOTHING, NOTHING, NOTHING, NOTHING),
    "FedAvg": (FedAvg(), NOTHING, NOTHING, NOTHING, NOTHING),
    "FedBE": (FedBE(), NOTHING, PRIVATE, NOTHING, NOTHING),
    "FedBE, placed": (FedBE(placement=FixedPlacement(2)), NOTHING, PRIVATE, NOTHING, NOTHING),
    "FedBE, at random": (FedBE(score=RandomScore()), NOTHING, PRIVATE, NOTHING, NOTHING),
    "FedBE, blind": (FedBE(placement=FixedPlacement(2), score=StaticScore()), NOTHING, NOTHING, NOTHING, NOTHING),
    "FedBE, by labels": (
        FedBE(placement=FixedPlacement(2), score=LabelDivergenceScore()), NOTHING, PRIVATE, NOTHING, NOTHING,
    ),
    "FedBE, growing": (FedBE(plateau=Plateau()), NOTHING, PRIVATE, NOTHING, NOTHING),
    "Gated": (Gated(BlockExpansion(2)), NOTHING, NOTHING, NOTHING, NOTHING),
    "Gated of FedBE": (Gated(FedBE()), NOTHING, PRIVATE, NOTHING, NOTHING),
    "Gated of FedBE, blind": (
        Gated(FedBE(placement=RandomPlacement(2), score=RandomScore())), NOTHING, NOTHING, NOTHING, NOTHING,
    ),
    "Gated of FedBE, growing": (Gated(FedBE(plateau=Plateau())), NOTHING, PRIVATE, NOTHING, NOTHING),
    "Gated of FedIT": (Gated(FedIT(first_block=1)), NOTHING, NOTHING, NOTHING, NOTHING),
    "Gated of HetLoRA": (Gated(HetLoRA(ranks=[2, 4], first_block=1)), NOTHING, RULES, NOTHING, ONE_PASS),
    "Gated of FlexLoRA": (Gated(FlexLoRA(first_block=1)), NOTHING, RULES, NOTHING, NOTHING),
    "FedIT": (FedIT(), NOTHING, NOTHING, NOTHING, NOTHING),
    "FFALoRA": (FFALoRA(), NOTHING, NOTHING, NOTHING, NOTHING),
    "FLoRA": (FLoRA(), LASTING, RULES, MOMENTS, ONE_PASS),
    "FLoRA of ranks": (FLoRA(ranks=[2, 4]), LASTING, RULES, MOMENTS, ONE_PASS),
    "FlexLoRA": (FlexLoRA(), NOTHING, RULES, NOTHING, NOTHING),
    "FlexLoRA of ranks": (FlexLoRA(ranks=[2, 4]), NOTHING, RULES, NOTHING, ONE_PASS),
    "HetLoRA": (HetLoRA(), NOTHING, RULES, NOTHING, ONE_PASS),
    "HetLoRA of ranks": (HetLoRA(ranks=[2, 4]), NOTHING, RULES, NOTHING, ONE_PASS),
    "FedSALoRA": (FedSALoRA(), GLOBAL, RULES, NOTHING, ONE_PASS),
    "FedExLoRA": (FedExLoRA(), NOTHING, RULES, NOTHING, ONE_PASS),
    "FedTaLoRA": (FedTaLoRA(), NOTHING, RULES, NOTHING, ONE_PASS),
    "SLoRA": (SLoRA(), NOTHING, RULES, NOTHING, ONE_PASS),
    "LocalOnly of FedAvg": (LocalOnly(FedAvg()), GLOBAL, RULES, MOMENTS, ONE_PASS),
    "LocalOnly of FedBE": (LocalOnly(FedBE()), GLOBAL, RULES, MOMENTS, ONE_PASS),
    "LocalOnly of FedIT": (LocalOnly(FedIT()), GLOBAL, RULES, MOMENTS, ONE_PASS),
    "LocalOnly of FlexLoRA": (LocalOnly(FlexLoRA()), GLOBAL, RULES, MOMENTS, ONE_PASS),
    "LocalOnly of Gated": (LocalOnly(Gated(BlockExpansion(2))), GLOBAL, RULES, MOMENTS, ONE_PASS),
    "Centralized of FedAvg": (Centralized(FedAvg()), NOTHING, NOTHING, NOTHING, ONE_PASS),
    "Centralized of FedBE": (Centralized(FedBE()), NOTHING, PRIVATE, NOTHING, ONE_PASS),
    "Centralized of growing FedBE": (Centralized(FedBE(plateau=Plateau())), NOTHING, PRIVATE, NOTHING, ONE_PASS),
    "Centralized of FedSALoRA": (Centralized(FedSALoRA()), GLOBAL, RULES, NOTHING, ONE_PASS),
    "Centralized of FLoRA": (Centralized(FLoRA()), LASTING, RULES, MOMENTS, ONE_PASS),
    "Centralized of Gated": (Centralized(Gated(BlockExpansion(2))), NOTHING, NOTHING, NOTHING, ONE_PASS),
}  # fmt: skip
GROWING = {"FedBE, growing", "Gated of FedBE, growing", "Centralized of growing FedBE"}
BASES = {"Algorithm", "LoRA"}


def refused_before(algorithm, objective, averaging, optimizer, engine):
    _, objectives, rules, optimizers, engines = BEFORE[algorithm]
    return (
        objective in objectives
        or averaging in rules
        or optimizer in optimizers
        or engine in engines
        or (averaging == "PrivateMean" and objective in LASTING)
        or (engine == "OnePass" and objective != "Plain")
    )


def test_each_combination_is_refused_where_it_was_and_nowhere_else():
    differences, refused = [], 0
    for names in product(BEFORE, OBJECTIVES, AVERAGING, OPTIMIZERS, ENGINES):
        algorithm, objective, averaging, optimizer, engine = names
        problems = conflicts({
            "algorithm": BEFORE[algorithm][0],
            "client.objective": OBJECTIVES[objective],
            "federation.averaging": AVERAGING[averaging],
            "federation.server_optimizer": OPTIMIZERS[optimizer],
            "engine": ENGINES[engine],
        })  # fmt: skip
        differences += [names] if bool(problems) != refused_before(*names) else []
        refused += bool(problems)
    assert not differences
    assert refused == 17029  # of 28,080


@pytest.mark.parametrize(
    "callback",
    [KeepBest(), EarlyStopping(), RollbackGuard(), CheckpointCallback(each_client=True), FaultInjection("nan", 0.1)],
    ids=lambda callback: type(callback).__name__,
)
def test_only_what_keeps_the_best_round_does_not_go_with_a_model_that_grows(callback):
    refused = {name for name, row in BEFORE.items() if conflicts({"algorithm": row[0], "callbacks[0]": callback})}
    assert refused == (GROWING if isinstance(callback, KeepBest) else set())


def test_every_algorithm_is_in_the_table():
    classes = {name for name in algorithms.__all__ if isinstance(getattr(algorithms, name), type)}
    shipped = {name for name in classes - BASES if issubclass(getattr(algorithms, name), Algorithm)}
    assert shipped == {type(row[0]).__name__ for row in BEFORE.values()}


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"algorithm": FLoRA(), "client.objective": Scaffold()}, ("client.objective", "Scaffold", "objectives.Plain")),
        (
            {"algorithm": LocalOnly(FedAvg()), "client.objective": FedProx()},
            ("client.objective", "FedProx", "with LocalOnly clients have models of their own: give fedbe.objectives"),
        ),
        (
            {"algorithm": FLoRA(), "federation.server_optimizer": FedAdam()},
            ("federation.server_optimizer", "FedAdam", "give fedbe.aggregation.Mean"),
        ),
        (
            {"algorithm": Gated(FLoRA(rank=2)), "federation.averaging": CoordinateMedian()},
            ("algorithm", "Gated", "rule of its own"),
        ),
        (
            {"algorithm": LocalOnly(BlockExpansion([0])), "federation.averaging": CoordinateMedian()},
            ("federation.averaging", "CoordinateMedian", "give fedbe.aggregation.SampleWeighted"),
        ),
        ({"algorithm": FedBE(), "federation.averaging": PrivateMean(1.0)}, ("algorithm", "FedBE", "FixedPlacement")),
        (
            {"algorithm": FedBE(placement=FixedPlacement([0])), "federation.averaging": PrivateMean(1.0)},
            ("algorithm", "FedBE", "RandomScore"),
        ),
        (
            {"client.objective": Scaffold(), "federation.averaging": PrivateMean(1.0)},
            ("client.objective", "Scaffold", "PrivateMean does not cover: give fedbe.objectives.Plain"),
        ),
        (
            {"client.objective": FedProx(), "engine": OnePass(2)},
            ("client.objective", "FedProx", "or give engine: fedbe.engines.InProcess"),
        ),
        ({"algorithm": HetLoRA(), "engine": OnePass(2)}, ("engine", "OnePass", "a client of HetLoRA needs the model")),
        (
            {"algorithm": FedBE(plateau=Plateau()), "callbacks[3]": KeepBest()},
            ("callbacks[3]", "KeepBest", "a model that grows cannot"),
        ),
    ],
)
def test_the_part_that_needs_something_is_named_with_what_to_give_instead(parts, problem):
    (found,) = conflicts(parts)
    key, value, remedy = problem
    assert (found.key, found.value) == (key, value) and remedy in found.remedy


def test_every_trait_has_a_sentence_and_what_is_given_instead_goes_with_everything():
    assert set(SENTENCES) == set(Trait)
    for path in INSTEAD.values():
        module, _, name = path.rpartition(".")
        part = getattr(import_module(module), name)()
        assert part.needs == frozenset() and part.offers == ALL


class Needy(Part):
    """Needs all there is."""

    needs = ALL


@pytest.mark.parametrize("trait", Trait)
def test_what_one_part_does_not_offer_is_refused_to_the_part_that_needs_it(trait):
    class Spoiler(Part):
        offers = ALL - {trait}

    (problem,) = conflicts({"algorithm": Needy(), "engine": Spoiler()})
    assert (problem.key, problem.value) == ("algorithm", "Needy") and "{" not in problem.remedy
    assert conflicts({"algorithm": Spoiler(), "engine": Spoiler()}) == []


def test_a_rule_an_optimizer_and_an_objective_of_one_s_own_say_what_those_shipped_say():
    class Rule(Averaging):
        pass

    class Optimizer(ServerOptimizer):
        pass

    class Own(Objective):
        pass

    assert conflicts({"algorithm": FLoRA(), "federation.averaging": Rule()})
    assert conflicts({"algorithm": FLoRA(), "federation.server_optimizer": Optimizer()})
    assert conflicts({"client.objective": Own(), "engine": OnePass(2)})
