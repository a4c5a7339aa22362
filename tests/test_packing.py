"""Packing, PackedBatch and the collator: every mask form there and back, and every input that does not fit."""

import pytest
import torch
from torch.utils.data import DataLoader

from bertfast import FlatteningCollator, PackedBatch, Packing, PackingCollator
from bertfast.packing import has_holes


def test_packs_valid_tokens_in_order_and_pads_them_back(mask):
    mask = torch.ones(3, 11, dtype=torch.int64) if mask is None else mask
    packing = Packing.from_mask(mask)
    rectangle = torch.arange(66.0).view(3, 11, 2) + 1
    packed = packing.pack(rectangle)
    assert torch.equal(packed, rectangle[mask.bool()])
    assert packing.lengths == tuple(mask.sum(1).tolist()) and packing.tokens == mask.sum()
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(packing.pad(packed, -1.0), rectangle.where(mask[..., None].bool(), torch.tensor(-1.0)))
    assert torch.equal(packing.position_ids(), torch.arange(11).expand(3, 11)[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float16, torch.uint8])
def test_a_mask_may_have_any_dtype(dtype):
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]]).to(dtype)
    assert Packing.from_mask(mask).cu_seqlens.tolist() == [0, 2, 3]


def test_a_mask_may_be_non_contiguous():
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]]).t()
    packing = Packing.from_mask(mask)
    assert torch.equal(packing.pack(torch.arange(6).view(2, 3)), torch.tensor([0, 1, 4, 5]))


def test_without_padding_packing_is_a_view():
    rectangle = torch.randn(2, 3, 4)
    for packing in (Packing.full(2, 3), Packing.from_mask(torch.ones(2, 3)), Packing.from_lengths([3, 3])):
        assert packing.indices is None
        packed = packing.pack(rectangle)
        assert packed.data_ptr() == rectangle.data_ptr() == packing.pad(packed).data_ptr()


@pytest.mark.parametrize("lengths", [[3, 1, 2], [0, 2], [2, 0], [0, 0], [4], []])
def test_lengths_and_right_padded_mask_say_the_same(lengths):
    a = Packing.from_lengths(lengths)
    longest = max(lengths, default=0)
    b = Packing.from_mask(torch.arange(longest)[None] < torch.tensor(lengths, dtype=torch.int64)[:, None])
    assert (a.batch, a.seq_len, a.lengths) == (b.batch, b.seq_len, b.lengths)
    assert torch.equal(a.cu_seqlens, b.cu_seqlens) and torch.equal(a.position_ids(), b.position_ids())
    tokens = torch.arange(a.tokens)
    assert torch.equal(a.pad(tokens), b.pad(tokens)) and a.pad(tokens).shape == (len(lengths), longest)


@pytest.mark.parametrize("lengths", [[3, 1, 2], [4, 4], [5], [2, 0, 1], []])
def test_all_tokens_in_one_row(lengths):
    packing = Packing.from_lengths(lengths)
    flat = packing.flat()
    assert (flat.batch, flat.seq_len, flat.lengths) == (1, sum(lengths), packing.lengths)
    assert flat.is_flat is (len(lengths) != 1) and not packing.is_flat
    row = torch.randn(1, sum(lengths), 3)
    assert torch.equal(flat.pack(row), row[0]) and torch.equal(flat.pad(row[0]), row)
    assert torch.equal(flat.position_ids(), packing.position_ids())
    counted = torch.rand(1, sum(lengths)) < 0.6
    parts = [c.cumsum(0) * c for c in counted[0].split(lengths)]
    assert torch.equal(flat.running_counts(counted), torch.cat(parts or [counted[0].long()]))


def test_running_counts_of_a_rectangle_count_padding_too():
    packing = Packing.from_mask(torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0]]))
    counted = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]]).bool()
    assert packing.running_counts(counted).tolist() == [2, 0, 3, 1, 3]


def test_holes():
    whole = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert not has_holes(torch.tensor(whole)) and not has_holes(torch.tensor(whole).bool())
    for row in ([1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1]):
        assert has_holes(torch.tensor([*whole, row]).float())


def test_gradients_go_there_and_back():
    packing = Packing.from_mask(torch.tensor([[1, 0, 1], [0, 0, 1]]))
    rectangle = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, rectangle)
    assert torch.autograd.gradcheck(packing.pad, packed)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3), ValueError, r"\(batch, seq_len\), not of shape \(3,\)"),
        (torch.ones(2, 1, 1, 3), ValueError, r"not of shape \(2, 1, 1, 3\)"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.tensor([[0.0, -1e4, 1.0]]), ValueError, "1 values that are neither 0 nor 1"),
        (torch.tensor([[2, 3, 1]]), ValueError, "2 values that are neither 0 nor 1"),
        (torch.tensor([[float("nan"), 1.0]]), ValueError, "neither 0 nor 1"),
    ],
)
def test_masks_that_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        Packing.from_mask(mask)


def test_tensors_and_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected \(2, 3, ...\), got a tensor of \(2, 4\)"):
        Packing.full(2, 3).pack(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="must not be negative"):
        Packing.from_lengths([2, -1])


def test_a_batch_of_lists():
    batch = PackedBatch.from_lists([[5, 6, 7], [8], []], token_type_ids=[[0, 1, 1], [0], []], labels=[1, 0, 2])
    assert batch.input_ids.tolist() == [5, 6, 7, 8] and batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.token_type_ids.tolist() == [0, 1, 1, 0] and batch.labels.tolist() == [1, 0, 2]
    assert batch.packing.lengths == (3, 1, 0) and batch.input_ids.dtype == torch.int64
    empty = PackedBatch.from_lists([])
    assert empty.input_ids.shape == (0,) and empty.input_ids.dtype == torch.int64 and empty.packing.batch == 0


def test_labels_by_token_or_by_sequence():
    by_token = PackedBatch.from_lists([[1, 2], [3]], labels=[[-100, 5], [6]], token_labels=True)
    assert by_token.labels.tolist() == [-100, 5, 6]
    assert PackedBatch.from_lists([[1, 2], [3]], labels=[0.5, 1.5]).labels.tolist() == [0.5, 1.5]
    assert PackedBatch.from_lists([[1, 2, 3], [3]], labels=[[0, 1], [1, 1]]).labels.tolist() == [[0, 1], [1, 1]]


def test_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="lengths of input_ids"):
        PackedBatch.from_lists([[1, 2]], token_type_ids=[[0]])
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens and 2 labels"):
        PackedBatch.from_lists([[1, 2], [3]], labels=[[0, 1], [0, 1]], token_labels=True)
    with pytest.raises(ValueError, match="1 labels for 2 sequences"):
        PackedBatch.from_lists([[1, 2], [3]], labels=[0])


def test_a_batch_moves_whole():
    batch = PackedBatch.from_lists([[5, 6], [7]], token_type_ids=[[0, 1], [0]], labels=[1, 0]).to("meta")
    tensors = (batch.input_ids, batch.position_ids, batch.token_type_ids, batch.labels)
    assert all(t.device.type == "meta" for t in (*tensors, batch.packing.cu_seqlens, batch.packing.indices))
    assert batch.packing.lengths == (2, 1)


def test_the_collator_in_a_data_loader():
    features = [
        {"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 1], "attention_mask": [1, 1, 1], "label": 1},
        {"input_ids": [4], "token_type_ids": [0], "attention_mask": [1], "label": 0},
    ]
    (batch,) = DataLoader(features, batch_size=2, collate_fn=PackingCollator())
    assert batch.input_ids.tolist() == [1, 2, 3, 4] and batch.packing.lengths == (3, 1)
    assert batch.token_type_ids.tolist() == [0, 0, 1, 0] and batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize("token_labels", [False, True])
def test_flattened_batches(token_labels):
    features = [{"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [7], "token_type_ids": [1]}]
    for feature, label in zip(features, ([3, -100], [4]) if token_labels else (0, 1), strict=True):
        feature["label"] = label
    found = FlatteningCollator(token_labels)(features)
    lists = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in found.items()}
    assert lists == {
        "input_ids": [[5, 6, 7]],
        "token_type_ids": [[0, 1, 1]],
        "labels": [[3, -100, 4]] if token_labels else [0, 1],
        "cu_seq_lens_q": [0, 2, 3],
        "cu_seq_lens_k": [0, 2, 3],
        "max_length_q": 2,
        "max_length_k": 2,
    }


def test_features_that_are_refused():
    collate = PackingCollator()
    with pytest.raises(ValueError, match="no features"):
        collate([])
    with pytest.raises(ValueError, match="overflow_to_sample_mapping"):
        collate([{"input_ids": [1], "overflow_to_sample_mapping": 0}])
    with pytest.raises(ValueError, match="padding=False"):
        collate([{"input_ids": [1, 0], "attention_mask": [1, 0]}])
