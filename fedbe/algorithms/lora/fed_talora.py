"""Fed-TaLoRA: one task-agnostic adapter for a sequence of tasks, calibrated by the residual of its aggregation."""

from fedbe.algorithms.lora.fedex_lora import FedExLoRA


class FedTaLoRA(FedExLoRA):
    """Train one adapter in attention and feed-forward for all tasks, and calibrate W₀ by the residual of averaging.

    The rule is that of `FedExLoRA`, W₀ ← W₀ + s(Σ p_k B_k A_k − B̄Ā), clients going on from (B̄, Ā); what is its own is
    that the same adapter serves every task of a sequence, without task identities. In a single task the two are one.

    Source: Fed-TaLoRA (arXiv 2505.12318): one adapter for all tasks, calibrated by a residual (C); its formula is not
    public and is our reading of its description (R).
    """
