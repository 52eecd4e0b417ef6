"""What writes a model's folder writes it whole or not at all, whatever fails meanwhile."""

import pytest
from toy import tiny_llama, toy_plan

from fedbe.adaptation.lora_layers import save_adapter, save_merged
from fedbe.algorithms import FedIT
from fedbe.client.plan import prepare_model
from fedbe.errors import ConfigError
from fedbe.expansion import expand_blocks, save_model, save_plain
from fedbe.pretraining.pretrain import export
from fedbe.storage.files import new_folder, replacing_folder


class Tokenizer:
    """Saved last, when the weights are written."""

    def __init__(self, fails=False):
        self.fails = fails

    def save_pretrained(self, folder):
        if self.fails:
            raise OSError(28, "No space left on device")
        (folder / "tokenizer.json").write_text("{}")


def expanded(folder, tokenizer):
    model = tiny_llama()
    save_model(model, expand_blocks(model, [1], inputs=model.dummy_inputs), folder, tokenizer)


def adapted():
    plan = toy_plan(algorithm=FedIT(rank=2))
    prepare_model(plan, next(iter(plan.data.val_dataloader())))
    return plan.model


WRITERS = {
    "expanded": expanded,
    "plain": lambda folder, tokenizer: save_plain(tiny_llama(), folder, tokenizer),
    "merged": lambda folder, tokenizer: save_merged(adapted(), folder, tokenizer),
    "adapter": lambda folder, tokenizer: save_adapter(adapted(), (), folder, tokenizer),
    "pre-trained": lambda folder, tokenizer: export(tiny_llama(), tokenizer, folder),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_that_fails_leaves_nothing_and_one_that_does_not_the_folder_alone(tmp_path, writer):
    with pytest.raises(OSError, match="No space"):
        WRITERS[writer](tmp_path / "model", Tokenizer(fails=True))
    assert list(tmp_path.iterdir()) == []
    WRITERS[writer](tmp_path / "model", Tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tokenizer.json").exists() and len(list((tmp_path / "model").iterdir())) > 2


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "pre-trained"])
@pytest.mark.parametrize("what", ["file", "full folder"])
def test_what_stands_in_the_place_of_a_new_folder_is_left_alone(tmp_path, writer, what):
    place = tmp_path / "model"
    kept = place if what == "file" else place / "mine"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(ConfigError, match="holds something already"):
        WRITERS[writer](place, Tokenizer())
    assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
def test_a_new_folder_may_be_there_if_it_is_empty(tmp_path, before):
    if before != "nothing":
        (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    place = tmp_path / "a"
    for text in ("old", "new"):
        with replacing_folder(place) as partial:
            (partial / text).write_text(text)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]
    with pytest.raises(RuntimeError), replacing_folder(place) as partial:
        (partial / "newer").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]
