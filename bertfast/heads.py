"""BERT with a head, one class for each of Hugging Face's: same state_dict, same logits, same losses.

All of them compute on packed tokens and put the padding back at the end, for callers that gave a rectangle. Padding
takes part in nothing: its logits are 0 (the lowest number of the dtype in question answering, so that no answer lies
there), and its labels are not looked at.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast.checkpoint import PretrainedModel
from bertfast.config import BertConfig
from bertfast.layer import activation_name
from bertfast.model import BertModel, BertModelOutput, ModelOutput, check_tensors
from bertfast.ops import MaskedLMLoss, linear, masked_lm_loss
from bertfast.ops.loss import IGNORED
from bertfast.packing import PackedBatch, Packing

Inputs = Tensor | PackedBatch | None  # each of what BertModel.forward takes


@dataclass
class HeadOutput(ModelOutput):
    """loss: a scalar, None without labels. logits: as the head says, None where they were not wanted.

    hidden_states, packing: as in BertModelOutput.
    """

    loss: Tensor | None
    logits: Tensor | None
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Like HeadOutput, with the logits of an answer's first and last token: (batch, seq_len) each, or (tokens,)."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """Like HeadOutput, with the logits of both heads: (batch, seq_len, vocabulary) or (tokens, ...), and (batch, 2)."""

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None = None


class _Head(PretrainedModel):
    """What the heads share: the encoder under `bert`, and the way from labels to packed labels."""

    pooled: ClassVar[bool] = True  # whether the encoder has a pooler

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=self.pooled, pack_weights=pack_weights, compute=compute)

    def _classifier(self, labels: int) -> None:
        self.dropout = nn.Dropout(self.config.classifier_dropout_prob)
        self.classifier = nn.Linear(self.config.hidden_size, labels)
        self.initialize(self.classifier)

    def _encode(self, *inputs: Inputs, output_hidden_states: bool) -> BertModelOutput:
        """The encoder's output, packed; hidden_states in the form that goes to the caller."""
        out = self.bert(*inputs, output_hidden_states=output_hidden_states, pad_output=False)
        if out.hidden_states is not None:
            out.hidden_states = tuple(_restore(s, inputs[0], out.packing) for s in out.hidden_states)
        return out


class BertLMPredictionHead(nn.Module):
    """LayerNorm(act(W x + b)) E^T + c: the scores of every word of the vocabulary. E is the word table, if tied."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(hidden, hidden), "LayerNorm": norm})
        self.decoder = nn.Linear(hidden, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = activation_name(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) to (tokens, vocabulary)."""
        return self.decoder(self._transform(hidden))

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> MaskedLMLoss:
        """The cross entropy of (tokens, hidden) where (tokens,) int64 labels are not -100. See `masked_lm_loss`.

        Nothing is computed for other tokens: neither their scores nor what goes into the decoder.
        """
        labels = _classes(labels)
        if not torch.compiler.is_compiling():  # how many there are would break the graph
            rows = (labels != IGNORED).nonzero().flatten()
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        decoder = self.decoder
        return masked_lm_loss(self._transform(hidden), labels, decoder.weight, decoder.bias, reduction=reduction)

    def _transform(self, hidden: Tensor) -> Tensor:
        dense = self.transform.dense
        return self.transform.LayerNorm(linear(hidden, dense.weight, dense.bias, activation=self.activation))


class _LMHead(_Head):
    """A head that predicts words, and maybe whether one sentence follows the other."""

    ties: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config, pack_weights, compute)
        self.cls = nn.ModuleDict({"predictions": BertLMPredictionHead(config)})
        if self.pooled:
            self.cls["seq_relationship"] = nn.Linear(config.hidden_size, 2)
        self.initialize(self.cls)
        self.tie_weights()

    def _predict(
        self, hidden: Tensor, labels: Tensor | None, output_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The words' scores where they are wanted, and the loss where there are labels."""
        predictions = self.cls.predictions
        if output_logits:
            logits = predictions(hidden)
            return logits, None if labels is None else _cross_entropy(logits, labels)
        if labels is None:
            raise ValueError("output_logits=False without labels leaves nothing to compute: give labels")
        return None, predictions.loss(hidden, labels).loss


class BertForMaskedLM(_LMHead):
    """Predicts masked words: Devlin et al. 2019, section 3.1, task 1. No pooler."""

    pooled = False

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_logits: bool = True,
        output_hidden_states: bool = False,
    ) -> HeadOutput:
        """Logits (batch, seq_len, vocabulary), or (tokens, vocabulary) for a PackedBatch.

        labels: (batch, seq_len) or (tokens,) int64, -100 where no word is asked for. The loss is the mean cross
        entropy over the labelled valid tokens. output_logits: False computes the loss from the labelled tokens alone,
        see `bertfast.ops.masked_lm_loss`. The other arguments and the errors are BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        logits, loss = self._predict(
            out.last_hidden_state, _token_labels(labels, input_ids, out.packing), output_logits
        )
        return HeadOutput(loss, _restore(logits, input_ids, out.packing), out.packing, out.hidden_states)


class BertForNextSentencePrediction(_Head):
    """Says whether the second sentence follows the first: Devlin et al. 2019, section 3.1, task 2."""

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config, pack_weights, compute)
        self.cls = nn.ModuleDict({"seq_relationship": nn.Linear(config.hidden_size, 2)})
        self.initialize(self.cls)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> HeadOutput:
        """Logits (batch, 2): it follows, it does not.

        labels: (batch,) int64, 0 where it follows and 1 where it does not; the loss is the mean cross entropy. The
        other arguments and the errors are BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        logits = self.cls.seq_relationship(out.pooler_output)
        labels = _sequence_labels(labels, input_ids, out.packing)
        loss = None if labels is None else _cross_entropy(logits, labels)
        return HeadOutput(loss, logits, out.packing, out.hidden_states)


class BertForPreTraining(_LMHead):
    """Both tasks of BERT's pre-training at once: Devlin et al. 2019, section 3.1."""

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_logits: bool = True,
        output_hidden_states: bool = False,
    ) -> PreTrainingOutput:
        """prediction_logits as BertForMaskedLM's, seq_relationship_logits as BertForNextSentencePrediction's.

        labels: of the words, as there; next_sentence_label: (batch,) int64. The loss is the sum of both, and None
        unless both are given. output_logits: of the words, as there. The other arguments and the errors are
        BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        labels = _token_labels(labels, input_ids, out.packing)
        words, loss = self._predict(out.last_hidden_state, labels, output_logits)
        follows = self.cls.seq_relationship(out.pooler_output)
        if loss is not None and next_sentence_label is not None:
            next_sentence_label = _sequence_labels(next_sentence_label, None, out.packing)
            loss = loss + _cross_entropy(follows, next_sentence_label)
        else:
            loss = None
        words = _restore(words, input_ids, out.packing)
        return PreTrainingOutput(loss, words, follows, out.packing, out.hidden_states)


class BertForSequenceClassification(_Head):
    """Classifies, or scores, whole sequences."""

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config, pack_weights, compute)
        self._classifier(config.num_labels)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> HeadOutput:
        """Logits (batch, num_labels).

        labels: (batch,), or (batch, num_labels) for several numbers a sequence. config.problem_type names the loss:
        "regression" is the mean squared error, "single_label_classification" cross entropy,
        "multi_label_classification" binary cross entropy; None means regression for one label, single label for
        int64 and int32 labels, multi label for others. The other arguments and the errors are BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        logits = self.classifier(self.dropout(out.pooler_output))
        labels = _sequence_labels(labels, input_ids, out.packing)
        loss = None if labels is None else _classification_loss(logits, labels, self.config.problem_type)
        return HeadOutput(loss, logits, out.packing, out.hidden_states)


def _classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    if problem_type is None:
        one = labels.dtype in (torch.int64, torch.int32)
        several = "single_label_classification" if one else "multi_label_classification"
        problem_type = "regression" if logits.shape[1] == 1 else several
    if labels.dtype.is_complex:
        raise TypeError(f"labels must be numbers, not {labels.dtype}")
    if problem_type == "single_label_classification":
        return _cross_entropy(logits, labels.long())
    if labels.numel() != logits.numel():
        raise ValueError(
            f"{problem_type} compares labels of shape {tuple(labels.shape)} with logits of {tuple(logits.shape)}: give "
            "one label for each logit, or set config.problem_type"
        )
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.view_as(logits).to(logits.dtype))


class BertForMultipleChoice(_Head):
    """Chooses among several continuations, each a sequence of its own."""

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config, pack_weights, compute)
        self._classifier(1)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_choices: int | None = None,
        output_hidden_states: bool = False,
    ) -> HeadOutput:
        """Logits (batch, choices), one score for each choice.

        The rectangles are BertModel's with an axis more: (batch, choices, seq_len). A PackedBatch holds the choices of
        the first question, those of the second and so on, and comes with num_choices. labels: (batch,) int64, the
        right choice; the loss is the mean cross entropy. The errors are BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if not isinstance(input_ids, PackedBatch):
            names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
            check_tensors(self.classifier.weight.device, **dict(zip(names, inputs, strict=True)))
            num_choices = _choices(input_ids, inputs_embeds, num_choices)
            inputs = tuple(None if t is None else _flatten(t) for t in inputs)
        elif num_choices is None or num_choices < 1 or input_ids.packing.batch % num_choices:
            raise ValueError(
                f"num_choices is {num_choices}: for a PackedBatch of {input_ids.packing.batch} sequences give a number "
                "that divides them"
            )
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        logits = self.classifier(self.dropout(out.pooler_output)).view(-1, num_choices)
        labels = _sequence_labels(labels, input_ids, out.packing, logits.shape[0])
        loss = None if labels is None else _cross_entropy(logits, labels)
        return HeadOutput(loss, logits, out.packing, out.hidden_states)


def _choices(input_ids: Tensor | None, inputs_embeds: Tensor | None, num_choices: int | None) -> int:
    """The number of choices that a rectangle has."""
    tokens, axes = (inputs_embeds, 4) if input_ids is None else (input_ids, 3)
    if tokens is None or tokens.dim() != axes:
        found = None if tokens is None else tuple(tokens.shape)
        raise ValueError(f"multiple choice takes (batch, choices, seq_len) tokens or a PackedBatch, not {found}")
    if num_choices not in (None, tokens.shape[1]):
        raise ValueError(f"num_choices is {num_choices}, but the tokens of shape {tuple(tokens.shape)} say otherwise")
    return tokens.shape[1]


def _flatten(rectangles: Tensor) -> Tensor:
    """(batch, choices, ...) to (batch * choices, ...)."""
    if rectangles.dim() < 3:
        raise ValueError(f"multiple choice takes (batch, choices, seq_len) tensors, not {tuple(rectangles.shape)}")
    return rectangles.flatten(0, 1)


class BertForTokenClassification(_Head):
    """Classifies every token. No pooler."""

    pooled = False

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config, pack_weights, compute)
        self._classifier(config.num_labels)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> HeadOutput:
        """Logits (batch, seq_len, num_labels), or (tokens, num_labels) for a PackedBatch.

        labels: (batch, seq_len) or (tokens,) int64, -100 where there is none. The loss is the mean cross entropy over
        the labelled valid tokens. The other arguments and the errors are BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        labels = _token_labels(labels, input_ids, out.packing)
        loss = None if labels is None else _cross_entropy(logits, labels)
        return HeadOutput(loss, _restore(logits, input_ids, out.packing), out.packing, out.hidden_states)


class BertForQuestionAnswering(_Head):
    """Finds where in a text the answer starts and ends: Devlin et al. 2019, section 4.2. No pooler."""

    pooled = False

    def __init__(self, config: BertConfig, pack_weights: bool = True, compute: str | None = None) -> None:
        super().__init__(config, pack_weights, compute)
        if config.num_labels != 2:
            raise ValueError(f"question answering has 2 labels, start and end, not {config.num_labels}: num_labels=2")
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.initialize(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> QuestionAnsweringOutput:
        """Logits (batch, seq_len) with the dtype's lowest number in the padding, or (tokens,) for a PackedBatch.

        start_positions, end_positions: (batch,) int64, columns of the rectangle; for a PackedBatch, positions inside
        each sequence, which may also stand in its labels, (batch, 2). The loss is the mean cross entropy of both over
        the valid tokens of each sequence. A position outside them is ignored, as transformers ignores one outside the
        rectangle; unlike there, padding has no part in the softmax. The other arguments and the errors are BertModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        out = self._encode(*inputs, output_hidden_states=output_hidden_states)
        packed = self.qa_outputs(out.last_hidden_state)
        start, end = (out.packing.pad(x, torch.finfo(x.dtype).min) for x in packed.unbind(1))
        if start_positions is None and end_positions is None and isinstance(input_ids, PackedBatch):
            labels = _sequence_labels(None, input_ids, out.packing)
            if labels is not None and labels.shape[1:] != (2,):
                raise ValueError(
                    f"labels of spans are (sequences, 2), the first and last token, not {tuple(labels.shape)}"
                )
            start_positions, end_positions = (None, None) if labels is None else labels.unbind(1)
        loss = None
        if start_positions is not None and end_positions is not None:
            positions = [_sequence_labels(p, None, out.packing) for p in (start_positions, end_positions)]
            loss = (_span_loss(start, positions[0], out.packing) + _span_loss(end, positions[1], out.packing)) / 2
        if isinstance(input_ids, PackedBatch):
            start, end = packed.unbind(1)
        return QuestionAnsweringOutput(loss, start, end, out.packing, out.hidden_states)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of (rows, classes) logits over the rows that have a label."""
    return F.cross_entropy(logits, _classes(labels))


def _classes(labels: Tensor) -> Tensor:
    """The labels in one row. TypeError unless they are int64."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels and positions must be int64, not {labels.dtype}: convert them with .long()")
    return labels.reshape(-1)


def _span_loss(logits: Tensor, positions: Tensor, packing: Packing) -> Tensor:
    """The mean cross entropy of (batch, seq_len) logits over the sequences whose position is a valid token."""
    ignored = packing.seq_len
    positions = _classes(positions).clamp(0, ignored)
    if len(positions) != packing.batch:
        raise ValueError(f"{len(positions)} positions for {packing.batch} sequences: give one a sequence")
    valid = packing.pad(torch.ones(packing.tokens, dtype=torch.bool, device=logits.device), False)
    outside = ~F.pad(valid, (0, 1)).gather(1, positions[:, None])[:, 0]
    return F.cross_entropy(logits, positions.masked_fill(outside, ignored), ignore_index=ignored)


def _restore(packed: Tensor | None, input_ids: Inputs, packing: Packing) -> Tensor | None:
    """Packed rows in the form of the input: as they are for a PackedBatch, a rectangle with zeros for a rectangle."""
    return packed if packed is None or isinstance(input_ids, PackedBatch) else packing.pad(packed)


def _from_batch(labels: Tensor | None, input_ids: Inputs, packing: Packing) -> Tensor | None:
    """The labels that were given, or those in the batch."""
    if isinstance(input_ids, PackedBatch) and input_ids.labels is not None:
        if labels is not None:
            raise ValueError("labels are given twice, as an argument and in the PackedBatch: leave one of them out")
        labels = input_ids.labels
    check_tensors(packing.cu_seqlens.device, labels=labels)
    return labels


def _token_labels(labels: Tensor | None, input_ids: Inputs, packing: Packing) -> Tensor | None:
    """One label for each valid token, (tokens,)."""
    labels = _from_batch(labels, input_ids, packing)
    if labels is None:
        return None
    packed = isinstance(input_ids, PackedBatch)
    expected = (packing.tokens,) if packed else (packing.batch, packing.seq_len)
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels have shape {tuple(labels.shape)} where the tokens have {expected}: give one a token")
    return labels if packed else packing.pack(labels)


def _sequence_labels(
    labels: Tensor | None, input_ids: Inputs, packing: Packing, sequences: int | None = None
) -> Tensor | None:
    """The labels, one row for each sequence, of which there may be others than in the packing."""
    labels = _from_batch(labels, input_ids, packing)
    sequences = packing.batch if sequences is None else sequences
    if labels is not None and labels.shape[:1] != (sequences,):
        raise ValueError(f"labels have shape {tuple(labels.shape)} for {sequences} sequences: give one row a sequence")
    return labels
