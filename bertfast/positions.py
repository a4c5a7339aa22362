"""The position of each token, as the families of transformers count it."""

import torch
from torch import Tensor, nn

from bertfast.architectures import Family
from bertfast.packing import Packing


def position_ids(embeddings: nn.Module, family: Family, packing: Packing, input_ids: Tensor | None) -> Tensor | None:
    """(tokens,) int64 for these (batch, seq_len) ids, or for words that have none; None beyond the model's positions.

    "columns": the entries of the model's own buffer for the columns that the tokens stand in. "running": the padding
    token's id plus the number of tokens other than the padding token in the sequence so far; the padding token itself
    gets its id (Ott et al., fairseq, which RoBERTa was made with).
    """
    if family.positions == "running":
        padding = embeddings.__dict__.get("padding_idx")
        if padding is None:
            return None
        shape, device = (packing.batch, packing.seq_len), packing.cu_seqlens.device
        counted = torch.ones(shape, dtype=torch.bool, device=device) if input_ids is None else input_ids != padding
        return packing.running_counts(counted) + padding
    buffer = embeddings._buffers.get("position_ids")
    longest = packing.max_seqlen if packing.is_flat else packing.seq_len
    if buffer is None or longest > buffer.shape[1]:
        return None
    if packing.batch == 1 and packing.indices is None and not packing.is_flat:
        return buffer[0, : packing.seq_len]
    return buffer[0].index_select(0, packing.position_ids())
