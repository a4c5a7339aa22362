"""The whole encoder on the GPU kernels of each backend: on a GPU where there is one, and without one in Triton's
interpreter and on the emulated GPU. Against the same model in float64 on the reference, with the same dropout masks.
"""

import copy

import parity
import pytest
import torch
from small_models import draw_weights

import bertfast
from bertfast import PackedBatch, backend

LENGTHS = (33, 0, 1, 64, 17)
SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 320,
    "max_position_embeddings": 140,
}
HALF = [torch.bfloat16, torch.float16]


def make_model(dropout: float = 0.0) -> bertfast.BertModel:
    """A model whose weights every precision holds exactly; training, dropout and all, unless dropout is 0."""
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = bertfast.BertModel(bertfast.BertConfig(**SETTINGS, **dropouts), add_pooling_layer=False)
    draw_weights(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().half().float()
    return model.train(dropout > 0)


def make_batch(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    ids = [torch.randint(0, SETTINGS["vocab_size"], (n,)).tolist() for n in lengths]
    return PackedBatch.from_lists(ids, [[i % 2 for i in range(n)] for n in lengths])


def forward_and_backward(model: bertfast.BertModel, dtype: torch.dtype, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """The last hidden state and every gradient; the seeds of the dropout masks are drawn alike every time."""
    model = copy.deepcopy(model).to(dtype)
    torch.manual_seed(1)
    out = model(batch).last_hidden_state
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16().half().to(out)
    gradients = torch.autograd.grad(out, list(model.parameters()), dout)
    return {"out": out.detach(), **dict(zip((n for n, _ in model.named_parameters()), gradients, strict=True))}


def check_against_the_reference(model: bertfast.BertModel, dtype: torch.dtype, batch: PackedBatch, device: str) -> None:
    """Run on the implementation that is forced, and compare by the policy for whole encoders."""
    model, batch = model.to(device), batch.to(device)
    actual = forward_and_backward(model, dtype, batch)
    with backend.use("reference"):
        gold, baseline = (forward_and_backward(model, d, batch) for d in (torch.float64, dtype))
    for name, value in actual.items():
        assert value.dtype is dtype, name
        tensors = value, gold[name], baseline[name]
        if name.endswith("key.bias"):  # the softmax does not see it: its gradient is 0, and the query's its scale
            query = name.replace("key", "query")
            tensors = [torch.cat((run[query], run[name])) for run in (actual, gold, baseline)]
        # The baseline is the reference, which rounds less than plain PyTorch does: only between ops, never inside one.
        parity.check(*tensors, factor=3.0, mean_factor=2.0, rows=batch.packing.tokens, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_forward_and_backward_in_triton(triton_device, dropout, dtype):
    check_against_the_reference(make_model(dropout), dtype, make_batch(), triton_device)


def test_long_sequences_in_triton(triton_device):
    check_against_the_reference(make_model(0.1), torch.bfloat16, make_batch((140, 5)), triton_device)


@pytest.mark.parametrize("dtype", HALF)
def test_inference_in_cuda(cuda_device, dtype):
    model, batch = make_model().to(cuda_device, dtype), make_batch().to(cuda_device)
    with torch.no_grad():
        actual = model(batch).last_hidden_state
        with backend.use("reference"):
            baseline, gold = model(batch).last_hidden_state, model.double()(batch).last_hidden_state
    parity.check(actual, gold, baseline, factor=3.0)


def test_patched_models_in_triton(triton_device):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SETTINGS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(config).eval()
    draw_weights(model)
    model.to(triton_device)
    ids = torch.randint(1, SETTINGS["vocab_size"], (3, 40), device=triton_device)
    mask, labels = torch.ones_like(ids), torch.tensor([0, 1, 0], device=triton_device)
    mask[1, 7:] = mask[2, 33:] = 0
    stock = copy.deepcopy(model).double()
    gold = stock(ids, attention_mask=mask, labels=labels)
    gold.loss.backward()
    bertfast.patch(model)
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    parity.check(out.logits.detach(), gold.logits.detach(), rows=9)
    gradients = {n: p.grad for n, p in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):
            parity.check(parameter.grad, gradients[name], rows=80, name=name)
    (report,) = bertfast.explain(model).backbones
    assert report.calls["packed"] == 1 and {o["backend"] for o in report.ops.values()} == {"triton"}
