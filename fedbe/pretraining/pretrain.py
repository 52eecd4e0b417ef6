"""Training a small causal language model from nothing, on the CPU: the base model that the quickstart ships."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine_schedule

from fedbe.corpora import SPLITS, Corpus, Described, InstalledDocumentation
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.seeding import derive_seed, generator, isolated_rng
from fedbe.storage.files import replacing, replacing_folder

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHECKPOINT, METRICS, SETTINGS, LATEST, FINISHED = "last.ckpt", "metrics.jsonl", "settings.json", "latest", "model"


@dataclass
class PretrainConfig:
    """Everything that decides what the pre-trained model becomes.

    Attributes:
        output: Folder to write: the finished ``model/``, the newest intermediate export in ``latest/``,
            ``metrics.jsonl`` and a checkpoint, from which a run that was stopped is continued.
        corpus: Text to train on; its validation split is scored at each interval, its test split at the end.
        seed: Seed of the initial weights and of the order of the text.
        vocabulary_size: Entries of the byte-level BPE vocabulary, the three special ones included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward layers.
        blocks: Number of transformer blocks.
        heads: Number of attention heads.
        key_value_heads: Number of key-value heads; divides ``heads``.
        sequence_length: Tokens of a training sequence.
        batch_size: Sequences of a step.
        steps: Optimizer steps in all; a multiple of ``interval``.
        interval: Steps between two evaluations, each with a checkpoint and an intermediate export.
        warmup_steps: Steps in which the learning rate rises linearly to its peak.
        learning_rate: Peak learning rate; a cosine then takes it down to a fiftieth of that.
        weight_decay: AdamW's decoupled weight decay of the matrices; vectors have none.
        validation_sequences: Most sequences of the validation split to score at an interval.
        threads: Threads that torch computes with.
    """

    output: str
    corpus: Corpus = field(default_factory=InstalledDocumentation)
    seed: int = 0
    vocabulary_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    blocks: int = 6
    heads: int = 4
    key_value_heads: int = 2
    sequence_length: int = 256
    batch_size: int = 8
    steps: int = 10000
    interval: int = 200
    warmup_steps: int = 200
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    validation_sequences: int = 64
    threads: int = 1

    def check(self) -> list[Problem]:
        """Return every mistake in the settings, the corpus and the output folder."""
        return [*_setting_problems(self), *self.corpus.check("corpus.init_args", Facts()), *_output_problems(self)]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a continued run must share with the one it continues."""
        free = {"output", "corpus", "threads"}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in free}


def _setting_problems(config: PretrainConfig) -> list[Problem]:
    positive = [name for name in config.settings if name not in ("seed", "warmup_steps", "weight_decay")]
    small = [name for name in positive if getattr(config, name) <= 0]
    if small:
        return [Problem(name, getattr(config, name), "must be above 0.") for name in small]
    rules = [
        ("vocabulary_size", config.vocabulary_size >= 259, "256 bytes and 3 special tokens need at least 259."),
        ("heads", config.hidden_size % (2 * config.heads) == 0, "`hidden_size` must be a multiple of twice this."),
        ("key_value_heads", config.heads % config.key_value_heads == 0, "must divide `heads`."),
        ("sequence_length", config.sequence_length > 1, "must be at least 2, to have a token to predict."),
        ("steps", config.steps % config.interval == 0, f"must be a multiple of `interval`, {config.interval}."),
    ]
    return [Problem(name, getattr(config, name), remedy) for name, holds, remedy in rules if not holds]


def _output_problems(config: PretrainConfig) -> list[Problem]:
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        return [Problem("output", config.output, "is a file; name a folder.")]
    if not folder.exists() or not any(folder.iterdir()):
        return []
    if not (folder / SETTINGS).is_file():
        return [Problem("output", config.output, "holds something else; name an empty or a new folder.")]
    try:
        before = dict(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        return [Problem("output", config.output, f"its {SETTINGS} cannot be read ({error}): name another folder.")]
    remedy = "the run in `output` was started with {}; use that, or name another folder."
    return [
        Problem(name, value, remedy.format(before.get(name)))
        for name, value in config.settings.items()
        if value != before.get(name)
    ]


def pretrain(config: PretrainConfig) -> Path:
    """Train tokenizer and model, or continue where a run was stopped, and return the folder of the finished model.

    Raises:
        ConfigError: With every mistake found; nothing has been written then.
    """
    if problems := config.check():
        raise ConfigError(*problems)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(config.threads)
    texts = {split: _texts(config.corpus, split) for split in SPLITS}
    output = Path(config.output)
    continued = (output / CHECKPOINT).is_file()
    if continued:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output / LATEST, trust_remote_code=False)
    else:
        tokenizer = train_tokenizer(texts["train"], config.vocabulary_size, config.sequence_length)
    streams = {split: token_stream(tokenizer, documents) for split, documents in texts.items()}
    if problems := _stream_problems(streams, config):
        raise ConfigError(*problems)
    output.mkdir(parents=True, exist_ok=True)
    (output / SETTINGS).write_text(json.dumps(config.settings, indent=2) + "\n")
    module = PretrainModule(build_model(config, tokenizer), config)
    trainer = _trainer(config, Exports(output, tokenizer))
    checkpoint = output / CHECKPOINT if continued else None
    trainer.fit(module, Windows(streams, config), ckpt_path=checkpoint, weights_only=True)
    test = held_out_score(module, streams["test"])
    export(module.model, tokenizer, output / FINISHED, model_card(module, texts, streams, test))
    return output / FINISHED


def _texts(corpus: Corpus, split: str) -> list[str]:
    rows = corpus.load(split)
    if "text" not in rows.column_names:
        remedy = f"its split `{split}` has no column `text`, only {', '.join(rows.column_names)}; rename one."
        raise ConfigError(Problem("corpus", type(corpus).__name__, remedy))
    return [str(text) for text in rows["text"]]


def _stream_problems(streams: Mapping[str, Tensor], config: PretrainConfig) -> list[Problem]:
    remedy = "its split `{}` has {} tokens, less than one sequence; give it more text."
    return [
        Problem("corpus", type(config.corpus).__name__, remedy.format(split, len(stream)))
        for split, stream in streams.items()
        if len(stream) < config.sequence_length
    ]


def _trainer(config: PretrainConfig, exports: Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=config.steps,
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[exports],
    )


def train_tokenizer(texts: list[str], vocabulary_size: int, sequence_length: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on ``texts``; any text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=sequence_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return all texts one after another as token ids, each between the begin and the end token. Shape ``[n]``."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    parts = [torch.tensor([bos, *item.ids, eos], dtype=torch.int32) for item in encoded]
    return torch.cat([torch.empty(0, dtype=torch.int32), *parts])


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model in float32, its weights drawn from the run's seed."""
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.blocks,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        max_position_embeddings=config.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with isolated_rng(derive_seed(config.seed, "weights")):
        return LlamaForCausalLM(architecture)


class PretrainModule(L.LightningModule):
    """Next-token training of a causal language model."""

    def __init__(self, model: LlamaForCausalLM, config: PretrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the mean next-token cross-entropy, in nats, of a batch of sequences."""
        logits, targets = self.predict(batch[0])
        loss = cross_entropy(logits, targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        """Log held-out cross-entropy in nats and next-token accuracy."""
        logits, targets = self.predict(batch[0])
        accuracy = (logits.argmax(-1) == targets).float().mean()
        values = {"validation_loss": cross_entropy(logits, targets), "validation_accuracy": accuracy}
        self.log_dict(values, batch_size=len(batch[0]))

    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of each next token, ``[b·(s-1), vocabulary]``, and that token, ``[b·(s-1)]``."""
        logits = self.model(input_ids=tokens, use_cache=False).logits  # [b, s, vocabulary]
        return logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a linear warm-up and a cosine down to a fiftieth of the peak learning rate."""
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True)
        schedule = cosine_schedule(optimizer, self.config.warmup_steps, self.config.steps, min_lr_rate=0.02)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Windows(L.LightningDataModule):
    """Sequences cut from a stream of tokens at random places; an epoch is one interval of the run.

    The places of an epoch follow from the seed and the step it starts at, so that a continued run sees the same.
    """

    def __init__(self, streams: Mapping[str, Tensor], config: PretrainConfig) -> None:
        super().__init__()
        self.streams, self.config = streams, config

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the sequences of the interval that starts now."""
        stream, length = self.streams["train"], self.config.sequence_length
        step = 0 if self.trainer is None else self.trainer.global_step
        places = generator(self.config.seed, "windows", step)
        count = self.config.interval * self.config.batch_size
        starts = torch.randint(len(stream) - length + 1, (count, 1), generator=places)
        return self._loader(stream[starts + torch.arange(length)])

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return sequences spread evenly over the validation stream."""
        sequences = consecutive(self.streams["validation"], self.config.sequence_length)
        every = max(1, len(sequences) // self.config.validation_sequences)
        return self._loader(sequences[::every][: self.config.validation_sequences])

    def _loader(self, sequences: Tensor) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(sequences.long()), batch_size=self.config.batch_size)


def consecutive(stream: Tensor, length: int) -> Tensor:
    """Return a stream cut into sequences without overlap, the incomplete last one left out. Shape ``[n, length]``."""
    return stream.unfold(0, length, length)


@torch.no_grad()
def held_out_score(module: PretrainModule, stream: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy, in nats, and accuracy of the next token over a whole stream."""
    module.eval()
    loss, hits, count = 0.0, 0, 0
    for batch in torch.split(consecutive(stream, module.config.sequence_length), module.config.batch_size):
        logits, targets = module.predict(batch.long())
        loss += cross_entropy(logits, targets, reduction="sum").item()
        hits += int((logits.argmax(-1) == targets).sum())
        count += len(targets)
    return loss / count, hits / count


class Exports(Callback):
    """At each interval, writes a line of metrics, a checkpoint, and an export that others can load meanwhile."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called when an interval has been trained and scored."""
        values = {name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()}
        if "validation_loss" not in values:  # a continued run ends the interval of its checkpoint once more
            return
        line = {"step": trainer.global_step, **values, "seconds": round(time.monotonic() - self._since, 1)}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        export(pl_module.model, self.tokenizer, self.folder / LATEST)
        with replacing(self.folder / CHECKPOINT) as partial:
            trainer.save_checkpoint(partial)


def export(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str | None = None) -> None:
    """Write model, tokenizer and model card in place of ``folder``, whole or not at all."""
    with replacing_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")


_CARD = """# {name}

A Llama-architecture causal language model of {parameters:,} parameters, trained from nothing on a CPU, so that `fedbe`
has a pre-trained base model without a download. It continues technical English a little and is no use for anything
else.

- Architecture: hidden size {hidden_size}, {blocks} blocks, {heads} heads ({key_value_heads} for keys and values),
  feed-forward {intermediate_size}, tied embeddings, byte-level BPE of {vocabulary_size} entries, float32.
- Training: {steps} steps of {batch_size} sequences of {sequence_length} tokens, AdamW, peak learning rate
  {learning_rate}, cosine with {warmup_steps} steps of warm-up, weight decay {weight_decay}, seed {seed}.
- Test documents, never trained on: cross-entropy {loss:.3f} nats a token, next-token accuracy {accuracy:.3f}.
- Rebuild: `fedbe pretrain --config configs/pretrain_micro.yaml`. Other versions of the packages below are another
  corpus, and give a slightly different model.

| split | documents | characters | tokens |
|---|---:|---:|---:|
{table}

## Text and licences

{sources}

The weights are released under Apache-2.0, like `fedbe`. The texts are not part of the model's files.
"""


def model_card(
    module: PretrainModule, texts: Mapping[str, list[str]], streams: Mapping[str, Tensor], test: tuple[float, float]
) -> str:
    """Return the model card: what the model is, what it was trained on, how good it is, how to build it again."""
    config = module.config
    rows = [
        f"| {split} | {len(texts[split]):,} | {sum(map(len, texts[split])):,} | {len(stream):,} |"
        for split, stream in streams.items()
    ]
    described = config.corpus.describe() if isinstance(config.corpus, Described) else type(config.corpus).__name__
    return _CARD.format(
        name=Path(config.output).name,
        parameters=module.model.num_parameters(),
        loss=test[0],
        accuracy=test[1],
        table="\n".join(rows),
        sources=described,
        **config.settings,
    )
