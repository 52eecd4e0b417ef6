"""A configuration calls constructors of the kind that a key asks for, and nothing else."""

import json
import sys

import pytest
import yaml

from fedbe.cli.main import main
from fedbe.config.parser import read_run, run_parser
from fedbe.dial.finished_run import FinishedRun
from fedbe.errors import ConfigError

TEXT = {"class_path": "fedbe.corpora.TorchHeaders", "init_args": {"max_characters": 2000, "libraries": ["c10", "fmt"]}}
IID = {"class_path": "fedbe.datamodules.IIDPartitioner", "init_args": {"clients": 2}}
DATA = {
    "class_path": "fedbe.datamodules.CausalLMDataModule",
    "init_args": {"corpus": TEXT, "partitioner": IID, "sequence_length": 16},
}
OWN = """
import pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()

import torch
from fedbe.federation.callback import FederatedCallback
from fedbe.datamodules import IIDPartitioner
from torch.optim import Optimizer


class Mine(FederatedCallback):
    def __init__(self, patience: int = 1):
        self.patience = patience


class Broken(FederatedCallback):
    def __init__(self, file: str = "nowhere.csv"):
        open(file)


class Further(IIDPartitioner):
    pass


class Unrelated:
    def __init__(self, command: str = ""):
        pathlib.Path("called").touch()


def sgd(parameters) -> Optimizer:
    pathlib.Path("called").touch()
    return torch.optim.SGD(parameters, lr=1.0)


def callback() -> FederatedCallback:
    pathlib.Path("called").touch()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where the command is called, with a file of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*(entry for entry in sys.path if entry), str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path


def config(**changes):
    trainer = {"max_steps": 1, "accelerator": "cpu"}
    return {"data": DATA, "logger": "none", "trainer": trainer, "federation": {"rounds": 1}} | changes


def written(folder, **changes):
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**changes)))
    return f"--config={folder / 'config.yaml'}"


def optimizer(path, **arguments):
    return {"client": {"optimizer": {"class_path": path, "init_args": arguments}}}


def spec(path, **arguments):
    return {"class_path": path, "init_args": arguments}


CALLS = {
    "a shell command": optimizer("os.system", command="touch called"),
    "a shell command by the module that has it": optimizer("posix.system", command="touch called"),
    "a shell command through another module": optimizer("fedbe.config.build.os.system", command="touch called"),
    "a module of Python": optimizer("subprocess.run", args=["touch", "called"]),
    "a function of torch": optimizer("torch.hub.load", repo_or_dir=".", model="x", source="local"),
    "a function of one's own": optimizer("mine.sgd"),
    "a function of one's own by name": {"client": {"optimizer": "mine.sgd"}},
    "a class of another kind": optimizer("mine.Unrelated", command="touch called"),
    "a function for a callback": {"callbacks": [spec("mine.callback")]},
    "a class of another kind for a callback": {"callbacks": [spec("mine.Unrelated")]},
    "a class of another kind for a task": {"general_tasks": [spec("mine.Unrelated")]},
    "a class of another kind for a logger": {"logger": spec("mine.Unrelated")},
    "a class of another kind for an algorithm": {"algorithm": spec("mine.Unrelated")},
    "a class of another kind deep inside": {"data": spec(DATA["class_path"], **DATA["init_args"] | {
        "partitioner": spec("mine.Unrelated", command="touch called")})},
    "a class as text": {"algorithm": '{"class_path": "mine.Unrelated"}'},
    "a module of Python as text": {"algorithm": '{"class_path": "\\u006fs.system", "init_args": {"command": "ls"}}'},
    "a function for a callback of Lightning": {"trainer": {"callbacks": [
        spec("lightning.pytorch.callbacks.LambdaCallback", setup="os.system")]}},
    "a function of one's own for a callback of Lightning": {"trainer": {"callbacks": [
        spec("lightning.pytorch.callbacks.LambdaCallback", setup="mine.sgd")]}},
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("command", ["fit", "partition"])
def test_nothing_is_called_that_is_no_class_of_the_kind(case, command, place, capsys):
    assert main([command, written(place, **CALLS[case])]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and next(iter(CALLS[case])) in said
    assert not (place / "called").exists() and not (place / "runs").exists()


@pytest.mark.parametrize("module", ["antigravity", "this", "idlelib.idle", "pip.__main__", "pytest"])
def test_a_module_that_has_no_such_classes_is_not_imported(module, place, monkeypatch):
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError) as refused:
        read_run(run_parser("fit"), [written(place, callbacks=[spec(f"{module}.Thing")])])
    assert module not in sys.modules
    (problem,) = refused.value.problems
    assert problem.key == "callbacks[0].class_path" and problem.value == f"{module}.Thing"


def test_a_file_of_one_s_own_takes_no_installed_module_s_place(place, capsys):
    (place / "shelved.py").write_text("raise SystemExit")
    (place / "yaml.py").write_text("raise SystemExit")
    assert main(["partition", written(place), f"--plot={place / 'who.png'}"]) == 0


def test_classes_of_one_s_own_are_used(place):
    data = spec(DATA["class_path"], **DATA["init_args"] | {"partitioner": spec("mine.Further", clients=2)})
    run, _ = read_run(run_parser("fit"), [written(place, data=data, callbacks=[spec("mine.Mine", patience=3)])])
    assert run.callbacks[0].patience == 3 and type(run.data.partitioner).__name__ == "Further"


@pytest.mark.parametrize("name", ["runs.stranger.mine.Mine", "runs.stranger.mine", "mine.Mine"])
def test_a_stranger_s_run_folder_runs_nothing(name, place, monkeypatch, capsys):
    folder = place / "runs" / "stranger"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(OWN)
    (folder / "summary.json").write_text(json.dumps({"rounds": 1}))
    optimizer = spec("os.system", command="touch called")
    parts = {"general_tasks": [spec(name)], "callbacks": [spec(name)], "client": {"optimizer": optimizer}}
    written(folder, **parts | {"engine": spec("mine.Unrelated"), "logger": spec("mine.Unrelated")})
    if name == "mine.Mine":  # the command is called in the stranger's folder
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.path", [*(entry for entry in sys.path if entry != str(place)), str(folder)])
    for command in (["dial", str(folder)], ["export", str(folder), "--to", str(place / "out")]):
        assert main(command) == 2
        assert "general_tasks[0].class_path" in capsys.readouterr().err
    assert not list(place.rglob("called")) and not list(place.rglob("*.imported"))


def test_of_a_finished_run_only_what_its_model_needs_is_built(place):
    (place / "summary.json").write_text(json.dumps({"rounds": 1}))
    written(place, callbacks=[spec("mine.Broken")], logger=spec("mine.Unrelated"), **optimizer("gone.Optimizer"))
    assert FinishedRun.read(place).run.callbacks in ((), [])


NAMES = [
    "../up",
    "/tmp/elsewhere",
    "..",
    ".",
    "",
    "a/../../b",
    "a//b",
    "x" * 5000,
    "new\nline",
    "nul\0",
    "link/x",
    "a\\..\\b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_s_name_stays_inside_its_folder(name, place):
    (place / "runs").mkdir()
    (place / "runs" / "link").symlink_to(place)
    run, _ = read_run(run_parser("fit"), [written(place, name=name)])
    assert [problem.key for problem in run.check()] == ["name"]


def test_a_name_may_have_a_folder_in_it(place):
    run, _ = read_run(run_parser("fit"), [written(place, name="exp/one-2")])
    assert run.check() == []


TOLD = {
    "a constructor that raises": ({"callbacks": [spec("mine.Broken")]}, "callbacks[0].class_path", "nowhere.csv"),
    "an abstract class": ({"data": spec("fedbe.data.FederatedDataModule")}, "data.class_path", "client_dataset"),
    "a class that is not there": ({"algorithm": spec("fedbe.algorithms.BlockExpansoin")}, "algorithm.class_path",
                                  "did you mean `fedbe.algorithms.BlockExpansion`?"),
    "a callback that is not there": ({"callbacks": [spec("fedbe.callbacks.EarlyStoping")]}, "callbacks[0].class_path",
                                     "did you mean `fedbe.callbacks.EarlyStopping`?"),
    "an optimizer that is not there": (optimizer("torch.optim.AdamV"), "client.optimizer.class_path",
                                       "torch.optim.Adam"),
    "a module that is not there": ({"algorithm": spec("nowhere.Mine")}, "algorithm.class_path", "PYTHONPATH"),
    "a class that is no callback": ({"callbacks": [spec("fedbe.algorithms.FedIT")]}, "callbacks[0].class_path",
                                    "is no FederatedCallback"),
    "a number for a mapping": ({"federation": {"quorum": 0.5}}, "federation.quorum", "a mapping"),
    "a null": ({"data": spec(DATA["class_path"], **DATA["init_args"] | {"batch_size": None})},
               "data.init_args.batch_size", "int"),
    "a key for keyword arguments": ({"data": DATA | {"dict_kwargs": {"x": 1}}}, "data.dict_kwargs", "init_args"),
    "a key that there is in files alone": ({"config": "more.yaml"}, "config", "no such key"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_a_class_that_cannot_be_used_is_told_with_the_way_out(case, place):
    changes, key, said = TOLD[case]
    with pytest.raises(ConfigError) as refused:
        read_run(run_parser("fit"), [written(place, **changes)])
    problems = {problem.key: problem.remedy for problem in refused.value.problems}
    assert said in problems[key], problems
    assert len(problems) == 1


def test_a_key_that_is_given_twice_is_refused(place, capsys):
    file = written(place)
    with (place / "config.yaml").open("a") as text:
        text.write("\nseed: 1\nseed: 2\n")
    assert main(["fit", file]) == 2
    assert "`seed` is given twice" in capsys.readouterr().err


def test_a_key_that_is_cut_short_is_refused(place, capsys):
    assert main(["fit", written(place), "--federation.round=3"]) == 2
    assert "did you mean `rounds`?" in capsys.readouterr().err
    assert main(["dial", str(place), "--factor", "0.5"]) == 2


def test_what_is_added_to_a_list_on_the_command_line_has_its_key(place, capsys):
    assert main(["fit", written(place), "--callbacks+=fedbe.callbacks.EarlyStoping"]) == 2
    assert "callbacks[0] = 'fedbe.callbacks.EarlyStoping'" in capsys.readouterr().err


def test_a_mistake_beside_print_config_is_the_only_one(place, capsys):
    assert main(["fit", written(place, sed=1), "--print_config=skip_default"]) == 2
    assert "1 mistake" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--help", "--print_config", "--data.help=fedbe.datamodules.CausalLMDataModule"])
def test_what_there_is_to_say_is_shown_without_a_configuration(word, place, capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", word])
    assert left.value.code == 0
    assert ("sequence_length" if word.startswith("--data") else "seed") in capsys.readouterr().out


def test_a_text_that_looks_like_a_number_is_the_text_in_the_file(place):
    file = written(place)
    with (place / "config.yaml").open("a") as text:
        text.write("\nname: 1e-3\n")
    run, config = read_run(run_parser("fit"), [file])
    assert (run.name, config["name"]) == ("1e-3", "1e-3")
