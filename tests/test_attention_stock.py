"""What attn_implementation="bertfast" leaves to transformers' sdpa, with its very bits, or refuses."""

import functools
from typing import Any

import pytest
import torch
from small_models import SETTINGS, make_mask
from torch import Tensor

from bertfast import attention_interface
from bertfast.attention_interface import attend, counts
from bertfast.errors import UnsupportedModelError

# The interface works from 5.0 on, where some of the models named here have none, or not yet one of their own.
transformers = pytest.importorskip("transformers", minversion="5.23")

from interface_models import (  # noqa: E402, F401 (fixtures too)
    BATCH,
    CLOSE,
    LENGTHS,
    LLAMA,
    MORE_THAN_PADDING,
    NAME,
    PAD,
    SEQ_LEN,
    Plain,
    borders,
    build,
    call_of,
    fresh_counts,
    heads,
    made,
    mask_of,
    pair,
    reference,
    valid_of,
)

GROUPED = "key or value heads of another number or size"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_autocast_to_another_dtype_is_stock() -> None:
    q = heads()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(Plain(), q, q, q, made(mask_of("right")))
    assert out.dtype == torch.bfloat16 and counts == {"autocast to another dtype": 1}


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
