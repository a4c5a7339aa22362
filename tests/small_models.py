"""What the tests of models share: settings of a small BERT, large weights, masks of every form."""

import torch
from torch import Tensor

# Large weights: with the usual 0.02, a wrong scale or activation hides below the tolerance.
WEIGHT_STD = 0.2

SETTINGS = {
    "vocab_size": 53,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CLASSES = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)


def draw_weights(model: torch.nn.Module) -> None:
    """Every parameter ~ N(0, WEIGHT_STD), norms' weights around 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=WEIGHT_STD)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1)


def make_mask(form: str, batch: int = 3, seq_len: int = 11) -> Tensor | None:
    """A mask of this form; the first row of the padded ones is full, the second has one token."""
    if form == "none":
        return None
    mask = torch.ones(batch, seq_len, dtype=torch.int64)
    for row, length in enumerate((seq_len, 1, seq_len // 2)):
        if form == "right":
            mask[row, length:] = 0
        elif form == "left":
            mask[row, : seq_len - length] = 0
    if form == "holes":
        mask[:, 2::3] = 0
        mask[1, 1:6] = 0
    elif form == "empty row":
        mask[0] = 0
        mask[2, -3:] = 0
    return mask
