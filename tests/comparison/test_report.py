import csv

import pytest
from comparison.runs import dial, result, write_run
from full_disk import no_room

from fedbe.cli.main import main
from fedbe.comparison.compare import best_rate, write
from fedbe.comparison.figures import looks, pareto_figure
from fedbe.comparison.report import page
from fedbe.comparison.results import arm_labels, read_runs
from fedbe.comparison.statistics import Estimate
from fedbe.comparison.summary import Comparison
from fedbe.errors import ConfigError, StorageError


def two_arms(**options):
    keeps = [result("keeps", seed, (0.1, 0.2, 0.3), (1.0, 0.9, 0.8 + seed / 100)) for seed in (0, 1)]
    quick = [result("quick", seed, (0.1, 0.4, 0.4), (1.0, 0.4, 0.2), seconds=0.5) for seed in (0, 1)]
    return Comparison([*quick, *keeps, result("keeps", 7, (0.1, 0.1, 0.9), chosen=False)], **options)


def test_retention_is_compared_where_all_have_learned_the_same():
    comparison = two_arms()
    assert comparison.level == 0.3
    quick, keeps = comparison.arms
    assert quick.retention_at(0.3) == Estimate(pytest.approx(0.6), pytest.approx(0.0), 2)
    assert keeps.retention_at(0.3) == Estimate(pytest.approx(0.805), pytest.approx(0.005), 2)
    text = page(comparison)
    assert "**0.3000**" in text and text.index("| keeps") < text.index("| quick")
    assert "80.5 ± 0.5 %" in text and "0.300 ± 0.000" in text


def dialled(arm, seed, *triples):
    return result(arm, seed, dial=dial(*triples))


def test_along_the_dial_retention_is_that_of_the_final_model_where_it_gives_the_matched_score():
    first = dialled("a", 0, (0, 0.1, 1.0), (0.5, 0.2, 0.9), (1, 0.3, 0.5))
    second = dialled("a", 1, (0, 0.1, 1.0), (0.25, 0.1, 1.0), (0.5, 0.3, 0.7), (1, 0.3, 0.5))
    low = dialled("low", 0, (0, 0.1, 1.0), (1, 0.2, 0.6))
    comparison = Comparison([first, second, low, result("none")], given_level=0.25)
    a, lower, none = comparison.arms
    # Halfway from 0.2 to 0.3: 0.7; three quarters of the way from 0.1 to 0.3: 0.775.
    assert a.dialled_retention_at(0.25) == Estimate(pytest.approx(0.7375), pytest.approx(0.0375), 2)
    assert lower.dialled_retention_at(0.25) is None and none.dialled_retention_at(0.25) is None
    assert a.mean_dial == [(0.1, 1.0), (0.25, pytest.approx(0.8)), (0.3, 0.5)] and none.mean_dial == []
    text = page(comparison)
    assert "73.8 ± 3.7 %" in text and "matched score on its dial: low." in text


def test_without_a_dial_the_page_does_not_speak_of_it():
    assert "ialled" not in page(two_arms())


def test_the_picture_shows_each_measured_dial_in_its_arm_s_colour():
    curve = ((0, 0.1, 1.0), (0.5, 0.2, 0.9), (1, 0.3, 0.5))
    comparison = Comparison([dialled("a", 0, *curve), dialled("b", 0, *curve), result("none")])
    figure = pareto_figure(comparison)
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert [line.get_color() for line in drawn] == [looks(comparison)[name]["color"] for name in "ab"]
    assert list(drawn[0].get_ydata()) == [1.0, 0.9, 0.5]
    assert [text.get_text() for text in figure.legends[0].texts].count("dial") == 1


def test_arms_that_miss_a_given_level_are_named():
    text = page(two_arms(given_level=0.35))
    assert "reaches the matched score: keeps." in text and "as given" in text


def test_a_run_that_only_tuned_does_not_count():
    (arm,) = [arm for arm in two_arms().arms if arm.name == "keeps"]
    assert [run.seed for run in arm.runs] == [0, 1]


def test_acceleration_is_the_baseline_s_cost_over_the_arm_s():
    comparison = two_arms(baseline="keeps")
    quick, keeps = comparison.arms
    assert comparison.acceleration(quick, lambda point: point.round) == 2.0
    assert comparison.acceleration(quick, lambda point: point.simulated_seconds) == 4.0
    assert comparison.acceleration(keeps, lambda point: point.bytes) == 1.0
    assert two_arms(given_target=0.35, baseline="keeps").acceleration(quick, lambda point: point.round) is None


def test_at_equal_time_each_arm_is_where_it_was_when_the_quickest_ended():
    comparison = two_arms()
    quick, keeps = comparison.arms
    assert comparison.common_seconds == quick.runs[0].points[-1].simulated_seconds
    at_equal_time = [arm.estimate(lambda run: run.accuracy_within(comparison.common_seconds)) for arm in (quick, keeps)]
    assert [estimate.mean for estimate in at_equal_time] == [0.4, 0.2]


def test_means_by_round_are_over_the_seeds():
    comparison = Comparison([result("a", 0, (0.1, 0.2, 0.3)), result("a", 1, (0.1, 0.4, 0.5), seconds=3.0)])
    place = comparison.arms[0].places[1]
    assert (place.round, place.accuracy.mean, place.simulated_seconds) == (1, pytest.approx(0.3), 2.0)
    assert place.accuracy.error == pytest.approx(0.1)


def test_own_models_have_a_column_only_where_there_are_some():
    assert "clients' own models" not in page(two_arms())
    assert "0.600" in page(Comparison([result(personalised={"mean": 0.6})]))


def test_the_validation_score_is_that_of_the_round_whose_model_was_kept():
    assert result(accuracies=(0.1, 0.4, 0.3), kept_round=1).validation_accuracy == 0.4
    assert result(accuracies=(0.1, 0.4, 0.3)).validation_accuracy == 0.3


def test_who_has_no_common_model_is_tuned_by_the_clients_own():
    alone = result(accuracies=(0.1, 0.1, 0.1))
    assert alone.tuning_accuracy == 0.1
    for record, mean in zip(alone.history, (0.1, 0.3, 0.2), strict=True):
        record["personalised"] = {"mean": mean}
    assert alone.tuning_accuracy == 0.2 and alone.validation_accuracy == 0.1


def test_the_best_rate_is_the_lower_of_equal_ones_and_has_no_failed_run():
    assert best_rate({1e-3: [0.3, 0.5], 3e-3: [0.4, 0.4], 1e-2: [0.9, None]}) == 1e-3
    assert best_rate({1e-3: [0.3], 3e-3: [0.4]}) == 3e-3
    assert best_rate({1e-3: [None]}) is None


@pytest.mark.parametrize("tasks", [True, False])
def test_a_comparison_leaves_table_page_and_pictures(tmp_path, tasks):
    changes = {} if tasks else {"general": None, "retention": None, "delta_ce": None, "retentions": [None] * 3}
    arms = [f"arm {index}" for index in range(15)]
    write(Comparison([result(arm, seed, **changes) for arm in arms for seed in range(2)]), tmp_path)
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"downstream.png", "convergence.png"} | ({"learning_against_forgetting.png"} if tasks else set())
    text = (tmp_path / "comparison.md").read_text()
    assert all(f"(plots/{name})" in text for name in pictures)
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 30
    expected = {"arm": "arm 0", "rounds_to_target": "2", "bytes_to_target": "40", "versions": "fedbe=0 torch=2"}
    expected |= {"stories_base": "0.8", "stories_final": "0.4", "retention_mean": "0.5"} if tasks else {}
    assert expected.items() <= rows[0].items()


@pytest.mark.parametrize("name", [r"c$\frac{$", "$a$", "_hidden"])
def test_an_arm_may_have_any_name(tmp_path, name):
    comparison = Comparison([result(arm, seed) for arm in (name, "other") for seed in range(2)])
    write(comparison, tmp_path)
    assert len(list((tmp_path / "plots").iterdir())) == 3
    labels = [text.get_text() for text in pareto_figure(comparison).legends[0].get_texts()]
    assert any(label.replace(r"\$", "$").strip() == name for label in labels)


def test_a_comparison_for_which_there_is_no_room_says_that_the_runs_are_intact(tmp_path):
    with no_room(), pytest.raises(StorageError, match="the disk is full; the runs are intact"):
        write(two_arms(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["plots"]


def test_runs_that_exist_are_arms_by_what_they_differ_in(tmp_path, capsys):
    folders = [write_run(tmp_path / f"{rank}-{seed}", seed, rank=rank) for rank in (4, 8) for seed in (0, 1)]
    folders.append(write_run(tmp_path / "other", algorithm="FedAvg", rounds=3))
    results, differences = read_runs(folders)
    assert [r.arm for r in results] == ["FedIT, rank 4"] * 2 + ["FedIT, rank 8"] * 2 + ["FedAvg"]
    assert differences == ["federation.rounds = 2 / 3"]
    output = tmp_path / "out"
    assert main(["compare", *map(str, folders), f"--output={output}"]) == 0
    assert "not on one footing: federation.rounds" in (output / "comparison.md").read_text()
    assert str(output) in capsys.readouterr().out
    assert main(["compare", str(folders[0]), f"--output={output}"]) == 2


def test_what_is_no_run_and_a_run_given_twice_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    for folders in ([tmp_path / "nowhere"], [run, run]):
        with pytest.raises(ConfigError, match="runs"):
            read_runs(folders)
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="no finished run"):
        read_runs([run])


def test_one_run_of_an_algorithm_has_its_plain_name():
    assert arm_labels([{"algorithm.class_path": "a.FedIT", "seed": 1, "x": 2}]) == ["FedIT"]
    gated = {"algorithm.class_path": "a.Gated", "algorithm.init_args.algorithm.class_path": "a.FedBE"}
    assert arm_labels([gated]) == ["Gated FedBE"]
