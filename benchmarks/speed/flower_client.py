"""The client app of Flower's side, in a module of its own so that worker processes import it."""

import time
from pathlib import Path

import torch
from bare import kept_model, load_model
from case import Case, client_rows, in_order, take_steps
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict


def client_app(case: Case, folder: Path, kept: bool) -> ClientApp:
    """Return the client app.

    Args:
        case: What to run.
        folder: Where its model and data are.
        kept: Whether a worker process keeps the model that it has loaded.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, context, case, folder, kept)

    return app


def reply(message: Message, context: Context, case: Case, folder: Path, kept: bool) -> Message:
    """Train the adapters that came with a message, and return the answer."""
    torch.set_num_threads(case.threads)
    model, trained = (kept_model if kept else load_model)(case, folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    rows = client_rows(folder)[int(context.node_config["partition-id"])]
    began = time.monotonic()
    steps = take_steps(model, list(trained.values()), in_order(rows, case.batch_size))
    metrics = MetricRecord({"num-examples": len(rows), "steps": steps, "began": began})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def peft_name(name: str) -> str:
    """Return the name of an adapter's tensor in a state dict of `peft`."""
    return "base_model.model." + name.replace(".default.", ".")
