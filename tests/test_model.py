"""BertModel against transformers' own, with weights drawn large, and what has to hold of any BERT without padding.

float64 runs the reference implementation of the ops, float32 the CPU kernels where they are built; the bounds of
float32 are three times what transformers itself loses against its float64 twin, plus 1e-6 of the largest value.
"""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from small_models import SETTINGS, make_mask

import bertfast
from bertfast import BertConfig, BertModel, PackedBatch, Packing


def valid_tokens(mask: torch.Tensor | None) -> torch.Tensor:
    return torch.ones(3, 11, dtype=torch.bool) if mask is None else mask.bool()


def pooled_first_valid(stock, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What transformers' pooler makes of the first valid token of each row; of zeros, where there is none."""
    first = hidden[torch.arange(len(hidden)), valid.int().argmax(1)]
    return torch.tanh(stock.pooler.dense(first * valid.any(1, keepdim=True)))


def test_hidden_states_and_pooler_are_those_of_transformers(twins, heads, ids, mask):
    stock, ours = twins(num_attention_heads=heads)
    types, valid = torch.randint(0, 2, (3, 11)), valid_tokens(mask)
    with torch.no_grad():
        theirs = stock(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
        out = ours(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state[valid], theirs.last_hidden_state[valid])
    assert out.last_hidden_state.shape == (3, 11, 64) and (out.last_hidden_state[~valid] == 0).all()
    expected = pooled_first_valid(stock, theirs.last_hidden_state, valid)
    torch.testing.assert_close(out.pooler_output, expected)
    assert len(out.hidden_states) == 3
    for a, b in zip(out.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a[valid], b[valid])


def test_pooler_is_that_of_transformers_where_column_0_is_valid(twins, ids, first_valid_mask):
    stock, ours = twins()
    theirs, out = stock(ids, attention_mask=first_valid_mask), ours(ids, attention_mask=first_valid_mask)
    torch.testing.assert_close(out.pooler_output, theirs.pooler_output)


def test_every_gradient_is_that_of_transformers(twins, heads, ids, mask):
    stock, ours = twins(num_attention_heads=heads)
    valid, weights = valid_tokens(mask), torch.randn(3, 11, 64, dtype=torch.float64)
    theirs, out = stock(ids, attention_mask=mask).last_hidden_state, ours(ids, attention_mask=mask)
    pooled = pooled_first_valid(stock, theirs, valid)
    ((theirs * weights)[valid].sum() + pooled.square().sum()).backward()
    ((out.last_hidden_state * weights).sum() + out.pooler_output.square().sum()).backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda m, name=name: f"{name}: {m}")
    # The padding token is among the valid ones here, and is not trained, in transformers neither.
    assert (ours.embeddings.word_embeddings.weight.grad[0] == 0).all()


def test_float32_is_as_exact_as_transformers(twins, heads, ids, mask):
    stock, ours = twins(dtype=torch.float32, num_attention_heads=heads)
    gold = copy.deepcopy(stock).double()
    valid = valid_tokens(mask)

    def run(model):
        model.zero_grad()
        hidden = model(ids, attention_mask=mask)[0]
        (hidden[valid].square().sum() / 100).backward()
        return [hidden[valid].detach(), *(p.grad for n, p in model.named_parameters() if "pooler" not in n)]

    for exact, theirs, result in zip(run(gold), run(stock), run(ours), strict=True):
        # Three times stock's error, and what the policy allows float32: stock may be lucky in a small sum.
        bound = 3 * (theirs.double() - exact).abs().max() + 1e-5 * exact.abs().max() + 1e-7
        assert (result.double() - exact).abs().max() <= bound
    with torch.no_grad():  # inference takes another way: packed weights, fused activation
        exact, theirs, result = (m(ids, attention_mask=mask)[0][valid] for m in (gold, stock, ours))
    bound = 3 * (theirs.double() - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (result.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python"])
def test_activations(twins, ids, act):
    stock, ours = twins(hidden_act=act)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], stock(ids)[0])


def test_positions_and_word_vectors_of_ones_own(twins, ids, mask):
    stock, ours = twins()
    valid, positions = valid_tokens(mask), torch.randint(0, 40, (3, 11))
    theirs, out = (m(ids, attention_mask=mask, position_ids=positions)[0] for m in (stock, ours))
    torch.testing.assert_close(out[valid], theirs[valid])
    one_row = positions[:1]
    theirs, out = (m(ids, attention_mask=mask, position_ids=one_row)[0] for m in (stock, ours))
    torch.testing.assert_close(out[valid], theirs[valid])
    vectors = [torch.randn(3, 11, 64, dtype=torch.float64).requires_grad_() for _ in range(2)]
    vectors[1].data.copy_(vectors[0])
    theirs = stock(inputs_embeds=vectors[0], attention_mask=mask)[0]
    out = ours(inputs_embeds=vectors[1], attention_mask=mask)[0]
    torch.testing.assert_close(out[valid], theirs[valid])
    theirs[valid].square().sum().backward()
    out.square().sum().backward()
    torch.testing.assert_close(vectors[1].grad[valid], vectors[0].grad[valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_packed_batch_is_the_rectangle(build, dtype):
    model = build(dtype=dtype)
    rows = [torch.randint(0, 53, (n,)).tolist() for n in (11, 1, 5)]
    types = [torch.randint(0, 2, (len(row),)).tolist() for row in rows]
    ids, type_ids, mask = (torch.zeros(3, 11, dtype=torch.int64) for _ in range(3))
    for i, row in enumerate(rows):
        ids[i, : len(row)], type_ids[i, : len(row)] = torch.tensor(row), torch.tensor(types[i])
        mask[i, : len(row)] = 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, token_type_ids=type_ids, output_hidden_states=True)
        packed = model(PackedBatch.from_lists(rows, token_type_ids=types), output_hidden_states=True)
        unpadded = model(ids, attention_mask=mask, token_type_ids=type_ids, pad_output=False)
    assert packed.last_hidden_state.shape == (17, 64)
    assert torch.equal(packed.last_hidden_state, padded.last_hidden_state[mask.bool()])
    assert torch.equal(packed.last_hidden_state, unpadded.last_hidden_state)
    assert torch.equal(packed.pooler_output, padded.pooler_output)
    assert torch.equal(packed.packing.pad(packed.last_hidden_state), padded.last_hidden_state)
    assert torch.equal(packed.hidden_states[1], padded.hidden_states[1][mask.bool()])


@pytest.mark.parametrize("form", ["right", "left", "holes", "empty row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_in_the_padding_changes_nothing(build, ids, form, dtype):
    model, mask = build(dtype=dtype), make_mask(form)
    others = torch.where(mask.bool(), ids, torch.randint(0, 53, (3, 11)))
    types, positions = torch.randint(0, 2, (3, 11)), torch.randint(0, 40, (3, 11))
    with torch.no_grad():
        a = model(ids, mask, types, positions)
        b = model(others, mask, types * mask, torch.where(mask.bool(), positions, 999))
    assert torch.equal(a.last_hidden_state, b.last_hidden_state) and torch.equal(a.pooler_output, b.pooler_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_alone_is_the_sequence_in_a_batch(build, dtype):
    model = build(dtype=dtype)
    rows = [torch.randint(0, 53, (n,)).tolist() for n in (7, 20, 1, 13)]
    with torch.no_grad():
        together = model(PackedBatch.from_lists(rows))
        for b, row in enumerate(rows):
            alone = model(torch.tensor([row]))
            start, end = together.packing.cu_seqlens[b : b + 2]
            torch.testing.assert_close(together.last_hidden_state[start:end], alone.last_hidden_state[0])
            torch.testing.assert_close(together.pooler_output[b], alone.pooler_output[0])


def test_two_runs_agree_bit_for_bit(build, ids):
    model = build(dtype=torch.float32)
    mask = make_mask("holes")

    def run():
        model.zero_grad()
        out = model(ids, mask)
        out.last_hidden_state.square().sum().backward()
        return [out.last_hidden_state.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_at_all(build, dtype):
    model = build(dtype=dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for shape in ((0, 5), (2, 0), (0, 0)):
                out = model(torch.zeros(shape, dtype=torch.int64))
                assert out.last_hidden_state.shape == (*shape, 64) and out.pooler_output.shape == (shape[0], 64)
            out = model(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5))
            assert (out.last_hidden_state == 0).all() and torch.isfinite(out.pooler_output).all()
            assert model(PackedBatch.from_lists([[], []])).last_hidden_state.shape == (0, 64)
            assert model(PackedBatch.from_lists([])).pooler_output.shape == (0, 64)
            assert model(inputs_embeds=torch.zeros(1, 0, 64, dtype=dtype))[0].shape == (1, 0, 64)


def test_dropout_is_drawn_from_torchs_generator(build, ids):
    model = build(dtype=torch.float32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    quiet = model(ids)[0]
    assert torch.equal(quiet, model(ids)[0])
    model.train()

    def run(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        hidden = model(ids, make_mask("right"))[0]
        hidden.square().sum().backward()
        return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    first, again, other = run(1), run(1), run(2)
    assert all(torch.isfinite(t).all() for t in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], quiet)


def test_each_dropout_is_applied_where_the_paper_has_it(build, ids):
    def differs(**settings):
        model = build(dtype=torch.float32, **settings)
        hidden = model.embeddings.train()(ids[0], torch.arange(11))
        layer = model.encoder.layer[0]
        outputs = [layer.train(on)(hidden, Packing.full(1, 11)) for on in (True, False)]
        return not torch.equal(hidden, model.embeddings.eval()(ids[0], torch.arange(11))), not torch.equal(*outputs)

    assert differs() == (False, False)
    assert differs(hidden_dropout_prob=0.5) == (True, True)
    assert differs(attention_probs_dropout_prob=0.5) == (False, True)


def test_dropout_keeps_the_mean(build, ids):
    embeddings = build(dtype=torch.float32, hidden_dropout_prob=0.1).embeddings
    with torch.no_grad():
        quiet = embeddings(ids[0], torch.arange(11))
        embeddings.train()
        draws = torch.stack([embeddings(ids[0], torch.arange(11)) for _ in range(400)])
    assert (draws == 0).float().mean() == pytest.approx(0.1, abs=0.005)
    # The mean of n draws of x m / (1 - p) has the standard deviation |x| sqrt(p / (1 - p) / n).
    score = (draws.mean(0) - quiet) / (quiet.abs() * math.sqrt(0.1 / 0.9 / 400))
    assert score.square().mean().sqrt() == pytest.approx(1.0, abs=0.15) and score.mean().abs() < 0.15


def test_bfloat16_and_autocast_run(build, ids):
    exact = build(dtype=torch.float32)
    mask = make_mask("right")
    gold = exact(ids, mask)[0]
    half = copy.deepcopy(exact).bfloat16()(ids, mask)[0]
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        cast = exact(ids, mask)
    cast.last_hidden_state.sum().backward()
    for hidden in (half, cast.last_hidden_state):
        # 2^-8 a rounding, some twenty of them in a row
        assert (hidden.float() - gold).norm() < 0.05 * gold.norm()


def test_encoder_compiles_into_one_graph_for_all_lengths(build):
    encoder = build(dtype=torch.float32).encoder
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=graphs)
    try:
        counts = []
        for lengths in ((5, 9, 2), (4, 11, 1), (20, 3, 8, 6)):
            packing = Packing.from_lengths(lengths)
            hidden = torch.randn(packing.tokens, 64)
            with torch.no_grad():
                torch.testing.assert_close(compiled(hidden, packing), encoder(hidden, packing))
            counts.append(graphs.frame_count)
        assert len(set(counts)) == 1, "compiled again for other lengths"
        hidden.requires_grad_()
        ours = torch.autograd.grad(compiled(hidden, packing).square().sum(), [hidden, *encoder.parameters()])
        eager = torch.autograd.grad(encoder(hidden, packing).square().sum(), [hidden, *encoder.parameters()])
        torch.testing.assert_close(ours, eager)
    finally:
        torch._dynamo.reset()


def test_weights_follow_an_update(build, ids):
    model = build(dtype=torch.float32)
    with torch.no_grad():
        before = model(ids)[0]
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = model(ids)[0]
        plain = build(dtype=torch.float32, num_hidden_layers=2)
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, plain(ids)[0])


def test_without_packed_weights_nothing_changes_but_the_memory(build, ids):
    packed = build(dtype=torch.float32)
    plain = BertModel(packed.config, pack_weights=False).eval()
    plain.load_state_dict(packed.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(packed(ids)[0], plain(ids)[0])
    assert all(layer.packs.nbytes == 0 for layer in plain.encoder.layer)


def test_copies_and_pickles(build, ids):
    model = build(dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids)[0], expected)


def test_initialisation_is_that_of_bert():
    config = BertConfig(**{**SETTINGS, "vocab_size": 500, "initializer_range": 0.05})
    model = BertModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        else:
            # a standard deviation estimated from n values is off by 1 / sqrt(2 n) of it, and five of these are many
            assert parameter.std().item() == pytest.approx(0.05, rel=5 / math.sqrt(2 * parameter.numel())), name
    assert (model.embeddings.word_embeddings.weight[0] == 0).all()
    torch.manual_seed(3)
    a = BertModel(config)
    torch.manual_seed(3)
    b = BertModel(config)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_state_dict_is_that_of_transformers_in_both_directions(twins):
    stock, ours = twins()
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)


def test_output_reads_like_that_of_transformers(build, ids):
    out = build()(ids)
    assert out[0] is out.last_hidden_state and out[1] is out.pooler_output and out["pooler_output"] is out[1]
    hidden, pooled = out
    assert len(out) == 2 and out[:1] == (hidden,) and pooled is out.pooler_output
    model = BertModel(BertConfig(**SETTINGS), add_pooling_layer=False)
    assert model.pooler is None and model(ids).pooler_output is None and len(model(ids)) == 1
    assert len(model(ids, output_hidden_states=True)[1]) == 3


IDS = torch.ones(2, 5, dtype=torch.int64)
BATCH = PackedBatch.from_lists([[1, 2]])


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "either input_ids or inputs_embeds, not neither"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 64)}, ValueError, "inputs_embeds, not both"),
        ({"input_ids": IDS[0]}, ValueError, r"\(batch, seq_len\) or a PackedBatch, not of shape \(5,\)"),
        ({"inputs_embeds": torch.zeros(2, 64)}, ValueError, r"\(batch, seq_len, hidden\).*not of shape \(2, 64\)"),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, ValueError, "32 features of torch.float32 a token, the model 64"),
        ({"inputs_embeds": torch.zeros(2, 5, 64).double()}, ValueError, "torch.float64 a token, the model 64"),
        ({"input_ids": IDS.int()}, TypeError, "input_ids must be int64, not torch.int32"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64, not torch.float32"),
        ({"input_ids": IDS * 53}, IndexError, "token id 53 .*outside the table of 53"),
        ({"input_ids": -IDS}, IndexError, "token id -1 "),
        ({"input_ids": IDS, "token_type_ids": IDS * 2}, IndexError, "token type 2 .*table of 2"),
        ({"input_ids": IDS, "position_ids": IDS * 40}, IndexError, "position 40 .*table of 40"),
        ({"input_ids": torch.ones(1, 41, dtype=torch.int64)}, ValueError, "41 tokens is longer .* of 40: truncate"),
        ({"input_ids": PackedBatch.from_lists([[1] * 41])}, ValueError, "41 tokens is longer .* of 40: truncate"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, ValueError, r"\(2, 4\) where the tokens have \(2, 5\)"),
        ({"input_ids": IDS, "attention_mask": IDS[:, None, None]}, ValueError, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": IDS * 3}, ValueError, "neither 0 nor 1"),
        ({"input_ids": IDS, "token_type_ids": IDS[:, :4]}, ValueError, r"token_type_ids has shape \(2, 4\)"),
        ({"input_ids": IDS, "position_ids": IDS[:, :4]}, ValueError, r"position_ids has shape \(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": IDS.to("meta")}, ValueError, "attention_mask is on meta.*on cpu"),
        ({"input_ids": IDS, "token_type_ids": IDS.to("meta")}, ValueError, "token_type_ids is on meta.*on cpu"),
        ({"input_ids": IDS.to("meta")}, ValueError, "input_ids is on meta.* on cpu"),
        ({"input_ids": BATCH.to("meta")}, ValueError, "input_ids is on meta.* on cpu"),
        ({"input_ids": BATCH, "attention_mask": IDS}, ValueError, "attention_mask given beside a PackedBatch"),
        ({"input_ids": BATCH, "position_ids": IDS}, ValueError, "position_ids given beside a PackedBatch"),
    ],
)
def test_inputs_that_are_refused(build, inputs, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        build(dtype=torch.float32)(**inputs)


def test_the_longest_sequence_is_allowed(build):
    model = build(dtype=torch.float32)
    assert model(torch.ones(1, 40, dtype=torch.int64))[0].shape == (1, 40, 64)
    longer = torch.ones(1, 50, dtype=torch.int64)
    assert model(longer, position_ids=longer)[0].shape == (1, 50, 64)


def test_importing_bertfast_imports_nothing_heavy():
    code = "import sys, bertfast; print([m for m in ('transformers', 'triton', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and bertfast.__version__
