"""A mistake is reported under the key at which it stands in the configuration, however deep that is."""

import inspect
import re
from typing import get_args, get_type_hints

import pytest
import yaml

from fedbe import algorithms, allocation, corpora, datamodules, evaluation, expansion, objectives
from fedbe.algorithms import Algorithm
from fedbe.allocation import Allocator, Fleet, Profile, Score
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser
from fedbe.corpora import Corpus
from fedbe.data import FederatedDataModule
from fedbe.datamodules import Partitioner
from fedbe.errors import ConfigError
from fedbe.expansion import Placement, Plateau
from fedbe.objectives import Objective

PACKAGES = (algorithms, allocation, corpora, datamodules, evaluation, expansion, objectives)
NESTED = (Algorithm, Allocator, Corpus, FederatedDataModule, Fleet, Objective, Partitioner, Placement, Plateau, Profile)
NESTED += (Score,)
FURTHER = {"PooledData", "SimulatedClock"}
"""What no configuration names: `clock` is a section, and a pooled run makes its data of that of all clients."""


def of(path, **arguments):
    return {"class_path": f"fedbe.{path}", "init_args": arguments}


NOWHERE = of("corpora.FilesCorpus", train="nowhere.jsonl")
TEXT = of("corpora.TorchHeaders", max_characters=2000, libraries=["c10", "fmt", "pybind11"])
BLOCKS = of("algorithms.BlockExpansion", positions=[17])
PROFILE = {"flops_per_second": 1.0, "upload_bytes_per_second": 1.0, "download_bytes_per_second": 1.0}


def data(**changes):
    given = {"corpus": TEXT, "partitioner": of("datamodules.IIDPartitioner", clients=2), "sequence_length": 16}
    return of("datamodules.CausalLMDataModule", **given | changes)


def labelled(kind, corpus, clients=2, **arguments):
    partitioner = of("datamodules.IIDPartitioner", clients=clients)
    return {"data": of(f"datamodules.{kind}", corpus=corpus, partitioner=partitioner, **arguments)}


def task(kind, **arguments):
    return {"general_tasks": [of("evaluation.SampledTextTask"), of(f"evaluation.{kind}", **arguments)]}


def fleet(kind, **arguments):
    return {"clock": {"fleet": of(f"allocation.{kind}", **arguments)}}


def objective(kind, **arguments):
    return {"client": {"objective": of(f"objectives.{kind}", **arguments)}}


MISTAKES = {
    "CausalLMDataModule.corpus": {"data": data(corpus=NOWHERE)},
    "CausalLMDataModule.partitioner": {"data": data(partitioner=of("datamodules.IIDPartitioner", clients=0))},
    "CorpusDataModule.partitioner": {"data": data(partitioner=of("datamodules.NaturalPartitioner", column="speaker"))},
    "InstructionDataModule.corpus": labelled("InstructionDataModule", NOWHERE, max_length=64),
    "InstructionDataModule.partitioner": labelled(
        "InstructionDataModule", TEXT, 0, max_length=64, prompt_column="text", response_column="text",
    ),
    "SequenceClassificationDataModule.corpus": labelled("SequenceClassificationDataModule", NOWHERE),
    "SequenceClassificationDataModule.partitioner": labelled(
        "SequenceClassificationDataModule", TEXT, 0, label_column="library",
    ),
    "ImageClassificationDataModule.corpus": labelled("ImageClassificationDataModule", NOWHERE),
    "FlippedLabels.data": {"data": of("datamodules.FlippedLabels", data=data(sequence_length=1))},
    "FlippedLabels.data.corpus": {"data": of("datamodules.FlippedLabels", data=data(corpus=NOWHERE))},
    "Passages.corpus": task("CentroidTask", corpus=of("corpora.Passages", corpus=NOWHERE)),
    "Passages.corpus.corpus": task(
        "CentroidTask", corpus=of("corpora.Passages", corpus=of("corpora.Passages", corpus=TEXT, min_characters=0)),
    ),
    "CentroidTask.corpus": task("CentroidTask", corpus=NOWHERE),
    "ContinuationTask.corpus": task("ContinuationTask", corpus=NOWHERE),
    "MultipleChoiceTask.corpus": task("MultipleChoiceTask", corpus=NOWHERE),
    "NextTokenTask.corpus": task("NextTokenTask", corpus=NOWHERE),
    "RetrievalTask.corpus": task("RetrievalTask", corpus=NOWHERE, query_column="text", document_column="text"),
    "Anchor.corpus": objective("Anchor", corpus=NOWHERE),
    "Anchor.objective": objective("Anchor", objective=of("objectives.FedProx", mu=-1.0)),
    "Gated.corpus": {"algorithm": of("algorithms.Gated", algorithm=of("algorithms.BlockExpansion"), corpus=NOWHERE)},
    "Gated.algorithm": {"algorithm": of("algorithms.Gated", algorithm=BLOCKS)},
    "LocalOnly.algorithm": {"algorithm": of("algorithms.LocalOnly", algorithm=BLOCKS)},
    "LocalOnly.algorithm.corpus": {
        "algorithm": of(
            "algorithms.LocalOnly",
            algorithm=of("algorithms.Gated", algorithm=of("algorithms.BlockExpansion"), corpus=NOWHERE),
        ),
    },
    "Centralized.algorithm": {"algorithm": of("algorithms.Centralized", algorithm=BLOCKS), "trainer": {"max_steps": 1}},
    "FedBE.placement": {"algorithm": of("algorithms.FedBE", placement=of("expansion.FixedPlacement", positions=[17]))},
    "FedBE.score": {"algorithm": of("algorithms.FedBE", score=of("allocation.GradientScore", decay=2.0))},
    "FedBE.allocator": {"algorithm": of("algorithms.FedBE", allocator={"coverage": -1})},
    "FedBE.plateau": {"algorithm": of("algorithms.FedBE", plateau={"patience": 0})},
    "GivenFleet.profiles": fleet("GivenFleet", profiles={"0": PROFILE | {"memory_bytes": -1.0}}),
    "GivenFleet.default": fleet("GivenFleet", profiles={}, default=PROFILE | {"memory_bytes": 0.0}),
    "DeviceFleet.devices": fleet("DeviceFleet", devices={"slow": PROFILE | {"memory_bytes": 0.0}}),
    "federation.averaging": {"federation": {"averaging": of("aggregation.NormClipping", bound=-1.0)}},
    "federation.server_optimizer": {"federation": {"server_optimizer": of("aggregation.FedAdam", beta_2=2.0)}},
    "federation.quorum": {"federation": {"quorum": {"least": -1}}},
    "client.schedule": {"client": {"schedule": {"warmup_steps": -1}}},
    "engine": {"engine": of("engines.OnePass", clients=-1)},
    "callbacks": {"callbacks": [of("callbacks.KeepBest"), of("callbacks.EarlyStopping", patience=0)]},
    "prefix": {"prefix": {"gib": -1.0}},
    "model": {"model": {"name": "fedbe:micro", "task": "image-classification"}},
}  # fmt: skip


def at(config, key):
    """Return what stands at a dotted key, such as ``callbacks[0].init_args.patience``."""
    node = config
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        node = node[int(index)] if index else node[name]
    return node


def read(tmp_path, changes):
    config = {"data": data(), "logger": "none", "trainer": {"max_steps": 1, "accelerator": "cpu"}}
    config |= {"federation": {"rounds": 1}, "output": str(tmp_path / "run"), "model": {"name": "fedbe:micro"}} | changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return config, *read_run(run_parser("fit"), [f"--config={tmp_path / 'config.yaml'}"])


def without_value(problem):
    """Whether a problem is about a part as a whole: then what it is, or a split, stands for its value."""
    return problem.key.endswith((".corpus", ".partitioner")) or problem.key == "model.name"


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_deep_inside_is_reported_where_it_stands(case, tmp_path):
    config, run, _ = read(tmp_path, MISTAKES[case])
    problems = run.check()
    assert problems
    for problem in problems:
        assert at(config, problem.key) == problem.value or without_value(problem), str(problem)


def test_every_class_with_another_one_for_an_argument_is_tried():
    classes = {
        kind
        for package in PACKAGES
        for name in package.__all__
        if inspect.isclass(kind := getattr(package, name)) and kind.__module__.startswith("fedbe.")
    }
    found = {kind.__name__ for kind in classes if not inspect.isabstract(kind) and nested_arguments(kind)}
    assert found - FURTHER == {case.split(".")[0] for case in MISTAKES if case[0].isupper()} - {"CorpusDataModule"}


def nested_arguments(kind):
    hints = get_type_hints(kind.__init__) if "__init__" in vars(kind) or not issubclass(kind, Exception) else {}
    return [name for name, hint in hints.items() if any(is_nested(part) for part in leaves(hint))]


def leaves(hint):
    arguments = get_args(hint)
    return [hint] if not arguments else [leaf for argument in arguments for leaf in leaves(argument)]


def is_nested(kind):
    # A corpus is a protocol, which any class might be of; data sets that are no argument's type are not asked.
    return kind is Corpus or (inspect.isclass(kind) and issubclass(kind, tuple({*NESTED} - {Corpus})))


LATER = {
    "a task that is too long": (
        task("SampledTextTask", name="long", sequence_length=4096),
        "general_tasks[1].init_args.sequence_length",
    ),
    "a client that there is not": (
        fleet("GivenFleet", profiles={"nobody": PROFILE | {"memory_bytes": 1.0}}),
        "clock.fleet.init_args.profiles.nobody",
    ),
    "a client whose labels cannot be flipped": (
        {"data": of("datamodules.FlippedLabels", data=data(), clients=["nobody"])},
        "data.init_args.clients",
    ),
    "a draw that leaves a client without rows": (
        {
            "data": of(
                "datamodules.FlippedLabels",
                data=data(
                    corpus=of("corpora.TorchHeaders", max_characters=60000, libraries=["c10", "fmt", "pybind11"]),
                    partitioner=of("datamodules.DirichletPartitioner", clients=9, alpha=1e-3, column="library"),
                ),
            ),
        },
        "data.init_args.data.init_args.partitioner.init_args.alpha",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_what_only_the_model_or_the_data_shows_is_reported_where_it_stands(case, tmp_path):
    changes, key = LATER[case]
    config, run, resolved = read(tmp_path, changes)
    assert run.check() == []
    with pytest.raises(ConfigError) as refused:
        build(run, resolved).run()
    assert refused.value.problems[0].key == key
    at(config, key)
