import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbe.corpora import SPLITS, split_of
from fedbe.corpora.base import check_fractions, check_split, hash_position
from fedbe.corpora.paragraphs import drop_repeated, paragraph_key

fractions = st.floats(0, 0.45)
names = st.text(max_size=20)


def test_split_of_a_name_never_changes():
    # Frozen values: another hash would put training documents of the shipped model into the held-out splits.
    found = [split_of(name, 0.3, 0.3) for name in ("json", "torch.nn", "numpy", "ast", "email.parser")]
    assert found == ["validation", "validation", "train", "test", "validation"]


@given(names, fractions, fractions, fractions)
def test_more_validation_data_moves_no_name_out_of_the_test_split(name, few, more, test):
    if split_of(name, few, test) == "test":
        assert split_of(name, more, test) == "test"


@given(names, st.integers(0, 5))
def test_hash_positions_lie_in_the_unit_interval(name, seed):
    assert 0 <= hash_position(name, seed) < 1


def test_shares_of_the_splits_are_the_fractions():
    found = [split_of(f"name {number}", 0.1, 0.2) for number in range(5000)]
    shares = [found.count(split) / 5000 for split in SPLITS]
    assert all(abs(share - expected) < 0.02 for share, expected in zip(shares, (0.7, 0.1, 0.2), strict=True))


def test_another_seed_is_another_split():
    splits = {seed: [split_of(str(number), 0.3, 0.3, seed) for number in range(50)] for seed in (0, 1)}
    assert splits[0] != splits[1]


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    assert check_fractions("corpus", 0.1, 0.2) == []
    assert [problem.key for problem in check_fractions("corpus", 0.5, 0.5)] == ["corpus.test_fraction"]
    assert [problem.key for problem in check_fractions("corpus", -0.1, 1.0)] == [
        "corpus.validation_fraction",
        "corpus.test_fraction",
    ]


def test_unknown_split_is_an_error_with_its_name():
    with pytest.raises(ValueError, match="'dev'"):
        check_split("dev")


def test_paragraphs_about_differently_named_things_share_a_key():
    one = "The output of `BertModel` is a tensor with 12 heads in it."
    other = "The output of `ViTModel` is a tensor\nwith 24 heads in it."
    assert paragraph_key(one) == paragraph_key(other)
    assert paragraph_key(one) != paragraph_key("The input of `BertModel` is a tensor with 12 heads in it.")


def test_short_and_code_paragraphs_count_in_full():
    assert paragraph_key("x = Foo(1)") != paragraph_key("x = Bar(1)")
    assert paragraph_key(">>> f( 1 )") == paragraph_key(">>> f(  1 )")


@given(st.lists(st.lists(st.sampled_from(["a b", "c", "d e f", "Gh 1", "long words that count here"]), max_size=6)))
def test_each_paragraph_is_kept_exactly_once_and_in_order(documents):
    kept = drop_repeated(["\n\n".join(document) for document in documents], set())
    paragraphs = [paragraph for document in kept for paragraph in document.split("\n\n") if paragraph]
    expected = list(dict.fromkeys(paragraph for document in documents for paragraph in document))
    assert paragraphs == expected


def test_paragraphs_already_seen_are_dropped():
    seen = {paragraph_key("known")}
    assert drop_repeated(["known\n\nnew", "new"], seen) == ["new", ""]
