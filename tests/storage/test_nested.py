"""Dotted keys: one walk over nested mappings and lists, wherever keys are listed, compared or built."""

import pytest

from fedbe.storage.nested import dotted, leaves, look_up, merge, nest, section

CONFIG = {"a": {"b": [{"c": 1}, 2], "d": [3, 4]}, "e": {}, "f": []}


@pytest.mark.parametrize(
    ("lists", "keys"),
    [
        ("all", ["a.b[0].c", "a.b[1]", "a.d[0]", "a.d[1]", "e", "f"]),
        ("of mappings", ["a.b[0].c", "a.b[1]", "a.d", "e", "f"]),
        ("none", ["a.b", "a.d", "e", "f"]),
    ],
)
def test_leaves_have_the_keys_under_which_they_are_found(lists, keys):
    assert [key for key, _ in leaves(CONFIG, lists=lists)] == keys
    assert {section(key) for key in keys} == {"a", "e", "f"}


def test_a_path_is_written_as_the_key_of_what_stands_there():
    assert dotted(["a", "b", 0, "c"]) == "a.b[0].c" and look_up(CONFIG, ["a", "b", 0, "c"]) == 1


def test_a_mapping_is_laid_over_another_and_a_class_takes_its_place():
    config = {"a": {"b": 1, "c": {"class_path": "X", "init_args": {"d": 2}}}}
    merge(config, nest("a.c", {"class_path": "Y"}))
    merge(config, nest("a.e", 3))
    assert config == {"a": {"b": 1, "c": {"class_path": "Y"}, "e": 3}}
