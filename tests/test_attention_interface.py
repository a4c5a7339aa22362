"""attn_implementation="bertfast" against transformers' sdpa, with large weights; and that the packed op ran."""

import copy
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import parity
import pytest
import torch
from small_models import SETTINGS, draw_weights, make_mask
from torch import Tensor, nn

import bertfast
from bertfast import attention_interface
from bertfast.attention_interface import attend, counts, register_attention
from bertfast.attention_interface import make_mask as interface_mask
from bertfast.errors import UnsupportedModelError
from bertfast.packing import Packing

# The interface works from 5.0 on, where some of the models named here have none, or not yet one of their own.
transformers = pytest.importorskip("transformers", minversion="5.23")

NAME = register_attention()
BATCH, SEQ_LEN, PAD = 3, 11, 1
LENGTHS = (4, 1, 6, 11)
FORMS = ("none", "ones", "right", "left", "holes", "empty row")
# Models of float64, whose two attentions round differently.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MORE_THAN_PADDING, CAUSAL = "a mask of more than padding", "causal attention"
GROUPED = "key or value heads of another number or size"

_ROTARY = {"max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "Xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "NomicBert": _ROTARY,
    "Gte": _ROTARY,
    "EuroBert": _ROTARY,
    # Four layers, of which the first and the last see everything, and the others four tokens on each side.
    "ModernBert": {**_ROTARY, "num_hidden_layers": 4, "local_attention": 8},
}
SLIDING = {"ModernBert": 2}


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    counts.clear()


@pytest.fixture
def reference() -> Iterator[None]:
    """The packed op in float64, for which there are no kernels."""
    with bertfast.backend.use("reference"):
        yield


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str, attention: str = NAME, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A small model with large weights, the same for every attention, in eval mode. name: as in "BertModel"."""
    family = next((f for f in FAMILIES if name.startswith(f)), None)
    wanted = {**SETTINGS, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    wanted |= {"cls_token_id": 0, "sep_token_id": 2} if family == "ModernBert" else {}
    wanted |= FAMILIES.get(family or "", {}) | settings
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**wanted, attn_implementation=attention))
    draw_weights(model)
    return model.to(dtype).eval()


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """The same model with our attention and with transformers' sdpa."""
    return build(name, **settings), build(name, "sdpa", **settings)


def mask_of(form: str) -> Tensor | None:
    return torch.ones(BATCH, SEQ_LEN, dtype=torch.int64) if form == "ones" else make_mask(form, BATCH, SEQ_LEN)


def call_of(mask: Tensor | None) -> dict[str, Tensor]:
    ids = torch.randint(3, SETTINGS["vocab_size"], (BATCH, SEQ_LEN))
    return (
        {"input_ids": ids} if mask is None else {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    )


def valid_of(call: dict[str, Tensor]) -> Tensor:
    return call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()


def check_agreement(ours: nn.Module, stock: nn.Module, call: dict[str, Tensor]) -> None:
    """Assert that the outputs on valid tokens agree, and the gradients of a function of them."""
    valid, results = valid_of(call), []
    for model in (ours, stock):
        model.zero_grad()
        out = model(**call).last_hidden_state[valid]
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        results.append({"": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    actual, expected = results
    assert actual.keys() == expected.keys() and len(expected) > 10
    for name, gold in expected.items():
        scale = gold.abs().max().clamp(min=1.0)
        torch.testing.assert_close(actual[name] / scale, gold / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients(name: str, form: str) -> None:
    ours, stock = pair(name + "Model")
    check_agreement(ours, stock, call_of(mask_of(form)))
    sliding = SLIDING.get(name, 0)
    assert counts["packed"] == len(list(layers_of(ours))) - sliding
    assert counts[MORE_THAN_PADDING] == sliding
    assert counts.total() == counts["packed"] + sliding


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that call the attention interface."""
    return (m for m in model.modules() if hasattr(m, "is_causal"))


def _break_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_interface.varlen_attention
    monkeypatch.setattr(
        attention_interface, "varlen_attention", lambda *a, scale, **k: right(*a, scale=1.05 * scale, **k)
    )


def _break_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Packing.full
    monkeypatch.setattr(attention_interface, "_noted", lambda mask: full(mask.shape[0], mask.shape[3]))


def _break_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_interface.varlen_attention

    def leaking(qkv: Tensor, cu_seqlens: Tensor, **rest: Any) -> Tensor:
        return right(qkv, cu_seqlens[[0, -1]], **rest | {"max_seqlen": len(qkv), "order": None})

    monkeypatch.setattr(attention_interface, "varlen_attention", leaking)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("break_it", [_break_scale, _break_mask, _break_borders])
def test_wrong_variants_are_caught(break_it: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_agreement(*pair("BertModel"), call_of(mask_of("right")))
    if break_it is not _break_mask:
        with pytest.raises(AssertionError, match="not close"):
            check_row(*pair("BertModel"))


@pytest.mark.usefixtures("reference")
def test_the_op_runs_once_a_layer_on_one_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, packings = [], []
    op, pack = attention_interface.varlen_attention, Packing.from_mask
    monkeypatch.setattr(
        attention_interface, "varlen_attention", lambda *a, **k: calls.append(a[0].shape) or op(*a, **k)
    )
    monkeypatch.setattr(Packing, "from_mask", lambda mask: packings.append(mask) or pack(mask))
    model, call = build("BertModel"), call_of(mask_of("right"))
    model(**call)
    tokens = int(call["attention_mask"].sum())
    assert calls == [(tokens, 3, 4, 16)] * 2 and len(packings) == 1


@pytest.mark.usefixtures("reference")
def test_short_inputs_see_no_window() -> None:
    """Where the window spans the whole input, the sliding layers are packed too."""
    ours, stock = pair("ModernBertModel", local_attention=2 * SEQ_LEN + 2)
    check_agreement(ours, stock, call_of(mask_of("left")))
    assert counts == {"packed": 4}


class Plain(nn.Module):
    """Stands for a model's attention that is given one sequence."""

    is_causal = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> None: ...


def made(valid: Tensor, **arguments: Any) -> Tensor | None:
    """The mask of a bidirectional encoder."""
    config = transformers.BertConfig(attn_implementation=NAME)
    return transformers.masking_utils.create_bidirectional_mask(
        config, torch.empty(*valid.shape, 1), valid, **arguments
    )


def heads(batch: int = BATCH, tokens: int = SEQ_LEN, count: int = 4, size: int = 16) -> Tensor:
    """(batch, heads, tokens, head_size), strided as the models'."""
    return torch.randn(batch, tokens, count, size).transpose(1, 2)


def test_padding_gives_zeros() -> None:
    valid = make_mask("empty row").bool()
    valid[1, 2:7] = False
    mask, q = made(valid), heads()
    out, weights = attend(Plain(), q, q, q, mask)
    assert weights is None and out.shape == (BATCH, SEQ_LEN, 4, 16) and out.is_contiguous()
    assert (out[~valid] == 0).all() and (out[valid] != 0).all()
    (nothing, _) = attend(Plain(), q, q, q, made(torch.zeros_like(valid)))
    assert (nothing == 0).all() and counts == {"packed": 2}


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("size", [16, 24, 64, 128])
def test_scales_and_head_sizes(size: int, scaling: float | None) -> None:
    mask = made(make_mask("holes"))
    q, k, v = heads(size=size), heads(size=size), heads(size=size)
    actual, _ = attend(Plain(), q, k, v, mask, scaling=scaling)
    expected = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, scale=scaling
    ).transpose(1, 2)
    valid = make_mask("holes").bool()
    parity.check(actual[valid], expected[valid])
    assert counts == {"packed": 1}


def test_half_precision() -> None:
    call = call_of(mask_of("right"))
    gold = build("BertModel", "sdpa")
    ours, stock = pair("BertModel", dtype=torch.bfloat16)
    gold.load_state_dict(stock.state_dict())
    valid = valid_of(call)
    with torch.no_grad():
        gold, actual, baseline = (m(**call).last_hidden_state[valid] for m in (gold, ours, stock))
    parity.check(actual, gold, baseline, factor=3.0)
    assert counts == {"packed": 2}


def test_autocast_and_inference_mode() -> None:
    ours, stock = pair("ModernBertModel", dtype=torch.float32, local_attention=64)
    call = call_of(mask_of("right"))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        actual, expected = ours(**call).last_hidden_state, stock(**call).last_hidden_state
    assert actual.dtype == expected.dtype and counts == {"packed": 4}
    valid = valid_of(call)
    error = (actual - expected)[valid].abs().mean() / expected[valid].abs().mean()
    assert 0 < error < 0.02  # two roundings to bfloat16


def test_autocast_to_another_dtype_is_stock() -> None:
    q = heads()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(Plain(), q, q, q, made(mask_of("right")))
    assert out.dtype == torch.bfloat16 and counts == {"autocast to another dtype": 1}


def test_dropout() -> None:
    """Dropped probabilities are zeros, 26 / 256 of them for 0.1; the others are divided by what is kept."""
    tokens, valid = 64, torch.ones(8, 64, dtype=torch.int64)
    valid[:, 48:] = 0
    q, identity = torch.zeros(8, 4, tokens, tokens), torch.eye(tokens).expand(8, 4, tokens, tokens)
    out, _ = attend(Plain(), q, q, identity, made(valid), dropout=0.1)
    probabilities = out[:, :48].transpose(1, 2)
    assert (probabilities[..., 48:] == 0).all()
    dropped = probabilities[..., :48] == 0
    n, p = dropped.numel(), 26 / 256
    assert abs(dropped.float().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(
        probabilities[..., :48][~dropped].mean(), torch.tensor(1 / 48 / (1 - p)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_training_with_dropout_follows_the_seed(name: str) -> None:
    """And its mean is what evaluation gives."""
    p = {"attention_probs_dropout_prob" if name == "BertModel" else "attention_dropout": 0.1}
    model, call = build(name, dtype=torch.float32, num_hidden_layers=1, **p), call_of(mask_of("right"))
    # ModernBERT drops elements of the output too.
    for m in model.modules():
        if isinstance(m, nn.Dropout) and name == "ModernBertModel":
            m.p = 0.0
    valid = valid_of(call)
    context: list[Tensor] = []
    attention = next(layers_of(model))
    projection = attention.Wo if name == "ModernBertModel" else model.encoder.layer[0].attention.output.dense
    projection.register_forward_pre_hook(lambda m, args: context.append(args[0][valid].detach()))
    model(**call)
    model.train()
    for seed in (3, 3, *range(400)):
        torch.manual_seed(seed)
        with torch.no_grad():
            model(**call)
    evaluated, first, second, *drawn = context
    assert torch.equal(first, second) and not torch.equal(first, drawn[0])
    draws = torch.stack(drawn)
    deviation = (draws.mean(0) - evaluated) / (draws.std(0) / len(drawn) ** 0.5).clamp(min=1e-6)
    assert 0.8 < deviation.square().mean().sqrt() < 1.2  # standard deviations of a mean


def borders(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """The arguments that say where sequences begin, as DataCollatorWithFlattening gives them."""
    starts = list(itertools.accumulate(lengths, initial=0))
    q, k = (torch.tensor(starts, dtype=torch.int32) for _ in "qk")
    return {"cu_seq_lens_q": q, "cu_seq_lens_k": k, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def row_of(model: nn.Module) -> dict[str, Any]:
    """A batch of one row with all tokens of sequences of these lengths."""
    first = PAD + 1 if type(model).__name__.startswith(("Roberta", "Xmod")) else 0
    positions = torch.cat([torch.arange(n) + first for n in LENGTHS])[None]
    ids = torch.randint(3, SETTINGS["vocab_size"], (1, sum(LENGTHS)))
    return {"input_ids": ids, "position_ids": positions, **borders()}


def check_row(ours: nn.Module, stock: nn.Module) -> None:
    """Assert that a row of sequences gives what stock gives for each alone, and the gradients of their sum."""
    call = row_of(ours)
    actual = ours(**call).last_hidden_state[0]
    parts = call["input_ids"][0].split(LENGTHS)
    expected = torch.cat([stock(input_ids=part[None]).last_hidden_state[0] for part in parts])
    torch.testing.assert_close(actual, expected, **CLOSE)
    direction = torch.randn_like(actual)
    for model, out in ((ours, actual), (stock, expected)):
        model.zero_grad()
        (out * direction).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if q.grad is not None:
            scale = q.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(p.grad / scale, q.grad / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


LLAMA = {"num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", [*FAMILIES, "Llama"])
def test_rows_of_sequences(name: str) -> None:
    ours, stock = pair(name + "Model", **(LLAMA if name == "Llama" else {}))
    check_row(ours, stock)
    packed = {"Llama": 0, "ModernBert": 2}.get(name, 2)
    assert counts["packed"] == packed, counts


@pytest.mark.usefixtures("reference")
def test_rows_of_causal_sequences_without_positions() -> None:
    """The borders hold where transformers' sdpa, which reads positions, does not know of them."""
    module, q = Plain(), heads(1, sum(LENGTHS)).double()
    module.is_causal = True
    actual, _ = attend(module, q, q, q, None, **borders())
    parts = [nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True) for x in q.split(LENGTHS, dim=2)]
    torch.testing.assert_close(actual, torch.cat(parts, dim=2).transpose(1, 2))
    assert counts == {CAUSAL: 1}


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_neighbours_and_padding_change_nothing(name: str) -> None:
    model = build(name, dtype=torch.float32)
    row = row_of(model)
    with torch.no_grad():
        before = model(**row).last_hidden_state[0]
        start = sum(LENGTHS[:2])
        end = start + LENGTHS[2]
        row["input_ids"][0, start:end] = torch.randint(3, 53, (LENGTHS[2],))
        after = model(**row).last_hidden_state[0]
        assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
        assert not torch.equal(before[start:end], after[start:end])
        call = call_of(mask_of("holes"))
        valid = valid_of(call)
        before = model(**call).last_hidden_state[valid]
        call["input_ids"] = call["input_ids"].masked_fill(~valid, 7)
        assert torch.equal(model(**call).last_hidden_state[valid], before)


@pytest.mark.usefixtures("reference")
def test_borders_are_read_once_and_again_when_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], attention_interface.read_borders
    monkeypatch.setattr(attention_interface, "read_borders", lambda *a: reads.append(a) or read(*a))
    model = build("BertModel")
    row = row_of(model)
    before = model(**row).last_hidden_state
    assert len(reads) == 1
    row["cu_seq_lens_q"][1] = row["cu_seq_lens_k"][1] = 3
    assert not torch.allclose(model(**row).last_hidden_state, before) and len(reads) == 2
    row["cu_seq_lens_k"][1] = 2
    with pytest.raises(ValueError, match="must be equal"):
        model(**row)


def _changed(**changes: Any) -> dict[str, Any]:
    return {**borders(), **changes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (_changed(cu_seq_lens_k=torch.tensor([0, 5, 5, 11, 22], dtype=torch.int32)), "must be equal"),
        (_changed(cu_seq_lens_k=torch.tensor([0, 22], dtype=torch.int32)), "integers"),
        (_changed(cu_seq_lens_k=None), "have to come together"),
        (_changed(cu_seq_lens_q=None), "have to come together"),
        ({k: v.float() if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers"),
        ({k: v[None] if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers"),
        ({k: v.bool() if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers"),
        ({k: v.tolist() if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers, not a list"),
        ({k: v.flip(0) if isinstance(v, Tensor) else v for k, v in borders().items()}, "rise from 0"),
        (borders((4, 5)), "length of the only row"),
        (_changed(position_bias=torch.zeros(1, 4, 22, 22)), "position bias"),
    ],
)
def test_borders_that_are_none_are_refused(arguments: dict[str, Any], words: str) -> None:
    q = heads(1, sum(LENGTHS))
    with pytest.raises(ValueError, match=words):
        attend(Plain(), q, q, q, None, **arguments)


def test_borders_of_queries_and_of_other_keys_are_refused() -> None:
    rectangle, keys = heads(2, sum(LENGTHS) // 2), heads(1, 5)
    with pytest.raises(ValueError, match="2 rows"):
        attend(Plain(), rectangle, rectangle, rectangle, None, **borders())
    with pytest.raises(ValueError, match="5 keys"):
        attend(Plain(), heads(1, sum(LENGTHS)), keys, keys, None, **borders())


def test_empty_sequences() -> None:
    """Attention of nothing is nothing."""
    q, lengths = heads(1, 7), (0, 4, 0, 3)
    parts = [nn.functional.scaled_dot_product_attention(x, x, x) for x in q.split(lengths, dim=2)]
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    for form in (q.double(), q):  # transformers' sdpa, and the op
        out, _ = attend(Plain(), form, form, form, None, **borders(lengths))
        torch.testing.assert_close(out.float(), expected)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_flattening_collator_end_to_end(name: str) -> None:
    """A masked-LM loss and its gradients, of a flattened batch and of the padded one."""
    ours, stock = pair(name + "ForMaskedLM")
    features = []
    for n in LENGTHS:
        ids = torch.randint(3, SETTINGS["vocab_size"], (n,)).tolist()
        features.append({"input_ids": ids, "labels": [i if at % 2 else -100 for at, i in enumerate(ids)]})
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    assert flat["cu_seq_lens_q"].tolist() == [0, 4, 5, 11, 22]

    def padded(key: str, value: int) -> Tensor:
        rows = [torch.tensor(f[key]) for f in features]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    expected = stock(input_ids=padded("input_ids", PAD), labels=padded("labels", -100), attention_mask=mask.long())
    actual = ours(**flat)
    torch.testing.assert_close(actual.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(actual.logits[0], expected.logits[mask], **CLOSE)
    for out in (actual, expected):
        out.loss.backward()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **CLOSE)
    assert counts["packed"] == 2


def check_stock(name: str, reason: str, calls: list[dict[str, Any]], **settings: Any) -> None:
    """Assert that calls give the very bits of transformers' sdpa, all for this reason."""
    ours, stock = pair(name, dtype=torch.float32, **settings)
    for call in calls:
        counts.clear()
        with torch.no_grad():
            actual, expected = ours(**call), stock(**call)
        assert torch.equal(actual[0], expected[0])
        assert set(counts) == {reason}, counts


def test_decoders_are_stock() -> None:
    call = call_of(mask_of("left"))
    check_stock("LlamaModel", GROUPED, [call], **LLAMA)
    check_stock("LlamaModel", MORE_THAN_PADDING, [call], max_position_embeddings=64)
    check_stock("BertModel", MORE_THAN_PADDING, [call], is_decoder=True)
    # Positions that begin anew are sequences of their own for causal masks.
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]] * BATCH)
    packed = {"input_ids": call["input_ids"], "position_ids": positions, "use_cache": False}
    check_stock("LlamaModel", MORE_THAN_PADDING, [packed], max_position_embeddings=64)
    check_stock(
        "MistralModel", MORE_THAN_PADDING, [call], max_position_embeddings=64, sliding_window=3, num_key_value_heads=4
    )


@pytest.mark.usefixtures("reference")
def test_causal_masks_are_always_made() -> None:
    """Without padding stock has none, and the same numbers but for rounding."""
    ours, stock = pair("LlamaModel", max_position_embeddings=64)
    call = call_of(None)
    torch.testing.assert_close(ours(**call)[0], stock(**call)[0], **CLOSE)
    assert counts == {MORE_THAN_PADDING: 2}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_stock(cache: str) -> None:
    ours, stock = pair("LlamaForCausalLM", dtype=torch.float32, max_position_embeddings=64)
    call = call_of(mask_of("left"))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    actual, expected = (m.generate(**call, **settings, cache_implementation=cache) for m in (ours, stock))
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "packed" not in counts and counts.total() == 4 * 2


def test_grouped_heads_are_stock() -> None:
    check_stock("EuroBertModel", GROUPED, [call_of(mask_of("right")), call_of(None)], num_key_value_heads=2)


def test_cross_attention_of_one_length_is_stock() -> None:
    """Where as many keys as queries are another sequence, its padding says nothing about the queries."""
    call, encoded = call_of(mask_of("holes")), torch.randn(BATCH, SEQ_LEN, SETTINGS["hidden_size"])
    call |= {"encoder_hidden_states": encoded, "encoder_attention_mask": mask_of("right")}
    ours, stock = pair("BertModel", dtype=torch.float32, is_decoder=True, add_cross_attention=True)
    with torch.no_grad():
        assert torch.equal(ours(**call)[0], stock(**call)[0])
    assert counts == {MORE_THAN_PADDING: 2, "a module that may attend to another sequence": 2}
    names = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    names |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0}
    call = call_of(mask_of("right"))
    call |= {"decoder_input_ids": call["input_ids"].flip(0), "decoder_attention_mask": mask_of("holes")}
    ours, stock = pair("BartModel", dtype=torch.float32, **names)
    with torch.no_grad():
        assert torch.equal(ours(**call)[0], stock(**call)[0])
    assert "packed" not in counts


def test_position_biases_are_stock() -> None:
    call = call_of(mask_of("right"))
    names = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    check_stock("T5EncoderModel", "argument position_bias", [call], **names)


def test_masks_of_other_forms_are_stock() -> None:
    call = call_of(None)
    seen = torch.rand(BATCH, 1, SEQ_LEN, SEQ_LEN) < 0.7
    seen |= torch.eye(SEQ_LEN, dtype=torch.bool)
    added = torch.randn(BATCH, 1, SEQ_LEN, SEQ_LEN)
    padding = make_mask("right").bool()[:, None, None, :].expand(BATCH, 1, SEQ_LEN, SEQ_LEN)
    calls = [{**call, "attention_mask": mask} for mask in (seen, added, padding)]
    check_stock("BertModel", MORE_THAN_PADDING, calls)


@pytest.mark.parametrize(
    "arguments",
    [
        {"and_mask_function": lambda b, h, q, k: (q - k).abs() < 3},
        {"or_mask_function": lambda b, h, q, k: k == 0},
        {"allow_is_bidirectional_skip": False},
        {"encoder_hidden_states": torch.empty(BATCH, SEQ_LEN, 1), "inputs_embeds": torch.empty(BATCH, 4, 1)},
    ],
    ids=["and", "or", "no skip", "cross"],
)
def test_other_masks_are_those_of_sdpa(arguments: dict[str, Any]) -> None:
    masks = []
    for attention in (NAME, "sdpa"):
        config = transformers.BertConfig(attn_implementation=attention)
        wanted = {"inputs_embeds": torch.empty(BATCH, SEQ_LEN, 1), **arguments}
        valid = make_mask("right")
        masks.append(transformers.masking_utils.create_bidirectional_mask(config, attention_mask=valid, **wanted))
    ours, stock = masks
    assert torch.equal(ours, stock) and attention_interface._noted(ours) is None


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_padding_are_those_of_sdpa(form: str) -> None:
    """Same values, shape and dtype; none where there is no padding."""
    config = transformers.BertConfig(attn_implementation="sdpa")
    valid = torch.ones(BATCH, SEQ_LEN) if form == "none" else mask_of(form)
    stock = transformers.masking_utils.create_bidirectional_mask(config, torch.empty(BATCH, SEQ_LEN, 1), valid)
    ours = made(valid)
    assert (ours is None) is (stock is None) is (form in ("none", "ones"))
    assert ours is None or (torch.equal(ours, stock) and ours.is_contiguous())


def test_what_becomes_of_a_mask_on_its_way() -> None:
    """It is known again as the same view of the same memory, and as nothing else."""
    valid = make_mask("right").bool()
    mask = made(valid)
    packing = attention_interface._noted(mask)
    assert packing is not None and packing.lengths == (11, 1, 5)
    for same in (mask, mask.detach(), mask.to(torch.bool), mask[:]):
        assert attention_interface._noted(same) is packing
    others = (mask.clone(), mask[..., :-1], mask[:2], mask.flip(0), mask.transpose(2, 3), ~mask, mask.float(), valid)
    assert all(attention_interface._noted(other) is None for other in others)
    address = mask.data_ptr()
    detached = mask.detach()
    del mask, same, others
    gc.collect()
    assert detached.data_ptr() == address and attention_interface._noted(detached) is packing
    detached[0, 0, 0, 0] = False
    assert attention_interface._noted(detached) is None


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask", "indices", "cache"])
def test_what_sdpa_would_drop_is_refused(name: str) -> None:
    q = heads()
    with pytest.raises(ValueError, match=name):
        attend(Plain(), q, q, q, None, **{name: torch.ones(4)})


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("attentions wanted", {"output_attentions": True}),
        ("argument token_type_ids", {"token_type_ids": torch.zeros(3, 11)}),
        ("a dropout of everything", {"dropout": 1.0}),
        ("a scale that is a tensor", {"scaling": 0.3}),
        ("fewer or more keys than queries", {"key": heads(tokens=7), "value": heads(tokens=7), "attention_mask": None}),
        ("key or value heads of another number or size", {"value": heads(size=8)}),
        ("tensors of several dtypes or devices", {}),
        ("no kernel for float16 and heads of 16 on cpu", {}),
        ("a Twin", {}),
    ],
)
def test_other_calls_are_stock(reason: str, change: dict[str, Any]) -> None:
    call = {"query": heads(), "key": heads(), "value": heads(), "attention_mask": made(mask_of("right")), **change}
    if "float16" in reason:
        call |= {name: call[name].half() for name in ("query", "key", "value")}
    elif "Twin" in reason:
        call["query"] = call["query"].as_subclass(type("Twin", (Tensor,), {}))
    elif "scale" in reason:
        call["scaling"] = torch.tensor(call["scaling"])
    elif "dtypes" in reason:
        call["value"] = call["value"].double()
    sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
    torch.manual_seed(0)
    try:
        expected = sdpa(Plain(), **call)[0]
    except (RuntimeError, TypeError) as error:  # what stock cannot do, this cannot either
        with pytest.raises(type(error)):
            attend(Plain(), **call)
    else:
        torch.manual_seed(0)
        torch.testing.assert_close(attend(Plain(), **call)[0], expected, rtol=0, atol=0)
    assert counts == {reason: 1}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["MPNetModel", "NystromformerModel"])
def test_models_without_sdpa_are_refused(name: str, compiled: bool) -> None:
    """They would add a boolean mask to their scores."""
    model = build(name)
    with pytest.raises(UnsupportedModelError, match="eager"):
        (torch.compile(model, backend="eager") if compiled else model)(**call_of(mask_of("right")))


def test_old_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not of this file's `transformers`: it puts another object in its place while it loads its parts.
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(UnsupportedModelError, match=r"4\.57\.6.*patch"):
        register_attention()


def test_registering_again_changes_nothing() -> None:
    assert register_attention() == NAME == "bertfast"
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[NAME] is attend and ALL_MASK_ATTENTION_FUNCTIONS[NAME] is interface_mask


def test_live_models_files_and_copies(tmp_path: Any) -> None:
    call = call_of(mask_of("left"))
    model = build("ModernBertModel", "sdpa", dtype=torch.float32)

    def ran(m: Any) -> tuple[Tensor, int]:
        counts.clear()
        with torch.no_grad():
            out = m(**call).last_hidden_state[valid_of(call)]
        return out, counts["packed"]

    stock, packed = ran(model)
    assert packed == 0
    model.set_attn_implementation(NAME)
    ours, packed = ran(model)
    assert packed == 2
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=NAME)
    for other in (loaded, copy.deepcopy(model)):
        again, packed = ran(other)
        assert torch.equal(again, ours) and packed == 2
    model.set_attn_implementation("sdpa")
    again, packed = ran(model)
    assert torch.equal(again, stock) and packed == 0
    assert ran(transformers.AutoModel.from_pretrained(tmp_path))[1] == 0


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """The layers run again as they ran first, with the same dropout: the mask is known again."""
    p = "attention_probs_dropout_prob" if name == "BertModel" else "attention_dropout"
    model, call = build(name, **{p: 0.3}).train(), call_of(mask_of("right"))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(5)
        counts.clear()
        model(**call).last_hidden_state[valid_of(call)].square().sum().backward()
        gradients.append([q.grad.clone() for q in model.parameters() if q.grad is not None])
        assert counts["packed"] == (4 if checkpointing else 2)
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without, **CLOSE)


def test_torch_compile_is_stock() -> None:
    ours, stock = pair("BertModel", dtype=torch.float32)
    call = call_of(mask_of("right"))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call)[0], stock(**call)[0])
    assert not counts
    q = heads(1, sum(LENGTHS))
    row = torch.compile(functools.partial(attend, Plain()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cu_seq_lens under torch\.compile"):
        row(q, q, q, None, **borders())


def test_layers_compiled_by_themselves_take_the_mask() -> None:
    """They go on with sdpa from a mask that was made outside."""
    ours, stock = pair("BertModel", dtype=torch.float32)
    ours.encoder.layer[0].compile(backend="eager")
    call = call_of(mask_of("right"))
    with torch.no_grad():
        valid = valid_of(call)
        torch.testing.assert_close(ours(**call)[0][valid], stock(**call)[0][valid], rtol=1e-4, atol=1e-4)
    assert counts == {"packed": 1}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("form", ["none", "right", "holes"])
def test_patched_models_keep_working(form: str) -> None:
    ours, stock = pair("BertModel")
    bertfast.patch(ours)
    check_agreement(ours, stock, call_of(mask_of(form)))
    assert bertfast.explain(ours).backbones[0].calls == {"packed": 1, "rectangle": 0, "stock": 0} and not counts
    bertfast.unpatch(ours)
    check_agreement(ours, stock, call_of(mask_of(form)))
    assert counts == {"packed": 2}
