"""The index of a model does what walking over the model does, for any order of clients."""

import pytest
import torch
from families import FAMILIES, tiny

from fedbe.errors import ExpansionError
from fedbe.expansion import head_parameter_names, stack_parameter_names
from fedbe.modeling.architecture import find_blocks, has_task_head
from fedbe.modeling.checkpointing import checkpoints_gradients
from fedbe.modeling.index import ModelIndex


def in_training(model, names):
    """The modules that train with some parameters, by the rule and module by module."""
    trained = {id(model.get_parameter(name)) for name in names}
    if len(trained) == len(list(model.parameters())):
        return set(model.modules())
    head = [child for child in model.children() if child is not model.base_model] if has_task_head(model) else []
    training, within = set(), set()
    for unit in [*([block] for block in find_blocks(model).blocks), head]:
        own = {id(parameter) for module in unit for parameter in module.parameters()}
        within |= own
        training |= {part for module in unit for part in module.modules()} if own & trained else set()
    outside = trained - within
    return training | {m for m in model.modules() if outside & {id(p) for p in m.parameters(recurse=False)}}


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_one_after_another_train_what_is_theirs_in_every_family(family):
    model = tiny(family)
    index, everything = ModelIndex(model), [name for name, _ in model.named_parameters()]
    blocks, head = stack_parameter_names(model), head_parameter_names(model)
    for names in (blocks[0], [*blocks[3], *head], everything, [everything[0], *blocks[1][:1]], (), everything[-1:]):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        index.train_only(names)
        own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert own == {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
        assert {module for module in model.modules() if module.training} == in_training(model, names)


def test_tensors_go_in_and_out_by_name_and_tied_ones_by_any_of_theirs():
    model = tiny("llama_tied")
    index = ModelIndex(model)
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    parameters = index.parameters(tied)
    assert list(parameters) == list(tied) and len({id(parameter) for parameter in parameters.values()}) == 1
    copies = index.copy([tied[0], "model.norm.weight"])
    index.load({"model.norm.weight": torch.zeros(32)})
    assert not parameters[tied[0]].grad and model.model.norm.weight.abs().max() == 0
    index.load(copies)
    assert torch.equal(model.model.norm.weight, copies["model.norm.weight"])
    with pytest.raises(AttributeError):
        index.copy(["model.nothing.weight"])


def test_names_that_are_none_are_refused_and_nothing_is_changed():
    model = tiny("llama")
    index = ModelIndex(model)
    index.train_only(["model.norm.weight"])
    with pytest.raises(ExpansionError, match=r"'model\.layers\.9\.x'"):
        index.train_only(["model.layers.9.x"])
    assert model.model.norm.weight.requires_grad and model.model.norm.training


def test_checkpointing_that_is_switched_on_between_clients_is_replaced():
    model = tiny("llama")
    index = ModelIndex(model)
    index.train_only(stack_parameter_names(model)[1])
    assert not checkpoints_gradients(model.modules())
    model.activation_checkpointing_enable()
    index.train_only(stack_parameter_names(model)[1])
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert checkpoints_gradients(find_blocks(model).blocks)
