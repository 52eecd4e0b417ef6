"""Final tensors and metrics of every configuration, algorithm and engine are what they were when they were recorded.

On the machine that recorded them, to the bit; elsewhere up to what another processor makes of the same sums. See
`golden.write` for how they are recorded.
"""

import pytest
from stand_ins import MODELS

from golden.cases import ALLOWED, CASES, METHODS, ROUGH
from golden.runs import differences, load_golden, machine, make_stand_ins, run_case

MADE_ON, GOLDEN = load_golden()


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    make_stand_ins(folder)
    return folder


def test_each_case_is_recorded_and_nothing_else_is():
    assert GOLDEN.keys() == CASES.keys()
    assert ALLOWED.keys() | ROUGH.keys() <= CASES.keys()


def test_each_shipped_configuration_and_algorithm_is_a_case():
    assert {f"configuration/{name}" for name in MODELS} | {f"algorithm/{name}" for name in METHODS} <= CASES.keys()


@pytest.mark.filterwarnings("ignore:The base model scores 0 on:UserWarning")  # its weights are random
@pytest.mark.parametrize("name", CASES)
def test_a_case_comes_to_what_was_recorded(name, stand_ins, tmp_path):
    found = run_case(name, stand_ins, tmp_path / "run")
    told = differences(GOLDEN[name], found, exact=machine() == MADE_ON, rough=name in ROUGH)
    assert {path: how for path, how in told.items() if path not in ALLOWED.get(name, {})} == {}


def test_what_is_added_is_no_difference_and_what_is_missing_or_other_is():
    tensor = {"digest": "a", "dtype": "float32", "shape": [2], "sum": 3.0, "norm": 2.2, "first": [1.0, 2.0]}
    recorded = {"rounds": [{"loss": 1.0, "none": float("nan")}], "summary": {"rounds": 1}, "model": {"w": tensor}}
    more = {"rounds": [{"loss": 1.0, "none": float("nan"), "new": 1}], "summary": {"rounds": 1, "new": {}}}
    assert differences(recorded, more | {"model": recorded["model"]}, exact=True) == {}
    less = {"rounds": [{"loss": 1.0000001}], "summary": {"rounds": 2}, "model": {"w": tensor | {"digest": "b"}}}
    found = differences(recorded, less, exact=True)
    assert found.keys() == {"rounds/0/loss", "rounds/0/none", "summary/rounds", "model/w"}
    assert differences(recorded, less, exact=False).keys() == {"rounds/0/none", "summary/rounds"}
    assert differences(recorded, less | {"model": {}}, exact=False)["model"] == "['w'] became []"
