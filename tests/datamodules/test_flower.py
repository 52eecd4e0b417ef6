import pytest
from datasets import Dataset
from jsonargparse import ArgumentParser

from fedbe.data import FederatedDataModule
from fedbe.datamodules import CausalLMDataModule, FlowerAdapter, IIDPartitioner
from fedbe.errors import ConfigError, Facts


class Contiguous:
    """Behaves as a partitioner of `flwr_datasets` does: takes a data set once, fails without, returns data sets."""

    def __init__(self, num_partitions: int = 3):
        self._dataset: Dataset | None = None
        self._num_partitions = num_partitions

    @property
    def dataset(self) -> Dataset:
        if self._dataset is None:
            raise AttributeError("The dataset field should be set before using it")
        return self._dataset

    @dataset.setter
    def dataset(self, value: Dataset) -> None:
        if self._dataset is not None:
            raise ValueError("The dataset should be assigned only once")
        self._dataset = value

    @property
    def num_partitions(self) -> int:
        if self._num_partitions > len(self.dataset):
            raise ValueError("more partitions than samples")
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        return self.dataset.shard(self._num_partitions, partition_id, contiguous=True)


class Named(Contiguous):
    partition_id_to_natural_id = {0: "romeo", 1: "juliet", 2: "nurse"}  # noqa: RUF012


class Vertical(Contiguous):
    def load_partition(self, partition_id: int) -> Dataset:
        return self.dataset.select_columns(["text"])


class Everything(Contiguous):
    def load_partition(self, partition_id: int) -> Dataset:
        return self.dataset


ROWS = Dataset.from_dict({"text": list("abcdefg")})


def test_rows_of_each_partition_are_recovered_at_every_call():
    adapter = FlowerAdapter(Contiguous())
    expected = {"0": [0, 1, 2], "1": [3, 4], "2": [5, 6]}
    assert adapter.check("data", Facts(dataset=ROWS)) == []
    assert adapter.partition(ROWS, seed=0) == adapter.partition(ROWS, seed=1) == expected


def test_natural_ids_name_the_clients():
    assert list(FlowerAdapter(Named()).partition(ROWS, 0)) == ["romeo", "juliet", "nurse"]


@pytest.mark.parametrize(
    ("partitioner", "remedy"),
    [
        (Vertical(), "divides columns, not rows"),
        (Everything(), "two clients"),
        (Contiguous(8), "more partitions than samples"),
    ],
)
def test_what_is_no_partition_of_the_rows_is_reported(partitioner: Contiguous, remedy: str):
    (problem,) = FlowerAdapter(partitioner).check("data.init_args.partitioner.init_args", Facts(dataset=ROWS))
    assert problem.key == "data.init_args.partitioner"
    assert remedy in problem.remedy


def test_a_data_module_takes_one_as_it_is(corpus, tokenizer, llama_config):
    data = CausalLMDataModule(corpus({"text": list("abcdefg")}), Contiguous(), sequence_length=16)
    data.connect(tokenizer, llama_config, seed=0)
    data.setup()
    assert data.client_ids == ("0", "1", "2")


def test_a_configuration_names_one_by_its_class_path(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "speech {number}"}}\n' for number in range(40)))
    partitioner = {"class_path": f"{__name__}.Contiguous", "init_args": {"num_partitions": 4}}
    corpus = {"class_path": "fedbe.corpora.FilesCorpus", "init_args": {"train": str(tmp_path / "a.jsonl")}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FederatedDataModule, "data")
    arguments = {"corpus": corpus, "partitioner": partitioner}
    path = "fedbe.datamodules.CausalLMDataModule"
    data = parser.instantiate(parser.parse_object({"data": {"class_path": path, "init_args": arguments}})).data
    assert data.check("data.init_args", Facts()) == []
    assert data.partitioner.partitioner._num_partitions == 4


def test_something_else_is_refused(corpus):
    with pytest.raises(ConfigError, match="partitioner = 'int'"):
        CausalLMDataModule(corpus({"text": ["a"]}), 3)  # type: ignore[arg-type]
    assert isinstance(CausalLMDataModule(corpus({"text": ["a"]}), IIDPartitioner(1)).partitioner, IIDPartitioner)
