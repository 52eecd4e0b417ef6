"""``fedbe compare``: tune, run, and say what came of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from fedbe.comparison.config import ComparisonConfig, slug
from fedbe.comparison.execution import DialJob, Failure, Job, Start, carry_out, start_process
from fedbe.comparison.figures import figures
from fedbe.comparison.report import page
from fedbe.comparison.results import RunResult, read_run_result, read_runs, write_csv
from fedbe.comparison.summary import Comparison
from fedbe.errors import ConfigError, FedBEError
from fedbe.figures.style import save
from fedbe.storage.files import explained, replacing
from fedbe.storage.run_folder import RunFolder

_RECORD = "comparison.yaml"
_AGAIN = "the runs are intact: make room, then compare again"


def compare(
    config: ComparisonConfig, start: Start = start_process, say: Callable[[str], None] = print
) -> tuple[Comparison, list[Failure]]:
    """Choose each arm's learning rate on validation data, run it with every seed, and write what came of it.

    Where `config` has places of the dial, each finished run that counts is measured there.

    Runs that are finished are not run again; a failed one does not end the rest.

    Args:
        config: The comparison, checked.
        start: Starts a job.
        say: Tells what goes on, a line at a time.

    Raises:
        ConfigError: The output folder holds something else.
        FedBEError: No run of any arm came to its end.
    """
    _open(config)
    tuning = tuning_jobs(config)
    failures = carry_out(tuning, config.parallel, start, say)
    chosen = choose_rates(config, tuning)
    final = [_job(config, arm, rate, seed) for arm, rate in chosen.items() for seed in config.seeds]
    tried = {failure.job.folder for failure in failures}
    failures += carry_out([job for job in final if job.folder not in tried], config.parallel, start, say)
    failures += carry_out(dial_jobs(config, final), config.parallel, start, say)
    results = _results(config, chosen, [*tuning, *final])
    if not any(result.chosen for result in results):
        raise FedBEError("no run came to its end: " + "; ".join(f"{f.job}: {f.job.log}" for f in failures))
    notes = [*_notes(config, chosen), *_failure_notes(config, failures)]
    comparison = Comparison(results, config.matched_level, config.target, config.baseline, notes)
    write(comparison, config.output)
    return comparison, failures


def compare_runs(
    folders: Sequence[Path], output: Path | None, level: float | None = None, target: float | None = None
) -> Path:
    """Compare runs that exist and return the folder of what came of it.

    Args:
        folders: Folders of finished runs; those that differ only in their seed are one arm.
        output: Where to write; ``None`` for ``runs/comparison``, numbered when that is taken.
        level: Downstream validation accuracy to compare retention at; ``None`` for the highest common one.
        target: Downstream validation accuracy to time convergence to; ``None`` for the matched level.

    Raises:
        ConfigError: A folder holds no finished run, or `output` holds something.
    """
    results, differences = read_runs(folders)
    problem = RunFolder.problem(output) if output else None
    if problem:
        raise ConfigError(problem)
    notes = [f"The runs are not on one footing: {line}." for line in differences]
    output = output or RunFolder.next_free(Path("runs"), "comparison")
    write(Comparison(results, level, target, None, notes), output)
    return output


def write(comparison: Comparison, output: Path) -> None:
    """Write `comparison.csv`, `comparison.md` and `plots/`.

    Raises:
        StorageError: One of them cannot be written; the runs are intact.
    """
    plots = output / "plots"
    with explained(f"the comparison in {output}", _AGAIN):
        plots.mkdir(parents=True, exist_ok=True)
        with replacing(output / "comparison.csv") as partial:
            write_csv(comparison.results, comparison.target, partial)
        text = page(comparison)
        for name, figure in figures(comparison):
            save(figure, plots / name, _AGAIN)
            text += f"\n![{name.removesuffix('.png').replace('_', ' ')}](plots/{name})\n"
        with replacing(output / "comparison.md") as partial:
            partial.write_text(text, encoding="utf-8")


def tuning_jobs(config: ComparisonConfig) -> list[Job]:
    """Return the runs that choose learning rates; none where there is no choice."""
    return [
        _job(config, arm, rate, seed)
        for arm in config.arms
        for rate in config.rates(arm)
        for seed in config.tuning_seeds
        if len(config.rates(arm)) > 1
    ]


def dial_jobs(config: ComparisonConfig, runs: Sequence[Job]) -> list[DialJob]:
    """Return the measurements of the dial: of every finished run of an arm that has one."""
    if not config.dial:
        return []
    able = {arm for arm in {run.arm for run in runs} if config.can_be_dialled(arm)}
    return [
        DialJob(run.arm, run.learning_rate, run.seed, run.config, run.folder, tuple(config.dial))
        for run in runs
        if run.finished and run.arm in able
    ]


def choose_rates(config: ComparisonConfig, tuning: Iterable[Job]) -> dict[str, float]:
    """Return each arm's learning rate: the best mean validation accuracy at the end, the lower one of equal ones.

    A rate counts if all its runs came to their end; an arm without such a rate is left out.
    """
    scores: dict[str, dict[float, list[float | None]]] = {}
    for job in tuning:
        score = _read(job, False).tuning_accuracy if job.finished else None
        scores.setdefault(job.arm, {}).setdefault(job.learning_rate, []).append(score)
    chosen = {arm: best_rate(scores[arm]) if arm in scores else config.rates(arm)[0] for arm in config.arms}
    return {arm: rate for arm, rate in chosen.items() if rate is not None}


def best_rate(scores: Mapping[float, Sequence[float | None]]) -> float | None:
    """Return the rate of the highest mean score, the lowest of equal ones, among those whose runs all have a score."""
    means = {
        rate: sum(score for score in values if score is not None) / len(values)
        for rate, values in scores.items()
        if None not in values
    }
    return min(means, key=lambda rate: (-means[rate], rate), default=None)


def _open(config: ComparisonConfig) -> None:
    """Create the output folder, or take up one that a comparison began."""
    record = config.output / _RECORD
    if not record.is_file() and (problem := RunFolder.problem(config.output)):
        raise ConfigError(problem)
    config.output.mkdir(parents=True, exist_ok=True)
    values = asdict(config) | {"output": str(config.output)}
    record.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _job(config: ComparisonConfig, arm: str, rate: float, seed: int) -> Job:
    folder = config.output / "runs" / f"{slug(arm)}-{rate:g}-{seed}"
    return Job(arm, rate, seed, config.run_config(arm, rate, seed), folder)


def _read(job: Job, chosen: bool) -> RunResult:
    return read_run_result(job.arm, job.seed, job.learning_rate, chosen, job.folder)


def _results(config: ComparisonConfig, chosen: Mapping[str, float], jobs: Iterable[Job]) -> list[RunResult]:
    """Return the finished runs, each once, in the order of the arms."""
    finished = {job.folder: job for job in jobs if job.finished}.values()
    order = list(config.arms)
    runs = [_read(job, chosen.get(job.arm) == job.learning_rate and job.seed in config.seeds) for job in finished]
    return sorted(runs, key=lambda run: (order.index(run.arm), run.learning_rate or 0.0, run.seed))


def _notes(config: ComparisonConfig, chosen: Mapping[str, float]) -> list[str]:
    notes = [f"Arms were allowed to change {', '.join(f'`{key}`' for key in config.allow)}."] if config.allow else []
    tuned = {arm: rate for arm, rate in chosen.items() if len(config.rates(arm)) > 1}
    if tuned:
        seeds = ", ".join(map(str, config.tuning_seeds))
        notes.append(f"Learning rates were chosen on validation data with seed {seeds}, {_grids(config)}.")
    edge = [arm for arm, rate in tuned.items() if rate in (config.rates(arm)[0], config.rates(arm)[-1])]
    if edge:
        notes.append(f"The chosen learning rate is the lowest or highest that was tried for: {', '.join(edge)}.")
    return notes


def _grids(config: ComparisonConfig) -> str:
    grids = {", ".join(f"{rate:g}" for rate in config.rates(arm)) for arm in config.arms}
    return f"out of {next(iter(grids))} for every arm" if len(grids) == 1 else "as many tried for each arm"


def _failure_notes(config: ComparisonConfig, failures: Sequence[Failure]) -> list[str]:
    return [
        f"Failed with exit code {failure.code}: {failure.job}; log: `{failure.job.log.relative_to(config.output)}`."
        for failure in failures
    ]
