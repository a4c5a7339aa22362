"""200 steps of pre-training on real text: the losses of patched and of native models beside those of stock ones.

All trainings see the same ragged batches in the same order from the same weights. Without dropout the losses agree
step by step; with dropout, whose masks nobody shares, they are draws of one distribution; and under autocast to
bfloat16 they stray from float32 no further than stock's do.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bertfast
from bertfast import texts

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from agreement import ran  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, WARM_UP, BATCHES, BATCH, LONGEST = 200, 20, 10, 8, 32
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP, MASK = 2, 3, 4
SETTINGS = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": LONGEST,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    # Large weights, with which attention matters from the first step on: the loss falls from 7 to 0.3. With BERT's
    # 0.02 it falls to 3, and what happens to attention's probabilities can hardly be seen in it.
    "initializer_range": 0.15,
}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
BERTS_OWN = {"initializer_range": 0.02}
Batch = dict[str, Tensor]


@cache
def batches() -> list[Batch]:
    """BATCHES batches of pairs of sentences, half of them neighbours, with 15 % of the words to be predicted.

    So few that a small model gets to know them well in 200 steps.
    """
    sentences = list(texts.corpus())
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        sentences,
        tokenizers.trainers.WordPieceTrainer(
            vocab_size=SETTINGS["vocab_size"], special_tokens=list(SPECIAL), show_progress=False
        ),
    )
    # The trainer finds the same pieces every time, and numbers them as it likes.
    words = (*SPECIAL, *sorted(pieces.get_vocab().keys() - set(SPECIAL)))
    pieces.model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    ids = [encoding.ids for encoding in pieces.encode_batch(sentences)]
    draw = random.Random(0)
    return [_batch(ids, draw) for _ in range(BATCHES)]


def _batch(ids: list[list[int]], draw: random.Random) -> Batch:
    rows, unrelated = [], []
    for _ in range(BATCH):
        first = draw.randrange(len(ids) - 1)
        unrelated.append(draw.randrange(2))
        second = draw.randrange(len(ids)) if unrelated[-1] else first + 1
        longest = draw.randrange(6, (LONGEST - 3) // 2 + 1)
        rows.append((ids[first][:longest], ids[second][:longest]))
    width = max(len(a) + len(b) for a, b in rows) + 3
    batch = {name: torch.zeros(BATCH, width, dtype=torch.int64) for name in ("input_ids", "token_type_ids")}
    batch |= {
        "attention_mask": torch.zeros(BATCH, width, dtype=torch.int64),
        "labels": torch.full((BATCH, width), -100),
    }
    for row, (a, b) in enumerate(rows):
        text = [CLS, *a, SEP, *b, SEP]
        batch["input_ids"][row, : len(text)] = torch.tensor(text)
        batch["token_type_ids"][row, len(a) + 2 : len(text)] = 1
        batch["attention_mask"][row, : len(text)] = 1
        words = [i for i, token in enumerate(text) if token >= len(SPECIAL)]
        for i in draw.sample(words, max(1, round(0.15 * len(words)))):
            batch["labels"][row, i] = text[i]
            chance = draw.random()
            if chance < 0.9:  # else the word stays
                batch["input_ids"][row, i] = MASK if chance < 0.8 else draw.choice(ids[first])
    return batch | {"next_sentence_label": torch.tensor(unrelated)}


def train(model: nn.Module, seed: int = 0, *, autocast: bool = False) -> Tensor:
    """The losses of STEPS steps of BERT's recipe: AdamW, a learning rate that rises and falls, clipped gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))
    )
    losses = []
    torch.manual_seed(seed)
    model.train()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batches()[step % BATCHES]).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def stock(**settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertForPreTraining(transformers.BertConfig(**{**SETTINGS, **settings}))


def patched(**settings: Any) -> Any:
    return bertfast.patch(stock(**settings))


def native(**settings: Any) -> Any:
    model = bertfast.BertForPreTraining(bertfast.BertConfig(**{**SETTINGS, **settings}))
    model.load_state_dict(stock(**settings).state_dict())
    return model


@cache
def stock_losses(autocast: bool = False, **settings: Any) -> Tensor:
    return train(stock(**settings), autocast=autocast)


@pytest.mark.parametrize("make", [patched, native])
def test_losses_agree_at_every_step(make: Callable[..., nn.Module]) -> None:
    model = make()
    losses, expected = train(model), stock_losses()
    assert expected[0] > 6 and expected[-BATCHES:].mean() < 0.4
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    if make is patched:
        assert ran(model) == {"packed": STEPS}


def test_bfloat16_strays_no_further_than_stocks() -> None:
    """By the median over all steps: a curve that strays makes leaps now and then, and no two make the same."""
    exact = stock_losses(**BERTS_OWN)
    strayed = (train(patched(**BERTS_OWN), autocast=True) - exact).abs().median()
    band = (stock_losses(autocast=True, **BERTS_OWN) - exact).abs().median()
    assert 0 < strayed < 2 * band, f"{strayed:.5f}, stock {band:.5f}"


def unscaled(**settings: Any) -> Any:
    """A stock model whose dropout forgets to divide by what is kept, but for attention's."""
    model = stock(**settings)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.register_forward_hook(lambda module, args, out: out * (1 - module.p))
    return model


@cache
def final_losses(make: Callable[..., nn.Module], draws: int, **settings: Any) -> Tensor:
    """(draws,) mean losses of the last quarter, each with other dropout masks."""
    return torch.stack([train(make(**settings), seed)[-STEPS // 4 :].mean() for seed in range(1, draws + 1)])


def distance(sample: Tensor) -> float:
    """Between the means of this sample and of stock's, in standard errors that go by how stock's are spread."""
    right = final_losses(stock, 4, **DROPOUT)
    return ((sample.mean() - right.mean()).abs() / (right.std() * (1 / len(sample) + 1 / len(right)) ** 0.5)).item()


LIMIT = 3.5


def test_losses_with_dropout_are_of_one_distribution() -> None:
    assert distance(final_losses(patched, 4, **DROPOUT)) < LIMIT


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (stock, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        (stock, {"attention_probs_dropout_prob": 0.0}),
        (unscaled, {}),
    ],
    ids=["none", "none in attention", "not scaled"],
)
def test_wrong_dropout_is_caught(make: Callable[..., nn.Module], change: dict[str, float]) -> None:
    assert distance(final_losses(make, 1, **DROPOUT | change)) > LIMIT
