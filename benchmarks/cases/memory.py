"""Memory between cases."""

import gc
import sys

import torch


def release() -> None:
    """Give memory back between cases."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
