"""The page on data of one's own: every file and command of it, with a tiny model in place of the base."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedbe.cli.main import main

PAGE = (Path(__file__).parent.parent / "docs" / "your_data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line.split()[1:] for line in re.findall(r"^fedbe .*$", PAGE, re.MULTILINE)]
CHAT = (
    "{% if tools %}{{ '<|tools|>' }}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}{{ '<|call|>' }}"
    "{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def base(folder: Path) -> None:
    """Write a tiny Llama with a chat template, and its tokenizer of bytes."""
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>", "<|call|>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "seen"),
    [("hospitals", ["Charité", "→ cardiology"]), ("calls", ["3a", "⟦<|call|>", "⟦Dr Stein.</s>⟧"])],
)
def test_the_page_goes_from_a_file_to_a_model_that_is_served(tmp_path, monkeypatch, capsys, name, seen):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    base(tmp_path / "base")
    for file, text in FILES.items():
        Path(file).write_text(text, encoding="utf-8")
    rows = FILES["charite.csv"].splitlines()
    Path("validation.csv").write_text(FILES["st_marys.csv"], encoding="utf-8")
    held_out = [dict(zip(rows[0].split(";"), row.split(";"), strict=True)) for row in rows[1:]]
    Path("test.jsonl").write_text("\n".join(map(json.dumps, held_out)), encoding="utf-8")
    commands = [command for command in COMMANDS if f"{name}.yaml" in command]
    assert [command[0] for command in commands] == ["partition", "fit"]
    assert main(commands[0]) == 0
    shown = capsys.readouterr().out
    assert [word for word in seen if word not in shown] == []
    assert main(commands[1]) == 0
    served = subprocess.run([sys.executable, f"serve_{name}.py"], capture_output=True, text=True, check=True)
    assert "neurology" in served.stdout or "cardiology" in served.stdout or "assistant" in served.stdout
