"""Several clients in one pass of the model come to what each comes to by itself."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, batch, perturb, tiny
from torch.func import functional_call
from torch.nn import Dropout
from toy import tiny_llama

from fedbe.engines.one_pass.forward import OnePass, OnePassError, concatenated
from fedbe.engines.one_pass.trial import quickest, verify_one_pass
from fedbe.expansion import block_parameter_names, enable_gradient_checkpointing, expand_blocks, head_parameter_names
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.tensors import copy_tensors
from fedbe.seeding import generator


def expanded(family):
    """A model with two expanded blocks, and the names of all that trains: these, and a task head."""
    model = tiny(family).requires_grad_(False)
    blocks = block_parameter_names(model, expand_blocks(model, [0, 2]))
    return model, [*(name for names in blocks.values() for name in names), *head_parameter_names(model)]


def without_dropout(model):
    for owner in (model.config, *model.modules()):
        rates = [name for name in vars(owner) if "dropout" in name or (name == "p" and isinstance(owner, Dropout))]
        vars(owner).update({name: 0.0 for name in rates if isinstance(vars(owner)[name], float)})


def client_tensors(model, names, client):
    tensors = copy_tensors(model, names)
    perturb([(f"{client}/{name}", tensor) for name, tensor in tensors.items()], 0.1)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def labelled(model, rows, length, client):
    """A client's batch, the last row padded where there is more than one."""
    given = batch(model)
    chance = generator(client, "labels")
    classes = torch.randint(3, (rows,), generator=chance)
    if "pixel_values" in given:
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=chance), "labels": classes}
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=chance)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": classes if model.config.num_labels == 3 else ids}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_each_client_s_own_in_every_family(family):
    model, names = expanded(family)
    clients = [client_tensors(model, names, client) for client in range(3)]
    batches = [labelled(model, rows, length, rows) for rows, length in ((3, 9), (2, 14), (1, 5))]
    expected = []
    for tensors, given in zip(clients, batches, strict=True):
        loss = functional_call(model, tensors, (), {**given, **forward_options(model)}).loss
        expected.append((loss, torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)))
    one_pass = OnePass(model, names)
    with one_pass.installed():
        outputs = one_pass.outputs(clients, batches)
    torch.stack([output.loss for output in outputs]).sum().backward()
    for tensors, output, (loss, gradients) in zip(clients, outputs, expected, strict=True):
        torch.testing.assert_close(output.loss, loss)
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(tensor.grad, gradient, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    without_dropout(model)
    verify_one_pass(model, names, labelled(model, 2, 9, 0))


def test_frozen_blocks_run_once_and_the_model_is_whole_again():
    model, names = expanded("llama")
    modules = dict(model.named_modules())
    ran = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda module, inputs, output, index=index: ran.append((index, len(inputs[0]))))
    one_pass = OnePass(model, names)
    clients = [client_tensors(model, names, client) for client in range(2)]
    with one_pass.installed():
        one_pass.outputs(clients, [labelled(model, rows, 9, rows) for rows in (3, 1)])
    assert ran == [(0, 4), (1, 3), (1, 1), (2, 4), (3, 4), (4, 3), (4, 1), (5, 4)]
    assert dict(model.named_modules()) == modules


def test_a_client_whose_numbers_are_none_leaves_the_others_gradients_alone():
    model, names = expanded("llama")
    clients = [client_tensors(model, names, client) for client in range(3)]
    batches = [labelled(model, 2, 9, client) for client in range(3)]

    def gradients():
        one_pass = OnePass(model, names)
        with one_pass.installed():
            outputs = one_pass.outputs(clients, batches)
        loss = torch.stack([output.loss for output in outputs]).sum()
        return [torch.autograd.grad(loss, list(c.values()), retain_graph=True) for c in clients]

    expected = gradients()
    with torch.no_grad():
        clients[1][names[0]].fill_(float("nan"))
    found = gradients()
    for client in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(expected[client], found[client], strict=True))
    assert all(gradient.isnan().any() for gradient in found[1])


def test_packed_documents_stay_apart_when_sequences_differ_in_length():
    model = tiny_llama()
    names = block_parameter_names(model, expand_blocks(model, [1]))[0]
    clients = [client_tensors(model, names, client) for client in range(2)]
    ids = torch.randint(2, 32, (2, 9), generator=generator(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    batches = [
        {"input_ids": ids[:, :n], "position_ids": positions[:, :n], "labels": ids[:, :n].contiguous()} for n in (9, 7)
    ]
    expected = [functional_call(model, t, (), {**b, "use_cache": False}) for t, b in zip(clients, batches, strict=True)]
    one_pass = OnePass(model, names)
    with one_pass.installed():
        found = one_pass.outputs(clients, batches)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.logits, b.logits)


def test_a_mask_is_added_where_another_client_has_one_or_a_longer_sequence():
    short, long = ({"input_ids": torch.ones(1, n).long(), "labels": torch.ones(1, n)} for n in (2, 3))
    assert concatenated([short, short]).keys() == {"input_ids"}
    assert concatenated([short, long])["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    masked = short | {"attention_mask": torch.tensor([[1, 0]])}
    assert concatenated([masked, short])["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_inputs_that_do_not_go_together_are_refused():
    ids = {"input_ids": torch.ones(1, 2).long()}
    with pytest.raises(OnePassError, match="different inputs"):
        concatenated([ids, ids | {"token_type_ids": ids["input_ids"]}])
    packed = ids | {"position_ids": torch.tensor([[0, 0]])}
    with pytest.raises(OnePassError, match="how documents are packed"):
        concatenated([packed, packed | {"attention_mask": torch.ones(1, 2)}])


@pytest.mark.parametrize(
    ("family", "prepare", "reason"),
    [
        ("gpt2", lambda model: None, "drops at random"),
        ("llama_tied", enable_gradient_checkpointing, "gradient checkpointing"),
    ],
)
def test_what_is_not_each_client_s_own_is_refused(family, prepare, reason):
    model, names = expanded(family)
    prepare(model)
    with pytest.raises(OnePassError, match=reason):
        verify_one_pass(model, names, labelled(model, 2, 9, 0))


def test_a_model_of_which_all_trains_has_nothing_to_share():
    model = tiny_llama()
    with pytest.raises(OnePassError, match="no frozen part"):
        OnePass(model, [name for name, _ in model.named_parameters()])


class Positions(torch.nn.Module):
    """Adds to a norm what it makes of a table of positions, which has a row for each token of a sequence."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.inner = norm, torch.nn.Linear(16, 16)

    def forward(self, states):
        return self.norm(states) + self.inner(torch.arange(states.shape[1] * 16).float().view(-1, 16) / 16)


def test_an_argument_that_looks_like_rows_and_is_none_is_found():
    model = tiny_llama()
    model.model.norm = Positions(model.model.norm).requires_grad_(False)
    inputs = {"input_ids": torch.randint(2, 32, (2, 11), generator=generator(0))}
    with pytest.raises(OnePassError, match="off by"):
        verify_one_pass(model, ["model.norm.inner.weight"], inputs)


def test_the_quickest_number_is_taken_where_it_saves_something():
    assert quickest({1: 1.0, 2: 0.9, 4: 0.8}) == 4
    assert quickest({1: 1.0, 2: 0.97, 4: 1.2}) == 1
