"""Which calls of a patched model run packed, on the rectangle, or as stock code, and that all give stock's numbers."""

import pytest
import torch
from small_models import make_mask

pytest.importorskip("transformers")

from agreement import TOLERANCE, assert_agree, assert_same, exact_path, pair, ran, reasons, visible
from stock_models import LEGACY, call_of, mask_of

NEW_ONLY = pytest.mark.skipif(LEGACY, reason="transformers 4 has no such thing")
OLD_ONLY = pytest.mark.skipif(not LEGACY, reason="transformers 5 has no such thing any more")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification"])
def test_labels_on_padding_keep_the_rectangle(name: str) -> None:
    mask = mask_of("right")
    stock, patched = pair(name)
    call = call_of(name, mask) | {"labels": torch.randint(0, 2, (3, 11))}
    assert_agree(patched, stock, call, mask, everything=True)
    positional = [call["input_ids"], call["attention_mask"], call["token_type_ids"]]
    patched(*positional, labels=call["labels"])
    assert ran(patched) == {"rectangle": 2}
    assert "labels at padding" in reasons(patched)


def test_positional_arguments_positions_types_and_embeddings() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    ids = call_of("BertModel", mask)["input_ids"]
    positions = torch.randint(0, 40, (3, 11))
    for args, kwargs in (
        ((ids, mask), {}),
        ((ids, mask, torch.ones_like(ids), positions), {}),
        ((ids, mask), {"position_ids": positions[:1]}),
        ((ids.int(), mask.bool()), {"return_dict": False}),
        ((), {"inputs_embeds": torch.randn(3, 11, 64, dtype=torch.float64), "attention_mask": mask.float()}),
    ):
        ours, theirs = patched(*args, **kwargs), stock(*args, **kwargs)
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        assert_same({"h": ours[0][mask.bool()]}, {"h": theirs[0][mask.bool()]})
        assert_same({"p": ours[1]}, {"p": theirs[1]})
    assert ran(patched) == {"packed": 5}
    for model in (stock, patched):
        model.embeddings.token_type_ids.fill_(1)
        model.embeddings.position_ids.copy_(torch.arange(40).flip(0))
    assert_same(visible(patched(ids, mask), mask), visible(stock(ids, mask), mask))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_other_forms(attention: str) -> None:
    stock, patched = pair(attention=attention)
    ids = call_of("BertModel", None)["input_ids"]
    pairs = torch.rand(3, 11, 11) < 0.7
    pairs |= torch.eye(11, dtype=torch.bool)
    if LEGACY:
        given = pairs.long()
    else:
        given = pairs[:, None]
        if attention == "eager":
            given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -1e300)
    assert_same(visible(patched(ids, given), None), visible(stock(ids, given), None))
    assert ran(patched) == {"rectangle": 1}
    if not LEGACY and attention == "sdpa":  # stock takes any value but 0 as valid in 5
        weights = torch.where(make_mask("right") == 1, 0.5, 0.0)
        assert_same(visible(patched(ids, weights), None), visible(stock(ids, weights), None))
        assert ran(patched) == {"rectangle": 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions(attention: str) -> None:
    stock, patched = pair(attention=attention)
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    for model in (stock, patched):
        model(**call)
    ours, theirs = (m(**call, output_hidden_states=True) for m in (patched, stock))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert_same(dict(enumerate(ours.hidden_states)), dict(enumerate(theirs.hidden_states)))
    ours, theirs = (m(**call, output_attentions=True) for m in (patched, stock))
    assert len(ours.attentions) == len(theirs.attentions)
    assert_same(dict(enumerate(ours.attentions)), dict(enumerate(theirs.attentions)))
    # The hooks that transformers 5 leaves behind do not keep later calls from the packed path.
    assert_same(visible(patched(**call), mask), visible(stock(**call), mask))
    assert ran(patched) == {"packed": 2, "rectangle": 1, "stock": 1}
    patched.config.output_hidden_states = True
    assert len(patched(**call).hidden_states) == 3


@pytest.mark.parametrize(
    ("settings", "call", "word"),
    [
        ({"is_decoder": True, "dtype": torch.float32}, {}, "decoder"),  # float64 overflows in stock code of 4.57
        ({"chunk_size_feed_forward": 1}, {}, "chunked"),
        ({}, {"encoder_hidden_states": torch.zeros(3, 2, 64, dtype=torch.float64)}, "encoder_hidden_states"),
        pytest.param({}, {"is_causal": True}, "is_causal", marks=NEW_ONLY),
        pytest.param({}, {"head_mask": torch.tensor([1.0, 0, 1, 1]).double()}, "head", marks=OLD_ONLY),
        pytest.param({"position_embedding_type": "relative_key"}, {}, "relative", marks=OLD_ONLY),
    ],
)
def test_what_only_stock_code_does(settings: dict, call: dict, word: str) -> None:
    stock, patched = pair(**settings)
    mask = mask_of("right")
    call = call_of("BertModel", mask) | call
    tolerance = 1e-4 if "dtype" in settings else TOLERANCE
    assert_same(visible(patched(**call), None), visible(stock(**call), None), tolerance)
    assert ran(patched) == {"stock": 1}
    assert word in reasons(patched)


def test_dtypes_without_kernels_run_stock_code() -> None:
    stock, patched = pair(dtype=torch.float16)
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    with torch.no_grad():
        assert torch.equal(patched(**call).last_hidden_state, stock(**call).last_hidden_state)
    assert ran(patched) == {"stock": 1} and "float16 has no kernels" in reasons(patched)


def test_torch_compile_runs_stock_code() -> None:
    stock, patched = pair()
    mask = mask_of("right")
    call = call_of("BertModel", mask)
    with torch.no_grad():
        compiled = torch.compile(patched, backend="eager")
        assert_same(visible(compiled(**call), None), visible(stock(**call), None))
        assert ran(patched) == {}
        patched(**call)
        assert ran(patched) == {"packed": 1}
        patched.encoder.layer[0].compile(backend="eager")
        assert_same(visible(patched(**call), None), visible(stock(**call), None))
    assert "compiled" in reasons(patched)
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["none", "ones", "right", "left", "holes", "empty row"])
def test_calls_past_the_hooks(form: str, attention: str) -> None:
    """sentence-transformers calls model.forward: the encoder finds the mask in what stock code made of it."""
    mask = mask_of(form)
    for name in ("BertModel", "BertForQuestionAnswering", "BertForTokenClassification"):
        stock, patched = pair(name, attention=attention)
        call = call_of(name, mask)
        path = exact_path(name, form)
        if name == "BertForTokenClassification" and path == "packed" and form not in ("none", "ones"):
            path = "rectangle"  # nothing has told it whether labels stand on padding
        ours, theirs = patched.forward(**call), stock.forward(**call)
        assert_same(
            visible(ours, mask, everything=path == "rectangle"), visible(theirs, mask, everything=path == "rectangle")
        )
        assert ran(patched) == {path: 1}


def test_the_encoder_alone_and_direct_layer_calls() -> None:
    stock, patched = pair()
    x = torch.randn(3, 11, 64, dtype=torch.float64)
    ours, theirs = (m.encoder(x)[0] for m in (patched, stock))
    assert_same({"h": ours}, {"h": theirs})
    ours, theirs = (m.encoder.layer[0](x) for m in (patched, stock))
    assert isinstance(ours, tuple) is isinstance(theirs, tuple)
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs) and ours[1] is None
        ours, theirs = ours[0], theirs[0]
    assert_same({"h": ours}, {"h": theirs})
    assert ran(patched) == {"packed": 1}
    mask = torch.rand(3, 1, 1, 11, dtype=torch.float64)  # neither 0 nor the smallest number
    ours, theirs = (m.encoder(x, mask)[0] for m in (patched, stock))
    assert_same({"h": ours}, {"h": theirs})
    assert ran(patched) == {"packed": 1, "rectangle": 1}
