import torch

from fedbe.client import ClientMemory, Kept


def kept(value):
    return Kept({"w": torch.full((2,), float(value))}, {"w": torch.full((3,), -float(value))})


def value_of(entry):
    return entry.tensors["w"][0].item() if entry.tensors else None


def test_a_client_goes_on_from_the_round_whose_update_was_accepted():
    memory = ClientMemory()
    assert value_of(memory.get("a", None)) is None and value_of(memory.get("a", 0)) is None
    memory.put("a", 0, kept(0), None)
    memory.put("a", 1, kept(1), 0)  # refused: the next round goes on from round 0
    assert [value_of(memory.get("a", number)) for number in (0, 1)] == [0, 1]
    memory.put("a", 2, kept(2), 0)
    assert [value_of(memory.get("a", number)) for number in (0, 1, 2)] == [0, None, 2]
    memory.put("a", 5, kept(5), 2)
    assert [value_of(memory.get("a", number)) for number in (0, 2, 5)] == [None, 2, 5]
    assert value_of(memory.get("b", 5)) is None


def test_what_is_needed_to_continue_comes_back_whatever_clients_are_called():
    memory = ClientMemory()
    for client in ("a", "b/c", "d e/"):
        memory.put(client, 3, kept(3), None)
        memory.put(client, 4, kept(4), 3)
    tensors = memory.tensors({"a": 4, "b/c": 3, "d e/": 4, "unknown": 1})
    other = ClientMemory()
    other.load_tensors(tensors)
    assert value_of(other.get("a", 4)) == 4 and value_of(other.get("a", 3)) is None
    assert value_of(other.get("b/c", 3)) == 3 and value_of(other.get("d e/", 4)) == 4
    assert torch.equal(other.get("b/c", 3).objective["w"], torch.full((3,), -3.0))
    assert other.tensors({"a": 4, "b/c": 3, "d e/": 4}).keys() == tensors.keys()


def test_parameters_that_have_new_names_are_followed():
    memory = ClientMemory()
    memory.put("a", 0, kept(1), None)
    memory.rename({"w": "v", "x": "y"})
    assert memory.get("a", 0).tensors.keys() == memory.get("a", 0).objective.keys() == {"v"}


def test_nothing_takes_no_place():
    memory = ClientMemory()
    memory.put("a", 0, kept(0), None)
    memory.put("a", 1, Kept(), 0)
    memory.put("a", 2, Kept(), 1)
    assert memory.tensors({"a": 0}) == {}
