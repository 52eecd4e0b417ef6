import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbe.seeding import derive_seed, generator, isolated_rng

parts = st.lists(st.one_of(st.text(max_size=5), st.integers(-5, 5)), max_size=3)


@given(st.integers(0, 10), parts, st.integers(0, 10), parts)
def test_seeds_are_equal_only_for_equal_purposes(seed, purpose, other_seed, other_purpose):
    same = (seed, purpose) == (other_seed, other_purpose)
    assert (derive_seed(seed, *purpose) == derive_seed(other_seed, *other_purpose)) == same


def test_a_number_and_its_text_are_different_purposes():
    assert derive_seed(0, 1) != derive_seed(0, "1")


def test_generator_repeats_itself():
    draws = [torch.rand(4, generator=generator(3, "cohort", 7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_isolated_rng_depends_on_its_seed_alone_and_leaves_the_global_generator_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with isolated_rng(5):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with isolated_rng(5):
        assert torch.equal(torch.rand(3), inside)
