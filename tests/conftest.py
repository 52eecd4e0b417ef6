import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from hypothesis import settings

settings.register_profile("fedbe", deadline=None, derandomize=True)
settings.load_profile("fedbe")
