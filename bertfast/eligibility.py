"""Whether a Hugging Face module can run on the fused ops in this call, and what it hands them if so.

Every refusal is one short sentence for people. The modules of a layer are found once and verified at every call, as
they may be replaced at any time; parameters are read at every call and never kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bertfast import backend
from bertfast.architectures import KINDS, Family, activation_of
from bertfast.guard import Guard, watch_module
from bertfast.layer import LayerParameters, LayerSettings

_PLAIN = (nn.Parameter, Tensor)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The attention implementations whose masks are boolean; the second is bertfast.attention_interface's.
SDPA = ("sdpa", "bertfast")
# Keywords that change nothing in the layers: the first two are read above them, transformers 5 hands them all on.
INERT = frozenset(("output_hidden_states", "num_items_in_batch", "position_ids", "cache_position"))


class Refusal(str):
    """Why a call cannot run on the fused ops."""

    __slots__ = ()


def traced() -> bool:
    """Whether something looks at the operations themselves, so that stock code has to run.

    torch.compile and torch.export, torch.jit.trace, a dispatch mode, a torch.func transform, forward-mode
    differentiation.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def hooks_matter(module: nn.Module) -> bool:
    """Whether a hook on the module would see, or change, what the fused ops compute.

    transformers 5 leaves a hook of its own on the layers for ever once hidden states were wanted; what it collects is
    known from the call's arguments. The hooks of torch.distributed gather and free parameters and look at nothing.
    """
    attributes = module.__dict__
    if attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]:
        return True
    return any(
        getattr(hook, "__name__", "") != "output_capturing_hook"
        and not str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
        for hooks in (attributes["_forward_pre_hooks"], attributes["_forward_hooks"])
        for hook in tuple(hooks.values())
    )


class _Link(NamedTuple):
    siblings: dict[str, nn.Module]
    name: str
    module: nn.Module
    kind: type
    attributes: dict
    path: str


class Structure:
    """The submodules of one layer, or of the embeddings, and the checks that they are what the fused ops replace."""

    def __init__(self, owner: nn.Module, family: Family, places: dict[str, str]) -> None:
        """Find the modules. Raises LookupError, with the refusal, where something else stands in a place."""
        self.owner = owner
        self.places: dict[str, nn.Module] = {}
        self.containers: dict[str, nn.Module] = {"": owner}
        self.links: list[_Link] = []
        for place, path in places.items():
            *parents, name = path.split(".")
            for depth, parent in enumerate(parents, 1):
                above, here = ".".join(parents[: depth - 1]), ".".join(parents[:depth])
                if here not in self.containers:
                    module = self._link(self.containers[above], parent, here)
                    kind = type(module)
                    if kind.__module__ != family.module or kind.__qualname__ not in family.containers[here]:
                        raise LookupError(f"{here} is a {_class_name(module)}")
                    self.containers[here] = module
            module = self._link(self.containers[".".join(parents)], name, path)
            if type(module) is not KINDS[place.rpartition("_")[2]]:
                raise LookupError(f"{path} is a {_class_name(module)}")
            self.places[place] = module

    def _link(self, parent: nn.Module, name: str, path: str) -> nn.Module:
        module = parent._modules.get(name)
        if module is None:
            raise LookupError(f"{path} is missing")
        self.links.append(_Link(parent._modules, name, module, type(module), module.__dict__, path))
        return module

    def is_current(self) -> bool:
        """Whether every module still is where it was found, of the class that it had."""
        for siblings, name, module, kind, _, _ in self.links:
            if siblings.get(name) is not module or type(module) is not kind:
                return False
        return True

    def refusal(self) -> Refusal | None:
        """Why a submodule has to be called itself: it has hooks or a forward of its own."""
        for _, _, module, _, attributes, path in self.links:
            if (
                attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"]
                or attributes["_backward_pre_hooks"]
            ) and hooks_matter(module):
                return Refusal(f"{path} has hooks")
            if "forward" in attributes:
                return Refusal(f"{path} has a forward of its own")
        return None

    def watch(self, guard: Guard) -> None:
        """Note all that was looked at."""
        watch_module(guard, self.owner)
        for siblings, name, module, _, _, _ in self.links:
            guard.entry(siblings, name)
            watch_module(guard, module)


def _watch_tensors(guard: Guard, sources: list[tuple[dict, str, str]]) -> None:
    for parameters, name, _ in sources:
        guard.entry(parameters, name)
        guard.attribute(parameters[name], "dtype")


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("torch.nn.modules.")


def _tensors(sources: list[tuple[dict, str, str]], dtype: torch.dtype, device: torch.device) -> list[Tensor] | Refusal:
    """The parameters as they are now, all of them plain tensors of this dtype and device."""
    tensors = []
    for parameters, name, path in sources:
        t = parameters.get(name)
        if type(t) not in _PLAIN:
            return Refusal(f"{path}.{name} is {'missing' if t is None else f'a {type(t).__name__}'}")
        if t.dtype is not dtype:
            return Refusal(f"{path}.{name} is {_short(t.dtype)} where the hidden states are {_short(dtype)}")
        if t.device != device:
            return Refusal(f"{path}.{name} is on {t.device} where the hidden states are on {device}")
        tensors.append(t)
    return tensors


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_kind(dtype: torch.dtype, device: torch.device) -> Refusal | None:
    """Why the fused ops should not run on tensors of this kind: no kernels, or autocast would change stock's dtypes."""
    if dtype not in _DTYPES:
        return Refusal(f"{_short(dtype)} has no kernels")
    # In these the reference would be slower than stock code: it has no tensor cores, or computes in float32.
    slow = device.type != "cpu" or dtype is torch.float16
    if slow and backend.explain("varlen_attention", device, dtype).backend == "reference":
        return Refusal(f"{_short(dtype)} has no kernels on {device.type}")
    if dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(device.type):
        return Refusal("autocast over weights that are not float32")
    return None


# Attributes of a layer's containers that, set, ask for what only stock code does.
_SWITCHES = {
    "is_decoder": "decoder",
    "is_causal": "decoder",
    "chunk_size_feed_forward": "chunked feed-forward",
    "pruned_heads": "pruned heads",
}


class LayerReading(NamedTuple):
    """What one call of a layer needs. scale is that of the attention scores."""

    parameters: LayerParameters
    settings: LayerSettings
    scale: float


class LayerStructure(Structure):
    """A transformer layer."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__(layer, family, family.layer_places)
        order = ("query", "key", "value", "attention_dense", "attention_norm", "up", "down", "output_norm")
        self._sources = [
            (self.places[place]._parameters, name, family.layer_places[place])
            for place in order
            for name in ("weight", "bias")
        ]
        container, _, self._activation = family.activation.rpartition(".")
        self._activation_owner = self.containers[container]
        self._self_attention = self.containers[family.self_attention]
        self._head_count = family.head_count
        self._switches = [
            (m.__dict__, name, reason)
            for m in self.containers.values()
            for name, reason in _SWITCHES.items()
            if name in m.__dict__
        ]
        self._norms = self.places["attention_norm"], self.places["output_norm"]
        self._attention_dropout = self.places["attention_dropout"]
        self._hidden_dropouts = self.places.get("attention_output_dropout"), self.places["output_dropout"]
        stochastic = (self._self_attention, self._attention_dropout, *self._hidden_dropouts)
        self._training = [m.__dict__ for m in stochastic if m is not None]

    def read(self, x: Tensor) -> LayerReading | Refusal:
        """The parameters and settings for this call on hidden states `x`; for a layer without a `refusal`."""
        reason = refuse_kind(x.dtype, x.device)
        if reason is not None:
            return reason
        t = _tensors(self._sources, x.dtype, x.device)
        if type(t) is Refusal:
            return t
        dropouts = self._dropouts() if self.owner.__dict__["training"] else (0.0, 0.0, 0.0)
        attributes = self._self_attention.__dict__
        size = attributes["attention_head_size"]
        return LayerReading(
            LayerParameters((t[0], t[2], t[4]), (t[1], t[3], t[5]), *t[6:]),
            LayerSettings(
                attributes[self._head_count],
                self._norms[0].eps,
                activation_of(self._find_activation()) or "none",
                *dropouts,
            ),
            attributes.get("scaling", size**-0.5),
        )

    def _dropouts(self) -> tuple[float, float, float]:
        """The probabilities of the attention's, of its output's and of the layer's output's dropout."""
        # In 4.57 the sdpa attention keeps the probability beside the module and reads its own copy.
        attention = self._self_attention.__dict__.get("dropout_prob", self._attention_dropout.p)
        first, second = self._hidden_dropouts
        return attention, 0.0 if first is None else first.p, second.p

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights, as far as one of them tells."""
        return getattr(self.places["query"]._parameters.get("weight"), "dtype", None)

    @property
    def device(self) -> torch.device | None:
        """The device of the weights, as far as one of them tells."""
        return getattr(self.places["query"]._parameters.get("weight"), "device", None)

    @property
    def config(self) -> Any:
        """The configuration that the attention reads at each call; None in transformers 4, where it reads none."""
        return self._self_attention.__dict__.get("config")

    @property
    def adds_mask(self) -> bool:
        """Whether the stock attention adds its mask to the scores, be it boolean or not."""
        if "Sdpa" in type(self._self_attention).__name__:  # transformers 4 has a class for each implementation
            return False
        return self.config is None or self.config._attn_implementation not in SDPA

    def _find_activation(self) -> object:
        owner = self._activation_owner
        return owner._modules.get(self._activation) or owner.__dict__.get(self._activation)

    def refusal(self) -> Refusal | None:
        """Why stock code has to run the layer whatever its input; `refuse_config(self.config)` is another question."""
        for attributes, name, reason in self._switches:
            if attributes[name]:
                return Refusal(reason)
        if self._self_attention.__dict__.get("position_embedding_type", "absolute") != "absolute":
            return Refusal("relative positions")
        activation = self._activation_owner._modules.get(self._activation)
        if activation is not None and (hooks_matter(activation) or "forward" in activation.__dict__):
            return Refusal("the activation has hooks or a forward of its own")
        if activation_of(self._find_activation()) is None:
            return Refusal(f"no kernel for the activation {self._find_activation()}")
        if self._norms[0].eps != self._norms[1].eps:
            return Refusal("the two norms have different eps")
        training = self.owner.__dict__["training"]
        if any(d["training"] is not training for d in self._training):
            return Refusal("parts of the layer are in training mode, others are not")
        if training and max(self._dropouts()) >= 1.0:
            return Refusal("a dropout of everything")
        return super().refusal()

    def watch(self, guard: Guard) -> None:
        """Note all that `refusal` and `read` looked at."""
        super().watch(guard)
        for attributes, name, _ in self._switches:
            guard.entry(attributes, name)
        attention = self._self_attention.__dict__
        for name in ("position_embedding_type", "dropout_prob", "scaling", "attention_head_size", "config"):
            guard.entry(attention, name)
        guard.entry(attention, self._head_count)
        owner = self._activation_owner
        guard.entry(owner._modules, self._activation)
        guard.entry(owner.__dict__, self._activation)
        if (activation := owner._modules.get(self._activation)) is not None:
            watch_module(guard, activation)
        for norm in self._norms:
            guard.entry(norm.__dict__, "eps")
        for dropout in (self._attention_dropout, *self._hidden_dropouts):
            if dropout is not None:
                guard.entry(dropout.__dict__, "p")
        for attributes in (self.owner.__dict__, *self._training):
            guard.entry(attributes, "training")
        _watch_tensors(guard, self._sources)


def refuse_config(config: Any) -> Refusal | None:
    """What a configuration asks for that only stock code does; nothing if it is None."""
    if config is None:
        return None
    if config._attn_implementation not in ("eager", None, *SDPA):
        return Refusal(f"attention implementation {config._attn_implementation}")
    if config.output_attentions:
        return Refusal("attentions wanted")
    if getattr(config, "is_decoder", False):
        return Refusal("decoder")
    return None


def refuse_keywords(arguments: dict[str, object]) -> Refusal | None:
    """An argument of a layer's call that only stock code honours; None and False ask for nothing."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in INERT:
            return Refusal("attentions wanted" if name == "output_attentions" else f"argument {name}")
    return None


class EmbeddingReading(NamedTuple):
    """What one call of the embeddings needs."""

    tensors: tuple[Tensor | None, ...]  # three tables, of which types may be none, the norm's weight and bias
    eps: float
    dropout: float
    padding_idx: int | None
    position_padding_idx: int | None


class EmbeddingStructure(Structure):
    """The embeddings."""

    def __init__(self, embeddings: nn.Module, family: Family) -> None:
        super().__init__(embeddings, family, family.embedding_places)
        tables = [place for place in ("word", "position", "token_type") if place in self.places]
        self._tables = [self.places[place] for place in tables]
        self._norm, self._dropout = self.places["norm"], self.places["dropout"]
        self._sources = [
            (self.places[place]._parameters, name, family.embedding_places[place])
            for place, name in (*((place, "weight") for place in (*tables, "norm")), ("norm", "bias"))
        ]

    def read(self) -> EmbeddingReading | Refusal:
        """The parameters and settings for this call."""
        word = self.places["word"]._parameters.get("weight")
        if word is None:
            return Refusal("the word embeddings have no weight")
        reason = self.refusal() or refuse_kind(word.dtype, word.device)
        if reason is not None:
            return reason
        if self.owner.__dict__.get("position_embedding_type", "absolute") != "absolute":
            return Refusal("relative positions")
        if any(e.max_norm is not None or e.sparse or e.scale_grad_by_freq for e in self._tables):
            return Refusal("an embedding with max_norm, sparse or scale_grad_by_freq")
        words, positions, *types = (e.padding_idx for e in self._tables)
        if types and types[0] is not None:
            return Refusal("token types with a padding_idx")
        dropout = self._dropout.p if self._dropout.training else 0.0
        if dropout >= 1.0:
            return Refusal("a dropout of everything")
        t = _tensors(self._sources, word.dtype, word.device)
        if type(t) is Refusal:
            return t
        if not types:
            t.insert(2, None)
        return EmbeddingReading(tuple(t), self._norm.eps, dropout, words, positions)

    def watch(self, guard: Guard) -> None:
        """Note all that `read` looked at."""
        super().watch(guard)
        guard.entry(self.owner.__dict__, "position_embedding_type")
        for table in self._tables:
            for name in ("max_norm", "sparse", "scale_grad_by_freq", "padding_idx"):
                guard.entry(table.__dict__, name)
        guard.entry(self._norm.__dict__, "eps")
        for name in ("p", "training"):
            guard.entry(self._dropout.__dict__, name)
        _watch_tensors(guard, self._sources)
