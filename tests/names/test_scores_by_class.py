import json

from fedbe.figures.confusion import confusion_figure
from fedbe.figures.tables import summary_table
from names.classifiers import bert, text_data, trained


def test_a_classifiers_summary_tells_its_classes_apart_by_name(tmp_path):
    data = text_data(tmp_path / "rows", {"good": "yes", "bad": "no", "odd": "$a_b$"})
    result = trained(bert(tmp_path / "base"), data, tmp_path / "run")
    summary = json.loads((result.path / "summary.json").read_text())
    scores, downstream = summary["by_class"], summary["downstream"]
    assert sorted(scores["classes"]) == ["$a_b$", "no", "yes"]
    assert sum(sum(row.values()) for row in scores["confusion"].values()) == 24
    right = sum(row.get(name, 0) for name, row in scores["confusion"].items())
    assert right / 24 == downstream["accuracy"] and downstream["standard_error"] >= 0
    assert summary["downstream_base"].keys() == downstream.keys() and "±" in summary_table(summary).columns[2]._cells[0]
    assert (result.path / "plots" / "confusion.png").stat().st_size > 0
    labels = confusion_figure(scores["confusion"]).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [r"\$a_b\$", "no", "yes"]
