"""How tensors lie in memory beside one another."""

from collections.abc import Sequence

from torch import Tensor


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as a single one over the same memory, (sum of N_i, ...); None where they are not dense neighbours.

    They are where each begins at the address at which the one before it ends, all in one storage, as query, key and
    value are in a model that laid them so. tensors: (N_i, ...), which differ in N_i alone.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())
