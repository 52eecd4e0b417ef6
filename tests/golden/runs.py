"""Runs a case by the command line, reads what its folder says, and compares that with what was recorded."""

import hashlib
import json
import math
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
import yaml
from safetensors.torch import load_file
from stand_ins import MODELS, bert, encoder, language_model, saved, with_local_material
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedbe.cli import main
from golden.cases import CASES

LIVELY = {"initializer_range": 0.15}
"""Weights large enough that attention looks at something, and learning rates move predictions."""
ENCODER = {
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **LIVELY,
}
GOLDEN = Path(__file__).parent / "golden.json"
TIMES = {"wall_seconds", "evaluation_seconds", "client_seconds", "simulated_seconds"}
SIMULATED = {"client_seconds", "simulated_seconds"}
ELSEWHERE = {"peak_rss_bytes", "versions", "engine", "note"}
"""What the summary says of the machine, of how it was used, and in prose."""


def machine() -> dict[str, str]:
    """What decides a result to the bit."""
    path = Path("/proc/cpuinfo")
    pairs = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line] if path.exists() else []
    told = {name.strip(): value.strip() for name, value in reversed(pairs)}  # of the first of the processors
    known = [told[name] for name in ("model name", "cpu family", "model", "stepping") if name in told]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": ", ".join(known) or platform.processor(),
    }


def make_stand_ins(folder: Path) -> None:
    """Write what the words of cases mean by STAND_INS: tiny models, text, and shipped configurations that load them."""
    models = {
        "llama": language_model(LlamaForCausalLM, partial(LlamaConfig, **LIVELY)),
        "dropout": language_model(LlamaForCausalLM, partial(LlamaConfig, attention_dropout=0.2, **LIVELY)),
        "bert": bert,
        "encoder": encoder(BertForSequenceClassification, BertConfig(**ENCODER)),
    }
    for name, make in models.items():
        with seeded():
            make(folder / name)
    saved(folder / "rows", with_images=False)
    for name in MODELS:
        (folder / "shipped" / name).mkdir(parents=True)
        with seeded():
            config = with_local_material(name, folder / "shipped" / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_case(name: str, stand_ins: Path, folder: Path) -> dict:
    """Run a case in a new folder, and return what came of it, without what differs from one time to the next."""
    words = [word.replace("STAND_INS", str(stand_ins)) for word in CASES[name]]
    with one_thread(), patch("matplotlib.figure.Figure.savefig"):
        code = main(["fit", *words, f"--output={folder}"])
    assert code == 0, f"{name} ended with {code}"
    outcome = read(folder)
    shutil.rmtree(folder)
    return outcome


def read(folder: Path) -> dict:
    clocked = yaml.safe_load((folder / "config.yaml").read_text())["clock"] is not None
    left_out = ELSEWHERE | (TIMES - SIMULATED if clocked else TIMES)
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    files = sorted((folder / "model").glob("*.safetensors"))
    tensors = {name: t for path in files for name, t in sorted(load_file(path).items())}
    return {
        "rounds": without(rounds, left_out),
        "summary": without(summary, left_out),
        "model": {name: described(tensor) for name, tensor in tensors.items()},
    }


def without(value, names: set[str]):
    if isinstance(value, dict):
        return {name: without(inner, names) for name, inner in value.items() if name not in names}
    return [without(inner, names) for inner in value] if isinstance(value, list) else value


def described(tensor: torch.Tensor) -> dict:
    """A tensor's digest, and in numbers what it is like."""
    flat = tensor.contiguous().reshape(-1)
    values = flat.double()
    return {
        "digest": hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sum": rounded(values.sum().item()),
        "norm": rounded(values.norm().item()),
        "first": [rounded(value) for value in values[:3].tolist()],
    }


def rounded(value: float) -> float:
    """Six digits, which is more than other machines agree on."""
    return float(f"{value:.6g}")


def differences(recorded: dict, found: dict, exact: bool, rough: bool = False) -> dict[str, str]:
    """Return where a case's outcome is not what was recorded, path → how; what has been added is no difference.

    Args:
        recorded: The golden outcome.
        found: The outcome now.
        exact: Whether they are to be equal to the bit.
        rough: Whether tensors that are not to be equal to the bit are to be compared by their kind only.
    """
    told = {}
    for part in ("rounds", "summary"):
        told |= dict(_differences(part, recorded[part], found[part], exact))
    if recorded["model"].keys() != found["model"].keys():
        told["model"] = f"{list(recorded['model'])} became {list(found['model'])}"
    for name in recorded["model"].keys() & found["model"].keys():
        before, now = recorded["model"][name], found["model"][name]
        kinds = [(kind["dtype"], kind["shape"]) for kind in (before, now)]
        near = kinds[0] == kinds[1] if rough else _alike(before, now)
        if not (before["digest"] == now["digest"] if exact else near):
            told[f"model/{name}"] = f"{before} became {now}"
    return told


def _differences(path: str, recorded, found, exact: bool) -> Iterator[tuple[str, str]]:
    if isinstance(recorded, dict) and isinstance(found, dict):
        for name, value in recorded.items():
            if name in found:
                yield from _differences(f"{path}/{name}", value, found[name], exact)
            else:
                yield f"{path}/{name}", "is missing"
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, pair in enumerate(zip(recorded, found, strict=True)):
            yield from _differences(f"{path}/{index}", *pair, exact)
    elif not _same(recorded, found, exact):
        yield path, f"{recorded!r} became {found!r}"


def _same(recorded, found, exact: bool) -> bool:
    if isinstance(recorded, float) and isinstance(found, float):
        if math.isnan(recorded):
            return math.isnan(found)
        return recorded == found or (not exact and math.isclose(recorded, found, rel_tol=5e-2, abs_tol=2e-2))
    if not exact and isinstance(recorded, str) and isinstance(found, str):
        return re.sub(r"[\d.]+", "#", recorded) == re.sub(r"[\d.]+", "#", found)  # prose with rounded numbers in it
    return type(recorded) is type(found) and recorded == found


def _alike(recorded: dict, found: dict) -> bool:
    """Whether two tensors are of one kind, and equal up to what Adam makes of gradients that are rounding errors."""
    if any(recorded[key] != found[key] for key in ("dtype", "shape")):
        return False
    count = math.prod(recorded["shape"])
    usual = recorded["norm"] / max(1, count) ** 0.5
    each = 1e-2 * usual + 1e-3
    return (
        abs(recorded["norm"] - found["norm"]) <= each * count**0.5
        and abs(recorded["sum"] - found["sum"]) <= each * count
        and all(abs(a - b) <= 5e-2 * usual + 1e-3 for a, b in zip(recorded["first"], found["first"], strict=True))
    )


def load_golden() -> tuple[dict[str, str], dict[str, dict]]:
    """Return the machine that the golden values are from, and each case's."""
    if not GOLDEN.exists():
        return machine(), {}
    stored = json.loads(GOLDEN.read_text())
    for case in stored["cases"].values():
        case["model"] = {name: {"digest": d, **stored["tensors"][d]} for name, d in case["model"].items()}
    return stored["machine"], stored["cases"]


def save_golden(made_on: dict[str, str], cases: dict[str, dict]) -> None:
    """Write the golden file, a line for each round, each figure of a summary and each tensor; equal tensors once."""
    tensors = {}
    for case in cases.values():
        for kind in case["model"].values():
            tensors[kind["digest"]] = {name: value for name, value in kind.items() if name != "digest"}
    stored = {name: _stored(case) for name, case in cases.items()}
    parts = {
        "machine": _written(made_on, 0, " "),
        "cases": _written(stored, 2, " "),
        "tensors": _written(dict(sorted(tensors.items())), 0, " "),
    }
    GOLDEN.write_text("{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n")


def _stored(case: dict) -> dict:
    return case | {"model": {name: kind["digest"] for name, kind in case["model"].items()}}


def _written(value, depth: int, indent: str = "") -> str:
    """JSON with the values down to `depth` on lines of their own."""
    if depth < 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"))
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(name)}: {_written(item, depth - 1, inner)}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _written(item, depth - 1, inner) for item in value) + f"\n{indent}]"
