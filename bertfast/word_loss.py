"""Masked language modelling on a patched model without scores of every word: `patch(model, output_logits=False)`.

Stock code scores every word at every token and then looks at the labelled ones, about 15 %. Here the task model's head
is handed the hidden states of labelled tokens alone, and no labels. Its own modules make of them what goes into the
decoder, which is withheld from the decoder itself: `masked_lm_loss` takes it from there.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bertfast.calls import HeadState, calls
from bertfast.eligibility import traced
from bertfast.ops.loss import IGNORED, masked_lm_loss


@dataclass
class WordLoss:
    """What one call of a task model wants the loss of.

    labels: (batch, seq_len). follows: the label of next sentence prediction, (batch,), where the head has that task.
    decoder: the module that scores words, if what it is given can be withheld from it. rows: which is this, (1,
    labelled, hidden).
    """

    labels: Tensor
    follows: Tensor | None
    decoder: nn.Module | None
    rows: Tensor | None = None

    def select(self, output: Any) -> Any:
        """The base model's output with the hidden states of labelled tokens alone, (1, labelled, hidden)."""
        hidden = output[0]
        if hidden.shape[:2].numel() != self.labels.numel():
            raise ValueError(
                f"labels of shape {tuple(self.labels.shape)} for tokens of shape {tuple(hidden.shape[:2])}: give one a "
                "token, -100 where no word is asked for"
            )
        self.labels = self.labels.reshape(-1).to(hidden.device)
        labelled = (self.labels != IGNORED).nonzero().flatten()
        self.labels = self.labels.index_select(0, labelled)
        rows = hidden.flatten(0, 1).index_select(0, labelled)[None]
        if isinstance(output, tuple):
            return (rows, *output[1:])
        return type(output)(**{**output, "last_hidden_state": rows})

    def finish(self, output: Any) -> Any:
        """The task model's output with the loss, and without the words' scores."""
        in_tuple = isinstance(output, tuple)
        scores, *others = output if in_tuple else output.to_tuple()
        if self.rows is None:
            loss = F.cross_entropy(scores.flatten(0, 1), self.labels)
        else:
            loss = masked_lm_loss(self.rows.flatten(0, 1), self.labels, self.decoder.weight, self.decoder.bias).loss
        if self.follows is not None:
            loss = loss + F.cross_entropy(others[0].view(-1, 2), self.follows.view(-1))
        if in_tuple:
            return (loss, *others)
        names = [name for name in output if name not in ("logits", "prediction_logits")]
        return type(output)(loss=loss, **{name: output[name] for name in names})


def scores_words(model: nn.Module) -> bool:
    """Whether the task model's head is one of masked language modelling."""
    kind = type(model).__name__
    return kind.endswith("ForMaskedLM") or kind == "BertForPreTraining"


def withhold_from(model: nn.Module, state: HeadState) -> None:
    """Have the model's decoder given nothing in calls that want the loss alone."""
    decoder = model.get_output_embeddings()
    if _withhold not in decoder._forward_pre_hooks.values():
        state.handles.append(decoder.register_forward_pre_hook(_withhold))


def take(model: nn.Module, arguments: dict[str, Any]) -> WordLoss | None:
    """What the call wants the loss of, taken out of its arguments; None where stock code would give no loss."""
    labels = arguments.get("labels")
    follows = arguments.get("next_sentence_label")
    both = type(model).__name__ == "BertForPreTraining"
    if not isinstance(labels, Tensor) or (both and not isinstance(follows, Tensor)):
        return None
    del arguments["labels"]
    arguments.pop("next_sentence_label", None)
    return WordLoss(labels, follows, _plain_decoder(model))


def _plain_decoder(model: nn.Module) -> nn.Module | None:
    """The decoder, where nobody but us looks at what goes in and what comes out."""
    decoder = model.get_output_embeddings()
    hooks = list(decoder._forward_pre_hooks.values()) + list(decoder._forward_hooks.values())
    return decoder if type(decoder) is nn.Linear and hooks == [_withhold] else None


def _withhold(decoder: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook of a decoder."""
    words = calls.heads[-1].words if calls.heads and not traced() else None
    if words is None or words.decoder is not decoder:
        return None
    words.rows = args[0]
    return (args[0][:, :0],)
