import lightning as L
import pytest
import torch
from toy import ToyData, adamw, tiny_llama

from fedbe.client import ClientModule
from fedbe.client.trainer import QUIET
from fedbe.errors import ExpansionError


def test_a_client_of_no_federation_trains_what_it_is_told_to_in_any_trainer():
    model = tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = tuple(name for name in before if ".layers.1." in name)
    batches = ToyData().client_dataloader("client-0", torch.Generator())
    L.Trainer(**QUIET, accelerator="cpu", max_steps=2).fit(ClientModule(model, names, adamw), batches)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(names)


def test_a_name_that_the_model_does_not_have_is_refused():
    with pytest.raises(ExpansionError, match="nothing"):
        ClientModule(tiny_llama(), ["nothing"], adamw)
