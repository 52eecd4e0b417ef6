import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbe.data.batch import IGNORED, lengthen, pad, pad_samples
from fedbe.datamodules.tokens import TokenSamples, pack_documents
from fedbe.text.packing import best_fit
from fedbe.text.ragged import Ragged

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=40), min_size=1, max_size=20)


def documents_in(samples: TokenSamples) -> list[list[int]]:
    """Read the pieces back out of the samples, by their positions."""
    pieces: list[list[int]] = []
    for index in range(len(samples)):
        sample = samples[index]
        for token, position in zip(sample["input_ids"].tolist(), sample["position_ids"].tolist(), strict=True):
            if position == 0:
                pieces.append([])
            assert position == len(pieces[-1])
            pieces[-1].append(token)
    return pieces


@given(documents=DOCUMENTS, length=st.integers(2, 16))
def test_packing_keeps_every_document_whole_or_in_pieces_of_full_length(documents: list[list[int]], length: int):
    samples = pack_documents(Ragged.of(documents), length, restart_positions=True)
    expected = [document[start : start + length] for document in documents for start in range(0, len(document), length)]
    assert sorted(documents_in(samples)) == sorted(expected)
    assert all(len(samples[index]["input_ids"]) <= length for index in range(len(samples)))
    assert samples.tokens == sum(map(len, documents))


@given(documents=DOCUMENTS, length=st.integers(2, 16))
def test_labels_are_the_tokens_but_for_the_first_of_each_piece(documents: list[list[int]], length: int):
    samples = pack_documents(Ragged.of(documents), length, restart_positions=True)
    for index in range(len(samples)):
        ids, labels, positions = (samples[index][name] for name in ("input_ids", "labels", "position_ids"))
        assert torch.equal(labels, torch.where(positions == 0, IGNORED, ids))


@given(documents=DOCUMENTS, length=st.integers(2, 16))
def test_concatenation_is_one_stream_cut_at_even_places(documents: list[list[int]], length: int):
    stream = [token for document in documents for token in document]
    pieces = Ragged.of(documents).concatenated(length)
    assert [pieces.tokens[pieces.span(index)].tolist() for index in range(len(pieces))] == [
        stream[start : start + length] for start in range(0, len(stream), length)
    ]


@given(sizes=st.lists(st.integers(1, 12), max_size=50))
def test_bins_hold_every_item_once_within_capacity_and_few_are_used(sizes: list[int]):
    bins = best_fit(sizes, 12)
    assert sorted(item for content in bins for item in content) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in content) <= 12 for content in bins)
    assert len(bins) <= math.ceil(sum(sizes) / 12) * 11 / 9 + 1 or sum(size > 6 for size in sizes) >= len(bins) - 1


def test_best_fit_fills_the_fullest_bin_that_has_room():
    assert best_fit([6, 4, 5, 3, 2], 10) == [[0, 1], [2, 3, 4]]


def test_batches_are_padded_at_the_right_without_loss_and_positions_go_on_as_a_new_document():
    samples = pack_documents(Ragged.of([[5, 6, 7], [8, 9], [4]]), 3, restart_positions=True)
    batch = pad_samples([samples[0], TokenSamples(Ragged.of([[8]]), torch.tensor([False]), True)[0]], 0, False)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}


def test_the_attention_mask_covers_the_real_tokens():
    samples = TokenSamples(Ragged.of([[5, 6, 7], [8]]), torch.ones(4, dtype=torch.bool))
    batch = pad_samples([samples[0], samples[1]], 3, attention_mask=True)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]


def test_a_capped_set_is_spread_over_the_whole_and_keeps_labels():
    samples = TokenSamples(Ragged.of([[index, index] for index in range(9)]), torch.tensor([False, True] * 9))
    kept = samples.evenly(3)
    assert [kept[index]["input_ids"].tolist() for index in range(len(kept))] == [[0, 0], [3, 3], [6, 6]]
    assert kept[2]["labels"].tolist() == [IGNORED, 6]
    assert samples.evenly(9) is samples.evenly(None) is samples


def test_tokens_are_stored_in_four_bytes_each_and_out_of_range_is_an_index_error():
    sequences = Ragged.of([[1, 2], [3]])
    assert sequences.tokens.element_size() == 4
    with pytest.raises(IndexError, match="outside 0 to 1"):
        sequences.span(2)


def test_a_batch_that_is_made_longer_counts_positions_from_0_again():
    given = {"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.tensor([[3, 4]]), "token": torch.tensor([9])}
    longer = {name: tensor.tolist() for name, tensor in lengthen(given, 4).items()}
    assert longer == {"input_ids": [[5, 6, 0, 0]], "position_ids": [[3, 4, 0, 1]], "token": [9]}


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_rows_are_filled_up_at_the_right_to_the_longest_or_further(kind):
    rows = [kind([1, 2, 3]), kind([4])]
    assert pad(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad(rows, 9, length=4).tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    states = pad([torch.ones(2, 3), torch.ones(1, 3)], length=3)
    assert states.shape == (2, 3, 3) and states.sum(-1).tolist() == [[3, 3, 0], [3, 0, 0]]
