"""BERT's encoder: Devlin et al. 2019, on packed tokens, under Hugging Face's names of modules and parameters."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertfast.checkpoint import PretrainedModel
from bertfast.config import BertConfig
from bertfast.guard import Guard, global_hooks, watch_module
from bertfast.layer import LayerPacks, LayerParameters, LayerSettings, activation_name, encoder_layer
from bertfast.ops import embed_layer_norm, varlen_attention
from bertfast.packing import PackedBatch, Packing
from bertfast.runtime.compute import operand_of
from bertfast.runtime.encoder import NativeEncoder, NativeLayer


class ModelOutput:
    """Base of the outputs: fields by name, and by position among those that are there, as transformers has it."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order; `packing` is not one of transformers' and is left out."""
        values = (getattr(self, f.name) for f in fields(self) if f.name != "packing")  # type: ignore[arg-type]
        return tuple(v for v in values if v is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())


@dataclass
class BertModelOutput(ModelOutput):
    """What BertModel returns.

    last_hidden_state: (batch, seq_len, hidden) with zeros in the padding, or packed (tokens, hidden).
    pooler_output: (batch, hidden), None for a model without pooler.
    hidden_states: the embeddings and each layer's output, like last_hidden_state; None unless asked for.
    packing: which tokens are valid.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None = None


class BertEmbeddings(nn.Module):
    """dropout(LayerNorm(word + position + token type)): Devlin et al. 2019, figure 2."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(tokens,) ids to (tokens, hidden); the word vectors are the rows of inputs_embeds where that is given."""
        return embed_layer_norm(
            input_ids,
            position_ids,
            token_type_ids,
            self.word_embeddings.weight if inputs_embeds is None else inputs_embeds,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            padding_idx=self.word_embeddings.padding_idx if inputs_embeds is None else None,
            dropout_p=self.dropout if self.training else 0.0,
        )


class BertLayer(nn.Module):
    """One encoder layer. The parameters stand in Hugging Face's tree, the computation in `bertfast.layer`."""

    def __init__(self, config: BertConfig, packs: LayerPacks = LayerPacks()) -> None:  # noqa: B008 (immutable)
        super().__init__()
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        projections = {name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": _dense_and_norm(hidden, hidden, eps)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, inner)})
        self.output = _dense_and_norm(inner, hidden, eps)
        self.heads = config.num_attention_heads
        self.eps = eps
        self.activation = activation_name(config.hidden_act)
        self.hidden_dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob
        self.packs = packs

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """(tokens, hidden) to (tokens, hidden)."""
        settings = self._settings()
        attend = partial(
            varlen_attention,
            cu_seqlens=packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            order=packing.order,
            dropout_p=settings.attention_dropout,
        )
        return encoder_layer(hidden, attend, self._parameters_in_order(), settings, self.packs)

    def _settings(self) -> LayerSettings:
        if not self.training:
            return LayerSettings(self.heads, self.eps, self.activation)
        dropouts = self.attention_dropout, self.hidden_dropout, self.hidden_dropout
        return LayerSettings(self.heads, self.eps, self.activation, *dropouts)

    def _parameters_in_order(self) -> LayerParameters:
        attention, attended = self.attention.self, self.attention.output
        query, key, value = attention.query, attention.key, attention.value
        up, down = self.intermediate.dense, self.output.dense
        return LayerParameters(
            (query.weight, key.weight, value.weight),
            (query.bias, key.bias, value.bias),
            *(attended.dense.weight, attended.dense.bias, attended.LayerNorm.weight, attended.LayerNorm.bias),
            *(up.weight, up.bias, down.weight, down.bias),
            *(self.output.LayerNorm.weight, self.output.LayerNorm.bias),
        )


def _dense_and_norm(inputs: int, outputs: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps=eps)})


class OwnEncoder:
    """The native call for a BertEncoder's layers, made anew when one of their parts is exchanged.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._found: tuple[Guard, NativeEncoder] | None = None

    def run(self, layers: nn.ModuleList, hidden: Tensor, packing: Packing) -> Tensor | None:
        """(tokens, hidden) to the same; None where the layers have to be called one by one."""
        if torch.compiler.is_compiling() or global_hooks():
            return None
        if torch.is_grad_enabled() and hidden.requires_grad:
            self._found = None  # which would keep packed weights while the model is trained
            return None
        found = self._found
        if found is None or not found[0].holds():
            found = self._found = self._look(layers)
        return None if found is None else found[1].run(hidden, packing)

    @staticmethod
    def _look(layers: nn.ModuleList) -> tuple[Guard, NativeEncoder] | None:
        guard, native = Guard(), []
        for i, layer in enumerate(layers):
            if type(layer) is not BertLayer or "forward" in layer.__dict__:
                return None
            guard.entry(layers._modules, str(i))
            watch_module(guard, layer)
            for name in ("training", "heads", "eps", "activation", "hidden_dropout", "attention_dropout", "packs"):
                guard.entry(layer.__dict__, name)
            for module in layer.modules():
                for owned in (module._modules, module._parameters):
                    for name in owned:
                        guard.entry(owned, name)
            parameters, settings = layer._parameters_in_order(), layer._settings()
            scale = (parameters.up_weight.shape[1] / settings.heads) ** -0.5
            native.append(NativeLayer(parameters, settings, scale, layer.packs))
        guard.entry(layers._modules, str(len(layers)))
        return (guard, NativeEncoder(native)) if guard.holds() else None

    def __deepcopy__(self, memo: dict) -> "OwnEncoder":
        return OwnEncoder()

    def __reduce__(self) -> tuple:
        return OwnEncoder, ()


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, pack_weights: bool = True, operand: str | None = None) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config, LayerPacks.empty(operand) if pack_weights else LayerPacks())
            for _ in range(config.num_hidden_layers)
        )
        self.operand = operand
        self.native = OwnEncoder()

    def forward(self, hidden: Tensor, packing: Packing, states: list[Tensor] | None = None) -> Tensor:
        """(tokens, hidden) to (tokens, hidden); each layer's output is appended to `states`, if that is given."""
        if states is None and (out := self.native.run(self.layer, hidden, packing)) is not None:
            return out
        for layer in self.layer:
            hidden = layer(hidden, packing)
            if states is not None:
                states.append(hidden)
        return hidden


class BertPooler(nn.Module):
    """tanh(W x + b) of each sequence's first valid token, usually [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        """(tokens, hidden) to (batch, hidden). A sequence without tokens counts as zeros."""
        return torch.tanh(self.dense(_first_tokens(hidden, packing)))


def _first_tokens(hidden: Tensor, packing: Packing) -> Tensor:
    starts = packing.cu_seqlens[:-1]
    filled = [b for b, length in enumerate(packing.lengths) if length]
    if len(filled) == packing.batch:
        return hidden.index_select(0, starts)
    rows = torch.tensor(filled, dtype=torch.int64, device=hidden.device)
    first = hidden.index_select(0, starts.index_select(0, rows))
    return hidden.new_zeros(packing.batch, hidden.shape[1]).index_copy(0, rows, first)


class BertModel(PretrainedModel):
    """BERT without a head: embeddings, encoder and pooler, with Hugging Face's state_dict.

    Args:
        config: the sizes.
        add_pooling_layer: whether there is a pooler.
        pack_weights: whether inference on the CPU keeps a second, packed copy of the encoder's weights, which makes it
            faster and takes as much memory again.
        compute: "bf16" has the GEMMs of inference on the CPU multiply in bfloat16 whatever the weights are, with
            residuals and statistics in float32 (half the packed copy of float32 weights, about twice as fast); None: in
            what the weights are. A warning says where the processor has no instructions for it.
    """

    body_prefix: ClassVar[str] = ""

    def __init__(
        self,
        config: BertConfig,
        add_pooling_layer: bool = True,
        pack_weights: bool = True,
        compute: str | None = None,
    ) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config, pack_weights, operand_of(compute, pack_weights))
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.initialize(self)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        pad_output: bool = True,
    ) -> BertModelOutput:
        """Hidden states of every valid token. Padding is dropped before the encoder and put back, as zeros, after it.

        Args:
            input_ids: (batch, seq_len) int64, or a PackedBatch, which says everything by itself.
            attention_mask: (batch, seq_len), 1 at valid tokens and 0 at padding, wherever that is: right, left, in
                between, or a whole row; None where there is no padding.
            token_type_ids: (batch, seq_len) or (1, seq_len) int64; None means 0 everywhere.
            position_ids: (batch, seq_len) or (1, seq_len) int64; None means the column, padding counted.
            inputs_embeds: (batch, seq_len, hidden), word vectors in place of input_ids.
            output_hidden_states: return the embeddings and every layer's output too.
            pad_output: False returns a rectangle's hidden states packed, (tokens, hidden).

        The pooler takes the first valid token of each sequence. Hugging Face's takes column 0, which is the same
        except under left padding, where it pools a padding token. The embedding of the padding token is not trained.

        Raises ValueError / TypeError where shapes, dtypes or devices do not fit, where sequences are longer than the
        position table, and unless exactly one of input_ids and inputs_embeds is given; IndexError (on the CPU) for an
        id outside its table.
        """
        if isinstance(input_ids, PackedBatch):
            _refuse_beside_batch(attention_mask, token_type_ids, position_ids, inputs_embeds)
            batch, pad_output = input_ids, False
        else:
            given = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
            }
            check_tensors(self.embeddings.word_embeddings.weight.device, **given)
            batch, inputs_embeds = _pack(**given)
        self._check(batch, inputs_embeds, position_ids)
        packing = batch.packing
        hidden = self.embeddings(batch.input_ids, batch.position_ids, batch.token_type_ids, inputs_embeds)
        states = [hidden] if output_hidden_states else None
        hidden = self.encoder(hidden, packing, states)
        pooled = None if self.pooler is None else self.pooler(hidden, packing)
        if pad_output:
            hidden, states = packing.pad(hidden), states and [packing.pad(s) for s in states]
        return BertModelOutput(hidden, pooled, packing, states and tuple(states))

    def _check(self, batch: PackedBatch, inputs_embeds: Tensor | None, position_ids: Tensor | None) -> None:
        table = self.embeddings.word_embeddings.weight
        tokens, name = (batch.input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
        if tokens.device != table.device or batch.packing.cu_seqlens.device != table.device:
            raise ValueError(
                f"{name} is on {tokens.device}, its packing on {batch.packing.cu_seqlens.device}, the model on "
                f"{table.device}: move one of them with .to()"
            )
        if inputs_embeds is not None and (inputs_embeds.shape[1:], inputs_embeds.dtype) != (
            table.shape[1:],
            table.dtype,
        ):
            raise ValueError(
                f"inputs_embeds has {inputs_embeds.shape[1]} features of {inputs_embeds.dtype} a token, the model "
                f"{table.shape[1]} of {table.dtype}: convert one of them with .to()"
            )
        limit, longest = self.config.max_position_embeddings, batch.packing.seq_len
        if longest > limit and position_ids is None:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than the position table of {limit}: "
                f"truncate it (max_length={limit}), or give position_ids below {limit}"
            )


def _refuse_beside_batch(*rectangles: Tensor | None) -> None:
    names = ("attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    given = [n for n, t in zip(names, rectangles, strict=True) if t is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} given beside a PackedBatch, which says everything itself: put it in there"
        )


def _pack(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[PackedBatch, Tensor | None]:
    """A rectangle's valid tokens: the batch, and (tokens, hidden) word vectors where these were given."""
    if (input_ids is None) == (inputs_embeds is None):
        both = "neither" if input_ids is None else "both"
        raise ValueError(f"give either input_ids or inputs_embeds, not {both}")
    if inputs_embeds is None:
        tokens, shape, wanted = input_ids, tuple(input_ids.shape), "input_ids must be (batch, seq_len)"
    else:
        tokens, shape = inputs_embeds, tuple(inputs_embeds.shape[:2])
        wanted = "inputs_embeds must be (batch, seq_len, hidden)"
    if tokens.dim() != (2 if inputs_embeds is None else 3):
        raise ValueError(f"{wanted} or a PackedBatch, not of shape {tuple(tokens.shape)}")
    packing = _packing(attention_mask, shape, tokens.device)
    types = _rectangle("token_type_ids", token_type_ids, shape)
    positions = _rectangle("position_ids", position_ids, shape)
    if inputs_embeds is None:
        ids = packing.pack(input_ids)
    else:
        inputs_embeds = packing.pack(inputs_embeds)
        ids = torch.arange(inputs_embeds.shape[0], device=tokens.device)  # the vectors are a table, a row a token
    batch = PackedBatch(
        ids,
        packing.position_ids() if positions is None else packing.pack(positions),
        packing,
        None if types is None else packing.pack(types),
    )
    return batch, inputs_embeds


def _packing(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Packing:
    if mask is None:
        return Packing.full(*shape, device=device)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} where the tokens have {shape}: it needs one value, 0 or 1, "
            "for each token"
        )
    return Packing.from_mask(mask)


def _rectangle(name: str, ids: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The ids as a rectangle of this shape; one row serves all sequences."""
    if ids is None:
        return None
    if tuple(ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)} where the tokens have {shape}: give one id for each token"
        )
    return ids.expand(shape)


def check_tensors(device: torch.device, **given: Tensor | None) -> None:
    """Raise unless each is None or a dense tensor on the device: TypeError, ValueError."""
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a dense tensor, not a {kind}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {device}: move one of them with .to()")
