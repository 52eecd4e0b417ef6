"""What is recorded: a name for each case, and the words of the command line that say what it runs.

Every name in them is one that a user may write: keys and class paths of configurations. STAND_INS is the folder of tiny
models, text, and shipped configurations that load them.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS = sorted(path.stem for path in (HERE.parent.parent / "configs" / "algorithms").glob("*.yaml"))

ENGINES: dict[str, dict[str, Any]] = {
    "in_process": {},
    "workers": {"engine": {"class_path": "fedbe.engines.Forked", "init_args": {"workers": 2}}},
    "one_pass": {"engine": {"class_path": "fedbe.engines.OnePass", "init_args": {"clients": 3}}},
}
"""The settings that choose where clients train."""

ALLOWED: dict[str, dict[str, str]] = {
    "mishap/rounds_that_are_taken_back": {
        "rounds/3/downstream/loss": "a round that is taken back has the score of the state that is kept",
        "rounds/3/rolled_back": "and says what the discarded model scored",
    },
}
"""Case → path of a value that may differ from what was recorded (``summary/downstream/loss``) → why."""

ROUGH: dict[str, str] = {
    "training/full_fine_tuning_of_a_classifier": "Adam divides gradients that are rounding errors by their own size",
    "training/bfloat16": "a rounding error is as large as a step",
    "training/mixed_precision": "a rounding error is as large as a step",
}
"""Case → why its tensors are not compared on other machines than the one that recorded them."""


def of(path: str, /, **arguments: Any) -> dict[str, Any]:
    """A class of fedbe with its arguments."""
    return {"class_path": f"fedbe.{path}", "init_args": arguments}


def words(*configs: str, **settings: Any) -> list[str]:
    """The command line of these configurations, and of settings over them: `__` for the dots of a key."""
    values = {key.replace("__", "."): value for key, value in settings.items()}
    options = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    return [*(f"--config={config}" for config in configs), *options]


def toy(*configs: str, engine: str = "in_process", **settings: Any) -> list[str]:
    """The toy federation with other settings."""
    chosen = {"model__name": "STAND_INS/llama", **ENGINES[engine], **settings}
    chosen["callbacks"] = [*settings.get("callbacks", []), {"class_path": "golden.data.NoPlots"}]
    return words(f"{HERE / 'toy.yaml'}", *configs, **chosen)


def classifier(**settings: Any) -> list[str]:
    """The toy federation with an encoder, and a new head for three classes."""
    model = {
        "model__name": "STAND_INS/encoder",
        "model__task": "sequence-classification",
        "data__init_args__classes": 3,
    }
    return toy(**model | settings)


def shipped(name: str, **settings: Any) -> list[str]:
    """A shipped configuration on a stand-in."""
    short = {"federation__rounds": 2, "federation__cohort": 3, "trainer__max_steps": 2}
    return words(f"STAND_INS/{name}.yaml", **short | settings)


def method(name: str, **settings: Any) -> list[str]:
    """A shipped algorithm over the toy federation."""
    return toy(f"{HERE.parent.parent / 'configs' / 'algorithms' / name}.yaml", **settings)


ROWS = of("corpora.SavedCorpus", path="STAND_INS/rows")
NEXT_TOKEN = of("evaluation.NextTokenTask", name="numbers", corpus=ROWS, sequence_length=16, max_sequences=8)
SHORT = {
    "data__init_args__sequence_length": 16,
    "data__init_args__max_validation_sequences": 8,
    "data__init_args__max_test_sequences": 8,
}
WRITES = {"sequences": 6, "sequence_length": 8}
BLOCKS = of("algorithms.BlockExpansion", positions=[1, 3])
HIGH_BLOCK = of("algorithms.BlockExpansion", positions=[3])
ADAPTERS = of("algorithms.FedIT", rank=4, alpha=8.0, dropout=0.0)
HIGH_ADAPTERS = of("algorithms.FedIT", rank=4, alpha=8.0, dropout=0.0, first_block=1)
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}}
ROUND = 0.345
STALLED = {"patience": 1, "min_gain": 1.0}


def fedbe(positions: Any = (0, 1, 3), **arguments: Any) -> dict[str, Any]:
    given = {"placement": of("expansion.FixedPlacement", positions=list(positions))} if positions else {}
    return of("algorithms.FedBE", **given, **arguments)


def profile(flops: float, memory: float = 1e9, **other: float) -> dict[str, float]:
    transfer = {"upload_bytes_per_second": 1e6, "download_bytes_per_second": 1e6}
    return {"memory_bytes": memory, "flops_per_second": flops, **transfer, **other}


def clock(**settings: Any) -> dict[str, Any]:
    """Devices that differ: with `ROUND` the slowest can train some of the blocks, which depends on their scores."""
    devices = {"client-0": profile(4e8), "client-1": profile(2e8), "client-2": profile(1.05e8)}
    return {"fleet": of("allocation.GivenFleet", profiles=devices, default=profile(1e8)), **settings}


def fault(kind: str, **arguments: Any) -> dict[str, Any]:
    return of("callbacks.FaultInjection", kind=kind, **arguments)


ATTACK = fault("sign_flip", clients=["client-2"], factor=3.0)
ALGORITHMS = {
    **{name: method(name) for name in METHODS},
    "gated": method("gated", **{f"algorithm__init_args__{key}": value for key, value in WRITES.items()}),
    "slora": method("slora", algorithm__init_args__sparse_rounds=1, algorithm__init_args__density=0.1),
}
CONFIGURATIONS = {
    "quickstart": shipped(
        "quickstart",
        data__init_args__corpus=ROWS,
        general_tasks=[
            NEXT_TOKEN,
            of(
                "evaluation.ContinuationTask",
                name="continuation",
                corpus=ROWS,
                choices=2,
                context_tokens=16,
                continuation_tokens=8,
            ),
        ],
        **SHORT,
        **{f"algorithm__init_args__{key}": value for key, value in WRITES.items()},
    ),
    "shakespeare": shipped("shakespeare", **SHORT),
    "clinc150": shipped("clinc150"),
    "classification": shipped("classification"),
    "instruction_qwen": shipped("instruction_qwen", federation__cohort=2),
    "llama_1b": shipped("llama_1b", trainer__max_steps=1, federation__cohort=2, **SHORT),
    "vit": shipped("vit"),
}
PRIVATE = of("aggregation.PrivateMean", bound=0.5, noise_multiplier=0.05, reproducible=True)
AVERAGING = {
    "sample_weighted": toy(federation__averaging=of("aggregation.SampleWeighted"), callbacks=[ATTACK]),
    "norm_clipping": toy(federation__averaging=of("aggregation.NormClipping", bound=0.3), callbacks=[ATTACK]),
    "coordinate_median": toy(federation__averaging=of("aggregation.CoordinateMedian"), callbacks=[ATTACK]),
    "trimmed_mean": toy(
        federation__averaging=of("aggregation.TrimmedMean", share=0.2), data__init_args__clients=5, callbacks=[ATTACK]
    ),
    "krum": toy(federation__averaging=of("aggregation.Krum", malicious=1), callbacks=[ATTACK]),
    "multi_krum": toy(federation__averaging=of("aggregation.Krum", malicious=1, take=2), callbacks=[ATTACK]),
    "private_mean": toy(federation__averaging=PRIVATE),
    "median_of_adapters": toy(federation__averaging=of("aggregation.CoordinateMedian"), algorithm=ADAPTERS),
}
SERVER = {
    "mean": toy(federation__server_optimizer=of("aggregation.Mean"), federation__rounds=3),
    "fedavgm": toy(federation__server_optimizer=of("aggregation.FedAvgM", momentum=0.5), federation__rounds=3),
    "fedadagrad": toy(
        federation__server_optimizer=of("aggregation.FedAdagrad", learning_rate=0.01), federation__rounds=3
    ),
    "fedadam": toy(federation__server_optimizer=of("aggregation.FedAdam", learning_rate=0.01), federation__rounds=3),
    "fedyogi": toy(federation__server_optimizer=of("aggregation.FedYogi", learning_rate=0.01), federation__rounds=3),
    "fedadam_of_adapters": toy(
        federation__server_optimizer=of("aggregation.FedAdam", learning_rate=0.01),
        algorithm=ADAPTERS,
        federation__rounds=3,
    ),
}
OBJECTIVES = {
    "plain": toy(client__objective=of("objectives.Plain")),
    "fedprox": toy(client__objective=of("objectives.FedProx", mu=0.5)),
    "scaffold": toy(
        client__objective=of("objectives.Scaffold"), client__optimizer=SGD, federation__rounds=3, federation__cohort=3
    ),
    "anchor": toy(client__objective=of("objectives.Anchor", **WRITES)),
    "anchor_on_text_around_fedprox": toy(
        client__objective=of(
            "objectives.Anchor",
            corpus=ROWS,
            top=16,
            temperature=2.0,
            share=0.25,
            objective=of("objectives.FedProx", mu=0.5),
            **WRITES,
        ),
        algorithm=of("algorithms.FedAvg"),
    ),
    "anchor_of_a_classifier": classifier(client__objective=of("objectives.Anchor", corpus=ROWS, **WRITES)),
}
GATES = {
    "gated_blocks_hard": toy(
        algorithm=of("algorithms.Gated", algorithm=BLOCKS, mode="hard", openness=0.7, block=1, **WRITES)
    ),
    "gated_blocks_shut_on_a_corpus": toy(algorithm=of("algorithms.Gated", algorithm=BLOCKS, corpus=ROWS, **WRITES)),
    "gated_fedit": toy(algorithm=of("algorithms.Gated", algorithm=HIGH_ADAPTERS, **WRITES)),
    "gated_fedbe_with_a_clock": toy(
        algorithm=of("algorithms.Gated", algorithm=fedbe(), **WRITES), clock=clock(), general_tasks=[NEXT_TOKEN]
    ),
    "gated_classifier": classifier(algorithm=of("algorithms.Gated", algorithm=BLOCKS, corpus=ROWS, **WRITES)),
}
FEDBE = {
    "fedbe_by_gradients": toy(
        algorithm=fedbe(
            None, placement=of("expansion.AdaptivePlacement", min_blocks=3, max_blocks=3), round_seconds=ROUND
        ),
        clock=clock(),
        federation__rounds=3,
    ),
    "fedbe_at_random": toy(
        algorithm=fedbe(
            None,
            placement=of("expansion.RandomPlacement", blocks=3),
            score=of("allocation.RandomScore"),
            round_seconds=ROUND,
        ),
        clock=clock(),
        federation__averaging=of("aggregation.TrimmedMean", share=0.25),
    ),
    "fedbe_by_losses": toy(
        algorithm=fedbe(score=of("allocation.LossScore", decay=0.3), allocator={"coverage": 2}, round_seconds=ROUND),
        clock=clock(),
        federation__rounds=3,
    ),
    "fedbe_static_with_private_mean": toy(
        algorithm=fedbe(score=of("allocation.StaticScore", values=[1.0, 3.0, 2.0]), round_seconds=ROUND),
        clock=clock(),
        federation__averaging=PRIVATE,
    ),
    "fedbe_by_labels": classifier(
        algorithm=fedbe(score=of("allocation.LabelDivergenceScore", strength=0.8)), clock=clock()
    ),
    "fedbe_with_rounds_that_become_longer": toy(
        algorithm=fedbe(round_seconds=0.12, round_growth=2.0, allocator={"coverage": 0}),
        clock=clock(),
        federation__rounds=3,
    ),
    "fedbe_grows": toy(
        algorithm=fedbe(
            None, placement=of("expansion.AdaptivePlacement", max_blocks=2), plateau=STALLED, probe_clients=2
        ),
        federation__rounds=4,
    ),
    "fedbe_grows_with_a_clock_and_moments": toy(
        algorithm=fedbe(None, placement=of("expansion.RandomPlacement", blocks=2), plateau=STALLED),
        clock=clock(),
        federation__rounds=4,
        federation__server_optimizer=of("aggregation.FedAdam", learning_rate=0.01),
    ),
    "fedbe_grows_with_control_variates": toy(
        algorithm=fedbe(None, placement=of("expansion.AdaptivePlacement", max_blocks=1), plateau=STALLED),
        client__objective=of("objectives.Scaffold"),
        client__optimizer=SGD,
        federation__rounds=3,
    ),
}
CLOCKS = {
    "late_clients_are_dropped": toy(clock=clock(late="drop", deadline_seconds=0.25)),
    "late_clients_do_a_part": toy(clock=clock(late="partial", deadline_seconds=0.25), algorithm=ADAPTERS),
    "a_fleet_that_changes": toy(
        algorithm=fedbe(),
        clock={"fleet": of("allocation.DeviceFleet", shares="mixed", scale=2e-4, memory_scale=1.0, jitter=0.5)},
        data__init_args__clients=6,
        federation__cohort=4,
    ),
    "clients_that_are_not_always_there": toy(
        clock={"fleet": of("allocation.GivenFleet", profiles={}, default=profile(1e8, availability=0.6))},
        federation__rounds=3,
    ),
    "clients_that_lack_memory": toy(
        algorithm=fedbe(),
        clock={
            "fleet": of(
                "allocation.GivenFleet",
                profiles={"client-1": profile(1e8, memory=1e3), "client-2": profile(1e8, memory=3.2e5)},
                default=profile(1e8),
            )
        },
    ),
}
RANKS = {
    "hetlora_that_prunes": toy(
        algorithm=of("algorithms.HetLoRA", rank=4, ranks={"client-1": 2, "client-3": 6}, decay=0.5, penalty=1.0),
        federation__rounds=3,
    ),
    "flora_of_mixed_ranks": toy(algorithm=of("algorithms.FLoRA", rank=4, ranks={"client-1": 2, "client-3": 6})),
    "flexlora_of_mixed_ranks": toy(algorithm=of("algorithms.FlexLoRA", rank=4, ranks=[2, 3, 5])),
    "fedit_as_an_adapter": toy(algorithm=of("algorithms.FedIT", rank=4, target_modules="attention", export="adapter")),
    "fedit_of_a_classifier": classifier(algorithm=ADAPTERS),
    "slora_sparse_to_the_end": toy(algorithm=of("algorithms.SLoRA", rank=4, sparse_rounds=2, density=0.2)),
    "fedex_lora_of_a_partial_cohort": toy(
        algorithm=of("algorithms.FedExLoRA", rank=4), federation__cohort=2, federation__rounds=3
    ),
}
CONTROLS = {
    "local_only_blocks": toy(algorithm=of("algorithms.LocalOnly", algorithm=BLOCKS), federation__cohort=3),
    "local_only_adapters": toy(algorithm=of("algorithms.LocalOnly", algorithm=ADAPTERS)),
    "centralized_blocks": toy(algorithm=of("algorithms.Centralized", algorithm=BLOCKS), federation__cohort=2),
    "centralized_adapters": toy(algorithm=of("algorithms.Centralized", algorithm=ADAPTERS)),
    "fedsa_lora_of_a_classifier": classifier(
        algorithm=of("algorithms.FedSALoRA", rank=4), federation__cohort=2, federation__rounds=3
    ),
}
TRAINED: dict[str, dict[str, Any]] = {
    "blocks": {"algorithm": BLOCKS},
    "adapters": {"algorithm": ADAPTERS},
    "gated_fedbe": {"algorithm": of("algorithms.Gated", algorithm=fedbe(), **WRITES), "clock": clock()},
    "high_block_on_a_prefix": {"algorithm": HIGH_BLOCK, "prefix": {"gib": 0.01}},
}
SIDE_BY_SIDE = {
    **{f"{engine}_{name}": toy(engine=engine, **given) for engine in ENGINES for name, given in TRAINED.items()},
    **{f"{engine}_classifier": classifier(engine=engine) for engine in ENGINES},
    "workers_fedprox": toy(engine="workers", client__objective=of("objectives.FedProx", mu=0.5)),
    "workers_full": toy(engine="workers", algorithm=of("algorithms.FedAvg")),
    "workers_personalised": toy(engine="workers", algorithm=of("algorithms.FedSALoRA", rank=4)),
    "workers_scaffold": toy(engine="workers", client__objective=of("objectives.Scaffold"), client__optimizer=SGD),
    "workers_grow": toy(
        engine="workers",
        algorithm=fedbe(None, placement=of("expansion.RandomPlacement", blocks=1), plateau=STALLED),
        federation__rounds=3,
    ),
    "one_pass_unequal_steps": toy(engine="one_pass", trainer__max_steps=-1, trainer__max_epochs=2),
    "one_pass_grows": toy(
        engine="one_pass",
        algorithm=fedbe(None, placement=of("expansion.RandomPlacement", blocks=1), plateau=STALLED),
        federation__rounds=3,
    ),
}
TRAINING = {
    "prefix_on_disk_with_general_tasks": toy(
        algorithm=HIGH_BLOCK, prefix={"gib": 0.01, "on_disk": True}, general_tasks=[NEXT_TOKEN]
    ),
    "cosine_over_the_run": toy(client__schedule={"name": "cosine", "warmup_steps": 2, "span": "run"}),
    "linear_with_warmup": toy(client__schedule={"name": "linear", "warmup_steps": 1, "span": "round"}),
    "dropout_in_the_model": toy(model__name="STAND_INS/dropout", algorithm=of("algorithms.FedAvg")),
    "dropout_in_blocks_beside_workers": toy(engine="workers", model__name="STAND_INS/dropout"),
    "dropout_in_an_encoder": classifier(model__name="STAND_INS/bert"),
    "dropout_in_adapters": toy(algorithm=of("algorithms.FedIT", rank=4, dropout=0.2)),
    "part_of_the_clients": toy(data__init_args__clients=6, federation__cohort=0.5, federation__rounds=3),
    "evaluated_every_other_round": toy(federation__evaluate_every_n_rounds=2, federation__rounds=3),
    "gradient_checkpointing": toy(model__gradient_checkpointing=True),
    "bfloat16": toy(model__dtype="bfloat16", trainer__precision="bf16-true"),
    "mixed_precision": toy(trainer__precision="bf16-mixed"),
    "clipped_and_accumulated": toy(trainer__gradient_clip_val=0.05, trainer__accumulate_grad_batches=2),
    "whole_epochs": toy(trainer__max_steps=-1, trainer__max_epochs=2),
    "positions_by_number": toy(algorithm=of("algorithms.BlockExpansion", positions=2), seed=8),
    "unfrozen_blocks": toy(algorithm=of("algorithms.Unfreeze", blocks=[1, 2])),
    "full_fine_tuning_of_a_classifier": classifier(algorithm=of("algorithms.FedAvg")),
    "flipped_labels": toy(
        data={
            "class_path": "fedbe.datamodules.FlippedLabels",
            "init_args": {"data": {"class_path": "golden.data.CountingData"}, "clients": ["client-1"]},
        }
    ),
    "general_tasks": toy(
        general_tasks=[NEXT_TOKEN, of("evaluation.SampledTextTask", name="own_text", **WRITES)],
        callbacks=[of("callbacks.RetentionCallback", every_n_rounds=2)],
        federation__rounds=3,
    ),
}
MISHAPS = {
    "clients_that_fail": toy(
        data__init_args__clients=6,
        federation__cohort=3,
        federation__quorum={"least": 1.0, "below": "replace"},
        callbacks=[fault("error", clients=["client-1", "client-4"])],
        federation__rounds=3,
    ),
    "updates_that_are_refused": toy(
        callbacks=[fault("nan", clients=["client-0"], rounds=[1]), fault("shape", probability=0.4)]
    ),
    "rounds_that_are_taken_back": toy(
        callbacks=[
            fault("sign_flip", rounds=[3], factor=40.0),
            of("callbacks.RollbackGuard", loss_rise=0.02, norm_ratio=None),
        ],
        federation__server_optimizer=of("aggregation.FedAvgM", momentum=0.1),
        federation__rounds=4,
    ),
    "the_best_round_is_kept": toy(
        callbacks=[
            of("callbacks.KeepBest", monitor="downstream/loss", mode="min"),
            fault("sign_flip", rounds=[3], factor=40.0),
        ],
        federation__rounds=3,
    ),
    "stopped_early": toy(
        callbacks=[of("callbacks.EarlyStopping", monitor="downstream/loss", mode="min", patience=1, min_delta=5.0)],
        federation__rounds=4,
    ),
}
GROUPS = {
    "algorithm": ALGORITHMS,
    "configuration": CONFIGURATIONS,
    "averaging": AVERAGING,
    "server": SERVER,
    "objective": OBJECTIVES,
    "gate": GATES,
    "fedbe": FEDBE,
    "clock": CLOCKS,
    "ranks": RANKS,
    "control": CONTROLS,
    "engine": SIDE_BY_SIDE,
    "training": TRAINING,
    "mishap": MISHAPS,
}
CASES = {f"{group}/{name}": case for group, cases in GROUPS.items() for name, case in cases.items()}
