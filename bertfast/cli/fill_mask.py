"""Predict the masked words of a sentence with bertfast's own BertForMaskedLM.

Prints the sentence with the likeliest word in each place, then the best words of each with their probabilities.
"""

import argparse
import warnings
from typing import Any

import torch

from bertfast.cli.output import UsageError, print_json, print_table
from bertfast.cli.tokens import Tokenizer, length_limit, load_tokenizer
from bertfast.heads import BertForMaskedLM
from bertfast.packing import PackedBatch

HELP = "predict the masked words of a sentence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, or the id of a hub repository, with a masked LM")
    parser.add_argument("sentence", metavar="SENTENCE", help="with one mask token or several, [MASK] for most models")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many words for each mask")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    model = load_masked_lm(args.model)
    if not 1 <= args.top <= model.config.vocab_size:
        raise UsageError(f"--top must lie between 1 and the vocabulary's {model.config.vocab_size}, not be {args.top}")
    tokenizer = load_tokenizer(args.model)
    masks = predict(model, tokenizer, args.sentence, args.top)
    filled = fill(args.sentence, tokenizer, [words[0][0] for words in masks])
    if args.json:
        best = [[{"token": token, "probability": p} for token, p in words] for words in masks]
        print_json({"model": args.model, "sentence": args.sentence, "filled": filled, "masks": best})
        return 0
    print(filled)
    for number, words in enumerate(masks, 1):
        print(f"\nmask {number}" if len(masks) > 1 else "")
        print_table([(token, f"{p:.4f}") for token, p in words], indent="  ")
    return 0


def load_masked_lm(name: str) -> BertForMaskedLM:
    """The model. UsageError where the checkpoint has no masked language model: a new head would make words up."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return BertForMaskedLM.from_pretrained(name)
        except UserWarning as missing:
            raise UsageError(f"{name} was saved without a masked-LM head, so it predicts no words") from missing


def predict(model: BertForMaskedLM, tokenizer: Tokenizer, sentence: str, top: int) -> list[list[tuple[str, float]]]:
    """For each mask of the sentence, the `top` likeliest tokens and their probabilities.

    Raises UsageError where there is no mask, and where one falls behind the longest sentence the model takes.
    """
    if tokenizer.mask_id is None:
        raise UsageError("this model's tokenizer has no mask token")
    wanted = sentence.count(str(tokenizer.mask_token))
    if not wanted:
        raise UsageError(f"the sentence holds no mask: write {tokenizer.mask_token} in place of a word")
    limit = length_limit(tokenizer, model.config.max_position_embeddings, None)
    [features] = tokenizer.encode([sentence], None, limit)
    ids = torch.tensor(features["input_ids"])
    places = (ids == tokenizer.mask_id).nonzero().flatten()
    if len(places) != wanted:
        raise UsageError(
            f"the sentence is longer than {limit} tokens, and {wanted - len(places)} masks lie behind that"
        )
    types = features.get("token_type_ids")
    batch = PackedBatch.from_lists([features["input_ids"]], None if types is None else [types])
    with torch.inference_mode():
        # Softmax in float32 whatever the checkpoint is: half precision has too few digits for a probability.
        probabilities = model(batch).logits[places].float().softmax(-1)
    best = probabilities.topk(top)
    rows: list[tuple[Any, Any]] = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return [[(tokenizer.token(i), p) for i, p in zip(indices, values, strict=True)] for indices, values in rows]


def fill(sentence: str, tokenizer: Tokenizer, words: list[str]) -> str:
    """The sentence with a token in place of each mask; pieces of words (##s) go to the word before them."""
    head, *rest = sentence.split(str(tokenizer.mask_token))
    for word, text in zip(words, rest, strict=True):
        head = head.rstrip() + word.removeprefix("##") if word.startswith("##") else head + word
        head += text
    return head
