"""patch(model): run a live Hugging Face model on the fused ops, without padding, in place; unpatch; explain.

The module tree, the parameters, `state_dict`, hooks, adapters and heads stay as they are. What changes is the class
of the layer, encoder and embedding instances, to subclasses of their own that decide per call, and two hooks on the
base model (see `bertfast.seams` and `bertfast.planning`).
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bertfast import backend, native
from bertfast.architectures import Family, Reads, families, head_of, role_of, stock_class
from bertfast.calls import STATE, BackboneState, HeadState, LayerState, calls
from bertfast.errors import UnsupportedModelError
from bertfast.gate import closed
from bertfast.layer import LayerPacks
from bertfast.planning import after_backbone, after_head, before_backbone, before_head, pooled_tokens, span_logits
from bertfast.runtime.compute import operand_of
from bertfast.seams import is_seam, seam_class
from bertfast.word_loss import scores_words, withhold_from

Padding = Literal["exact", "drop"]
T = TypeVar("T")
_OPS = ("embed_layer_norm", "linear", "varlen_attention", "residual_layer_norm", "bias_gelu")


def patch(
    model: T,
    *,
    padding: Padding = "exact",
    pack_weights: bool = True,
    compute: str | None = None,
    output_logits: bool = True,
) -> T:
    """Make every BERT inside `model` run on the fused ops without padding. Returns the same object.

    Args:
        model: a transformers model, a SentenceTransformer, a CrossEncoder, or any module that has such a model inside.
        padding: "exact" keeps stock's numbers wherever a head reads padding positions: the pooler under left padding,
            the question-answering head, losses with labels on padding; such calls run the fused ops on the whole
            rectangle. "drop" runs every call without padding: position 0 holds a sequence's first token, wherever that
            stands, and no answer begins in padding. Hidden states at other padding positions are zero then, as they
            are in "exact" where no head of transformers reads them.
        pack_weights: keep a second, packed copy of the layers' weights for inference on the CPU, which the encoder
            needs to run as one native call. See `bertfast.ops.PackedWeights` for what may change weights unseen.
        compute: "bf16" has the GEMMs of inference on the CPU multiply in bfloat16 whatever the weights are, with
            residuals and statistics in float32; None: in what the weights are. A warning says where the processor has
            no instructions for it. It changes nothing in training and on GPUs, where `.to` and autocast are for that.
        output_logits: False lets a masked language model that is given labels compute its loss from the labelled tokens
            alone and return no words' scores, which are what training takes most memory for. Calls without labels
            return them as ever.

    What the fused path cannot do (decoders, attention maps, replaced submodules, torch.compile, ...) runs stock code
    for that call; `explain` counts it with the reason. Patching again changes the options, and undoes
    `bertfast.quantize`. Calls in other threads are waited for. Patch before wrapping layers in FSDP. Raises
    UnsupportedModelError where there is no supported model inside, ValueError for unknown options, and for
    output_logits=False where there is no masked language model; RuntimeError from within a call.
    """
    if padding not in ("exact", "drop"):
        raise ValueError(f'padding must be "exact" or "drop", not {padding!r}')
    root = root_of(model)
    found = list(backbones(root))
    if not found:
        raise UnsupportedModelError(_what_is_there(model, root))
    if not output_logits and not any(head_of(type(m)) and scores_words(m) for m in root.modules()):
        raise ValueError(
            f"output_logits=False is for masked language models, and there is none in this {_name(type(model))}"
        )
    operand = operand_of(compute, pack_weights)
    with closed(calls.frames, calls.heads):
        for _, backbone, family in found:
            _patch_backbone(backbone, family, padding, pack_weights, operand)
        for module in root.modules():
            family, reads = head_of(type(module)) or (None, None)
            base = None if family is None else getattr(module, family.prefix, None)
            if isinstance(base, nn.Module) and isinstance(base.__dict__.get(STATE), BackboneState):
                if reads == "summary":
                    reads = "first" if module.sequence_summary.summary_type == "first" else "all"
                base.__dict__[STATE].reads = reads
                if STATE not in module.__dict__:
                    _patch_head(module, family, reads)
                state: HeadState = module.__dict__[STATE]
                state.output_logits = output_logits or not scores_words(module)
                if not state.output_logits:
                    withhold_from(module, state)
    return model


def _patch_head(model: nn.Module, family: Family, reads: Reads) -> None:
    handles = [
        model.register_forward_pre_hook(before_head, with_kwargs=True),
        model.register_forward_hook(after_head, always_call=True),
    ]
    if reads == "span":
        handles.append(model.qa_outputs.register_forward_hook(span_logits))
    model.__dict__[STATE] = HeadState(family, reads, handles=handles)


def _patch_backbone(
    model: nn.Module, family: Family, padding: Padding, pack_weights: bool, operand: str | None
) -> None:
    state = model.__dict__.get(STATE)
    if state is None:
        pooler = None if family.pooler is None else getattr(model, family.pooler, None)
        state = BackboneState(family, padding, pack_weights, pooled=pooler is not None)
        model.__dict__[STATE] = state
        state.handles = [
            model.register_forward_pre_hook(before_backbone, with_kwargs=True),
            model.register_forward_hook(after_backbone, always_call=True),
        ]
        if pooler is not None:
            state.handles.append(pooler.register_forward_pre_hook(pooled_tokens))
    state.padding, state.pack_weights, state.operand, state.snapshot = padding, pack_weights, operand, None
    packs = functools.partial(LayerPacks.empty, operand) if pack_weights else LayerPacks
    for module in model.modules():
        role = (role_of(stock_class(type(module))) or (None, None))[1]
        if role in ("encoder", "embeddings", "layer") and (is_seam(module) or role_of(type(module)) is not None):
            if role != "layer":
                module.__dict__[STATE] = state
            elif STATE not in module.__dict__:
                module.__dict__[STATE] = LayerState(family, packs())
            elif module.__dict__[STATE].packs.operands != ({operand} if pack_weights else set()):
                module.__dict__[STATE].packs = packs()
            if not is_seam(module):
                module.__class__ = seam_class(type(module))


def unpatch(model: T) -> T:
    """Undo `patch`: the same objects with their own classes, without our hooks and state. Returns the same object.

    Does nothing to a model that is not patched. Raises UnsupportedModelError where a patched module was wrapped into
    another class afterwards, as FSDP does: undo that first.
    """
    with closed(calls.frames, calls.heads):
        _unpatch([m for m in root_of(model).modules() if STATE in m.__dict__])
    return model


def _unpatch(modules: list[nn.Module]) -> None:
    for module in modules:
        state = module.__dict__[STATE]
        if not is_seam(module) and not (isinstance(state, HeadState) or role_of(type(module)) is not None):
            raise UnsupportedModelError(f"a patched module has become a {_name(type(module))}: undo that first")
    for module in modules:
        state = module.__dict__.pop(STATE)
        if is_seam(module):
            module.__class__ = stock_class(type(module))
        else:
            for handle in state.handles:
                handle.remove()


def root_of(model: Any) -> nn.Module:
    """The module to look into. Cross-encoders were plain objects around `.model` before sentence-transformers 4."""
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        if isinstance(inner, nn.Module):
            return inner
        raise UnsupportedModelError(f"{_name(type(model))} is neither a torch.nn.Module nor has one as `.model`")
    return model


def backbones(root: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    """The base models inside, by their names as `named_modules` has them."""
    for name, module in root.named_modules():
        role = role_of(type(module))
        if role is not None and role[1] == "model":
            yield name, module, role[0]


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a base model, patched or not."""
    for name, module in model.named_modules():
        if (role_of(stock_class(type(module))) or (None, None))[1] == "layer":
            yield name, module


def _what_is_there(model: Any, root: nn.Module) -> str:
    models = {type(m) for m in root.modules() if hasattr(type(m), "from_pretrained") and hasattr(m, "config")}
    kinds = sorted(_name(kind) for kind in models - {type(model)})
    found = f" with {', '.join(kinds)} inside" if kinds else ""
    known = ", ".join(family.model for family in families())
    return (
        f"no supported model in this {_name(type(model))}{found}: patch knows transformers' {known} and what is built "
        "on them (the exact classes, not subclasses)"
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True)
class BackboneReport:
    """What one base model did since it was patched.

    calls: how many ran packed, on the rectangle with fused layers, and on stock code. reasons: why calls, or parts of
    them, were not packed or not fused, with how often. native_calls: how many of them ran all layers in one call.
    encoder: whether the next one will, and in what precision, or why not. ops: the backend of each op for the model's
    dtype and device, with what was refused. packed_bytes: memory of the packed weights. workspace_bytes: what native
    calls keep for further ones, once for each that ran at the same time.
    """

    name: str
    model: str
    patched: bool
    dtype: str
    device: str
    layers: int
    options: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    native_calls: int = 0
    encoder: str = ""
    ops: dict[str, dict[str, Any]] = field(default_factory=dict)
    packed_bytes: int = 0
    workspace_bytes: int = 0

    def __str__(self) -> str:
        head = f"{self.name or '(the model itself)'}: {self.model}, {self.layers} layers, {self.dtype} on {self.device}"
        if not self.patched:
            return f"{head}\n  not patched"
        lines = [
            head,
            "  options   " + ", ".join(f"{k}={v!r}" for k, v in self.options.items()),
            "  calls     " + ", ".join(f"{n} {kind}" for kind, n in self.calls.items()),
            *(f"    {n:>6}  {reason}" for reason, n in sorted(self.reasons.items(), key=lambda item: -item[1])),
            f"  encoder   {self.encoder}; {self.native_calls} calls in one piece",
            f"  packed    {self.packed_bytes / 1e6:.1f} MB of weights",
            f"  workspace {self.workspace_bytes / 1e6:.1f} MB",
        ]
        for op, choice in self.ops.items():
            refused = "".join(f"; {backend}: {reason}" for backend, reason in choice["refused"].items())
            lines.append(f"  {op:<20} {choice['backend']}{refused}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What `explain` found: one entry for each base model. `str()` prints it, `to_dict()` is for JSON."""

    backbones: tuple[BackboneReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists, strings and numbers."""
        return {"backbones": [asdict(b) for b in self.backbones]}

    def __str__(self) -> str:
        return "\n".join(str(b) for b in self.backbones)


def explain(model: Any) -> Report:
    """What each base model inside did since `patch`, on which backends, and what kept calls from the fast path.

    Raises UnsupportedModelError where there is no supported model inside.
    """
    root = root_of(model)
    reports = tuple(_explain(name, module) for name, module, _ in backbones(root))
    if not reports:
        raise UnsupportedModelError(_what_is_there(model, root))
    return Report(reports)


def _explain(name: str, model: nn.Module) -> BackboneReport:
    weight = next(model.parameters(), torch.empty(0))
    state = model.__dict__.get(STATE)
    layers = [layer for _, layer in layers_of(model)]
    about = {
        "name": name,
        "model": _name(type(model)),
        "patched": state is not None,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "layers": len(layers),
    }
    if state is None:
        return BackboneReport(**about)
    choices = _choices(weight, model.config.hidden_size // model.config.num_attention_heads)
    if state.family.position_bias is not None:
        choices["varlen_attention"] = backend.Choice("varlen_attention", "PyTorch's, for relative positions")
    return BackboneReport(
        **about,
        options={"padding": state.padding, "pack_weights": state.pack_weights, "compute": state.operand},
        calls={kind: state.calls[kind] for kind in ("packed", "rectangle", "stock")},
        reasons=dict(state.reasons),
        native_calls=state.calls["native"],
        encoder=_describe_encoder(state, layers, about["dtype"]),
        ops={line: {"backend": c.backend, "refused": dict(c.refused)} for line, c in choices.items()},
        packed_bytes=sum(m.__dict__[STATE].packs.nbytes for m in layers if STATE in m.__dict__),
        workspace_bytes=0 if state.snapshot is None else state.snapshot.native.workspace_bytes,
    )


def _describe_encoder(state: BackboneState, layers: list[nn.Module], dtype: str) -> str:
    """How the layers run in inference: "one native call (avx2), multiplying int8, bfloat16 in layer 3 down"."""
    found = [m.__dict__[STATE].packs._asdict().items() for m in layers if STATE in m.__dict__]
    operands = {f"layer {i} {gemm}": p.operand or dtype for i, packs in enumerate(found) for gemm, p in packs if p}
    most = Counter(operands.values()).most_common(1)
    others = [f"{operand} in {place}" for place, operand in operands.items() if operand != most[0][0]]
    return ", ".join([_describe_calls(state), *(f"multiplying {operand}" for operand, _ in most), *others])


def _describe_calls(state: BackboneState) -> str:
    if state.family.position_bias is not None:
        return "op by op: relative positions"
    if state.snapshot is None or not state.snapshot.guard.holds():
        return "op by op, until a call in evaluation mode has found nothing that asks for it"
    if state.snapshot.native.refusal is not None:
        return f"op by op: {state.snapshot.native.refusal}"
    return f"one native call ({native.cpu.isa()})"


def _choices(weight: Tensor, head_size: int) -> dict[str, backend.Choice]:
    """What runs each op; attention's long sequences and its backward have lines of their own where that is another."""

    def ask(op: str, length: int | None = None) -> backend.Choice:
        return backend.explain(op, weight.device, weight.dtype, length and (head_size, length))

    choices = {op: ask(op) for op in _OPS if op != "varlen_attention"}
    choices["varlen_attention"] = short = ask("varlen_attention", 128)
    if backend.current() == "auto":  # an explicit choice is one for all of them
        others = {
            "varlen_attention, more than 128 tokens": ask("varlen_attention", 256),
            "varlen_attention, backward": ask("varlen_attention_backward", 128),
        }
        choices |= {line: choice for line, choice in others.items() if choice.backend != short.backend}
    return choices
