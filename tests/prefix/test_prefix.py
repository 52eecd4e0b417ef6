import resource
import shutil
import subprocess

import pytest
import torch
from families import FAMILIES, PAD, VOCABULARY, batch, tiny
from toy import resumed, toy_loop

from fedbe.algorithms import BlockExpansion, FedAvg, FedIT, Gated
from fedbe.callbacks import CheckpointCallback
from fedbe.errors import ConfigError, Facts
from fedbe.expansion import stack_parameter_names
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.base_model import forward_options
from fedbe.objectives import Anchor
from fedbe.prefix.reuse import Prefix, frozen_blocks, reuse_prefix
from fedbe.prefix.store import PrefixReuse, Store
from fedbe.seeding import generator


def padded_on_the_right(model):
    given = batch(model)
    if "attention_mask" not in given:
        return given
    lengths = given["attention_mask"].sum(1)
    mask = (torch.arange(given["attention_mask"].shape[1]) < lengths[:, None]).long()
    chance = torch.randint(5, VOCABULARY, mask.shape, generator=generator(0, "tokens"))
    return {"input_ids": torch.where(mask.bool(), chance, PAD), "attention_mask": mask}


def logits(model):
    """Logits at real tokens; what a model says at padding means nothing."""
    given = padded_on_the_right(model)
    output = model(**given, **forward_options(model)).logits
    whole = output.dim() != 3 or "attention_mask" not in given
    return output if whole else output[given["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_stay_what_they_were_in_every_family(family):
    model = tiny(family)
    changing = stack_parameter_names(model)[2]
    parameters = [model.get_parameter(name) for name in changing]

    def outcome():
        output = logits(model)
        return output.detach(), torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)

    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    expected = outcome()
    prefix = reuse_prefix(model, changing, Store(2**20), padded_on_the_right(model))
    assert len(prefix.blocks) == 2
    for _ in range(2):
        torch.testing.assert_close(outcome(), expected, rtol=1e-3, atol=1e-5)
    assert prefix.store.hits > 0 and prefix.store.misses == 0


def test_padding_on_the_left_is_computed_as_always():
    model = tiny("llama")
    expected = model(**batch(model)).logits
    prefix = reuse_prefix(model, stack_parameter_names(model)[2], Store(2**20), batch(model))
    assert torch.equal(model(**batch(model), **forward_options(model)).logits, expected)
    assert prefix.store.hits == prefix.store.misses == 0


def test_blocks_below_really_do_not_run_again():
    model = tiny("llama")
    prefix = reuse_prefix(model, stack_parameter_names(model)[3], Store(2**20), padded_on_the_right(model))
    ran = []
    for index, block in enumerate(find_blocks(model).blocks):
        block.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    logits(model)
    assert ran == [3] and prefix.store.hits == len(batch(model)["input_ids"])


def toy(folder, algorithm, prefix, **options):
    loop = toy_loop(folder, algorithm=algorithm, prefix=prefix, rounds=3, **options)
    loop.run()
    return loop


def assert_near(first, second):
    states = first.server.state, second.server.state
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=2e-4)
    losses = [[r["downstream"]["loss"] for r in loop.history] for loop in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("gib", [1.0, 2e-6])
def test_a_run_comes_to_the_same_result_also_where_there_is_too_little_room(tmp_path, on_disk, gib):
    plain = toy(tmp_path / "a", BlockExpansion([2]), None)
    reused = toy(tmp_path / "b", BlockExpansion([2]), PrefixReuse(gib, on_disk, tmp_path))
    assert_near(plain, reused)
    figures = reused.summary["prefix"]
    assert figures["blocks"] == 3 and figures["bytes"] <= gib * 2**30 and plain.summary["prefix"] is None
    assert (figures["known"] > 0.5) == (gib == 1.0)
    assert not list(tmp_path.glob("fedbe-prefix-*"))


@pytest.mark.parametrize(
    ("algorithm", "blocks"),
    [
        (lambda: BlockExpansion([1, 2]), 2),
        (lambda: FedIT(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", first_block=2), 2),
        (lambda: Gated(BlockExpansion([2]), sequences=4, sequence_length=8), 1),
    ],
)
def test_methods_that_leave_the_lower_part_alone_come_to_the_same_result(tmp_path, algorithm, blocks):
    plain, reused = toy(tmp_path / "a", algorithm(), None), toy(tmp_path / "b", algorithm(), PrefixReuse())
    assert_near(plain, reused)
    assert reused.summary["prefix"]["blocks"] == blocks


def test_the_anchor_s_text_is_reused_too(tmp_path):
    def run(name, prefix):
        anchor = Anchor(sequences=4, sequence_length=8)
        loop = toy_loop(tmp_path / name, algorithm=BlockExpansion([2]), prefix=prefix, rounds=3, objective=anchor)
        loop.run()
        return loop

    assert_near(run("a", None), run("b", PrefixReuse()))


def test_a_run_that_is_continued_ends_at_the_same_bits(tmp_path):
    def make(name):
        return toy_loop(
            tmp_path / name, algorithm=BlockExpansion([2]), prefix=PrefixReuse(), rounds=3, cohort=2,
            callbacks=[CheckpointCallback()],
        )  # fmt: skip

    whole, half = make("whole"), make("half")
    whole.run()
    half.setup()
    half.on_run_start()
    half.advance()
    rest = resumed(make("half"))
    while not rest.done:
        rest.advance()
    assert all(torch.equal(tensor, rest.server.state[name]) for name, tensor in whole.server.state.items())


def test_where_the_lowest_part_is_trained_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the lowest part of this model is trained"):
        toy(tmp_path / "run", FedAvg(), PrefixReuse())


def test_what_lies_below_all_that_changes_is_counted_by_names():
    model = tiny("llama")
    blocks = stack_parameter_names(model)
    assert [frozen_blocks(model, names) for names in blocks] == [0, 1, 2, 3]
    assert frozen_blocks(model, [*blocks[3], "model.embed_tokens.weight"]) == 0
    assert frozen_blocks(model, ()) == 4


def test_a_store_gives_back_what_it_got_and_refuses_what_does_not_fit(tmp_path):
    for store in (Store(100), Store(100, tmp_path)):
        first, second = torch.randn(3, 4), torch.randn(2, 3).bfloat16()
        assert store.put(b"a", first) and store.put(b"b", second) and not store.put(b"c", first)
        assert torch.equal(store.get(b"a"), first) and torch.equal(store.get(b"b"), second)
        assert store.get(b"c") is None and len(store) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the store may still hold its file


def test_a_full_disk_keeps_what_it_has_and_says_so_once(small_disk, caplog):
    store = Store(2**20, small_disk)
    tensors = [torch.full((1000,), float(index)) for index in range(100)]
    kept = [store.put(bytes([index]), tensor) for index, tensor in enumerate(tensors)]
    assert kept == sorted(kept, reverse=True) and 10 <= sum(kept) <= 16
    for index, was_kept in enumerate(kept):
        found = store.get(bytes([index]))
        assert torch.equal(found, tensors[index]) if was_kept else found is None
    (record,) = caplog.records
    assert "No space left on device" in record.message and str(small_disk) in record.message


def test_a_run_goes_on_when_the_disk_is_full(small_disk, tmp_path):
    plain = toy(tmp_path / "a", BlockExpansion([2]), None)
    reused = toy(tmp_path / "b", BlockExpansion([2]), PrefixReuse(0.001, True, small_disk))
    assert_near(plain, reused)
    assert 0 < reused.summary["prefix"]["known"] < 1


def test_a_file_that_may_not_be_made_is_a_mistake_of_the_configuration(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(ConfigError, match=r"gib = 0\.001: there is no room for this in .* \(File too large\)"):
            PrefixReuse(0.001, on_disk=True, folder=tmp_path).store()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_parts_of_a_store_on_disk_are_filled_side_by_side(tmp_path):
    store = Store(2**16, tmp_path, parts=2)
    assert store.put(b"a", torch.ones(100))
    store.join(1)
    assert store.put(b"b", 2 * torch.ones(100)) and store.put(b"c", 3 * torch.ones(100))
    assert [store.get(key).mean().item() for key in (b"a", b"b", b"c")] == [1, 2, 3]


def test_figures_count_on_from_where_a_run_was_continued(tmp_path):
    def make(name):
        return toy_loop(
            tmp_path / name, algorithm=BlockExpansion([2]), prefix=PrefixReuse(), rounds=3,
            callbacks=[CheckpointCallback()],
        )  # fmt: skip

    whole, half = make("whole"), make("half")
    whole.run()
    half.setup()
    half.on_run_start()
    half.advance()
    half.advance()
    counted = half.engine.prefix.figures["sequences"]
    rest = resumed(make("half"))
    assert rest.engine.prefix.figures["sequences"] == counted > 0
    while not rest.done:
        rest.advance()
    rest.on_run_end()
    assert rest.summary["prefix"] == whole.summary["prefix"] and whole.summary["prefix"]["known"] > 0


def test_a_model_that_drops_below_computes_everything():
    model = tiny("bert")
    prefix = Prefix(model, 2, Store(2**20))
    model.train()
    model(**batch(model))
    assert prefix.store.hits == prefix.store.misses == 0


def test_numbers_out_of_range_are_named(tmp_path):
    problems = PrefixReuse(gib=0, folder=tmp_path / "none").check("prefix", Facts())
    assert [problem.key for problem in problems] == ["prefix.gib", "prefix.folder"]
