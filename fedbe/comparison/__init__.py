"""Several arms under one budget: who learns what, who forgets what, at what cost."""

from fedbe.comparison.compare import compare, compare_runs
from fedbe.comparison.config import ComparisonConfig, read_comparison

__all__ = ["ComparisonConfig", "compare", "compare_runs", "read_comparison"]
