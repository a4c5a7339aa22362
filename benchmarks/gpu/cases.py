"""What the op benchmarks measure: each op at BERT's shapes, ours, its specification, and what others compute it with.

Bytes are the fewest that device memory has to move, each input read once and each output written once; FLOPs are those
of the valid tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import VOCABULARY, ragged_lengths
from bertfast import ops, reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
DROPOUT = 0.1
BACKENDS = ("cuda", "triton", "reference")
CPU_BACKENDS = ("cpu", "reference")
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """Another way to compute the op; convert makes its inputs of the case's, outside of what is timed.

    captured: whether a CUDA graph may hold it; False where it waits for the GPU.
    """

    function: Function
    convert: Callable[..., tuple] | None = None
    captured: bool = True


@dataclass(frozen=True)
class Case:
    """An op at one shape, dtype and direction."""

    op: str
    shape: str
    dtype: str
    direction: str
    make: Callable[[torch.Generator], tuple]  # the inputs; floating-point ones get gradients
    ours: Function
    gold: Function  # the specification, on the inputs in float64
    plain: Function  # plain PyTorch in the dtype under test: how far that is off is what ours is allowed
    peers: dict[str, Peer]
    flops: float
    nbytes: float
    device: str
    backends: tuple[str, ...] = BACKENDS
    compiled: Function | None = None  # to be handed to torch.compile as a further peer
    goals: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.direction}"

    def inputs(self, seed: int) -> tuple:
        """A set of inputs of its own; leaves of autograd unless only the forward is measured."""
        made = self.make(torch.Generator(self.device).manual_seed(seed))
        return made if self.direction == FORWARD else tuple(map(_leaf, made))

    def results(self, function: Function, inputs: tuple) -> list[Tensor]:
        """The output and, where a backward is measured, the gradients of the floating-point inputs."""
        if self.direction == FORWARD:
            with torch.no_grad():
                return [function(*inputs)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, _leaves(inputs), self._dout(out))]

    def call(self, function: Function, inputs: tuple) -> Callable[[], Any]:
        """What is timed. Has to be made on the stream that it is going to run on."""
        if self.direction == FORWARD:
            return lambda: _without_gradients(function, inputs)
        leaves = _leaves(inputs)
        out = function(*inputs)
        dout = self._dout(out)
        if self.direction == BOTH:
            return lambda: torch.autograd.grad(function(*inputs), leaves, dout)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def _dout(self, out: Tensor) -> Tensor:
        """The same random gradient for everybody, whatever the dtype."""
        generator = torch.Generator(self.device).manual_seed(1234)
        return torch.randn(out.shape, generator=generator, device=self.device).to(_dtype(self.dtype)).to(out.dtype)


@torch.no_grad()
def _without_gradients(function: Function, inputs: tuple) -> Tensor:
    return function(*inputs)


def _leaf(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(inputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]


def _dtype(name: str) -> torch.dtype:
    return DTYPES[name]


def _size(dtype: str) -> int:
    return torch.empty((), dtype=_dtype(dtype)).element_size()


def _normal(generator: torch.Generator, *shape: int, dtype: str, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    x = torch.randn(shape, generator=generator, device=generator.device) * scale + shift
    return x.to(_dtype(dtype))


def _seed(generator: torch.Generator) -> Tensor:
    return torch.randint(1 << 62, (1,), generator=generator, device=generator.device)


def _row_multiplier(x: Tensor, seed: Tensor) -> Tensor:
    """The multipliers of `reference.dropout` in x's dtype."""
    return reference.dropout(torch.ones(x.shape, device=x.device), DROPOUT, seed).to(x.dtype)


def _key_multiplier(weights: Tensor, sequence: int, seed: Tensor) -> Tensor:
    """The multipliers of `reference.varlen_attention` for the probabilities (heads, S, S) of one sequence."""
    heads, queries, keys = weights.shape
    query = torch.arange(queries, device=weights.device)[:, None]
    head = torch.arange(heads, device=weights.device)[:, None, None]
    counter = (query, head, torch.full_like(query, sequence))
    return reference.dropout_multiplier(seed, DROPOUT, keys, counter, distance=8).to(weights.dtype)


# Memory-bound ops. Each keeps the rate of a copy where it moves nothing twice and waits for nothing.
BANDWIDTH_GOAL = {"share of copy bandwidth": 0.8}


def gelu(tokens: int, columns: int, dtype: str, direction: str, device: str, headline: bool = False) -> Case:
    """bias_gelu."""

    def make(g: torch.Generator) -> tuple:
        return _normal(g, tokens, columns, dtype=dtype, scale=2.0), _normal(g, columns, dtype=dtype)

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    nbytes = (2 if direction == FORWARD else 3) * tokens * columns * _size(dtype)
    return Case(
        "bias_gelu",
        f"{tokens}x{columns}",
        dtype,
        direction,
        make,
        ops.bias_gelu,
        reference.bias_gelu,
        eager,
        {"eager": Peer(eager)},
        0,
        nbytes,
        device,
        compiled=eager if headline else None,
        goals=BANDWIDTH_GOAL if headline else {},
    )


def norm(
    tokens: int, hidden: int, dtype: str, direction: str, device: str, dropout: bool = False, headline: bool = False
) -> Case:
    """residual_layer_norm."""

    def make(g: torch.Generator) -> tuple:
        vectors = [_normal(g, hidden, dtype=dtype, scale=0.3, shift=s) for s in (1.0, 0.0, 0.0)]
        return *(_normal(g, tokens, hidden, dtype=dtype) for _ in range(2)), *vectors, _seed(g)

    def ours(x, residual, weight, bias, x_bias, seed):
        p = DROPOUT if dropout else 0.0
        return ops.residual_layer_norm(x, residual, weight, bias, 1e-12, x_bias=x_bias, dropout_p=p, seed=seed)

    def gold(x, residual, weight, bias, x_bias, seed):
        p = DROPOUT if dropout else 0.0
        return reference.residual_layer_norm(x, residual, weight, bias, 1e-12, x_bias, p, seed)

    def plain(x, residual, weight, bias, x_bias, seed):
        y = x + x_bias
        y = y * _row_multiplier(y, seed) if dropout else y
        return F.layer_norm(y + residual, (hidden,), weight, bias, 1e-12)

    def eager(x, residual, weight, bias, x_bias, seed):
        return F.layer_norm(F.dropout(x + x_bias, DROPOUT, dropout) + residual, (hidden,), weight, bias, 1e-12)

    # Read x and residual, write the output; backward: read dout, x and residual, write the gradients of both, which
    # are one tensor without dropout.
    matrices = 3 if direction == FORWARD else 5 if dropout else 4
    return Case(
        "residual_layer_norm" + (" dropout" if dropout else ""),
        f"{tokens}x{hidden}",
        dtype,
        direction,
        make,
        ours,
        gold,
        plain,
        {"eager": Peer(eager)},
        0,
        matrices * tokens * hidden * _size(dtype),
        device,
        compiled=eager if headline else None,
        goals=BANDWIDTH_GOAL if headline else {},
    )


def embedding(tokens: int, hidden: int, dtype: str, direction: str, device: str, headline: bool = False) -> Case:
    """embed_layer_norm, of sequences of 128 tokens."""
    length, words = min(128, tokens), min(VOCABULARY, 30000)

    def make(g: torch.Generator) -> tuple:
        ids = torch.randint(words, (tokens,), generator=g, device=g.device)
        positions = torch.arange(tokens, device=g.device) % length
        types = torch.randint(2, (tokens,), generator=g, device=g.device)
        tables = [_normal(g, rows, hidden, dtype=dtype) for rows in (words, 512, 2)]
        weight, bias = _normal(g, hidden, dtype=dtype, shift=1.0), _normal(g, hidden, dtype=dtype)
        return ids, positions, types, *tables, weight, bias

    def ours(*inputs: Tensor) -> Tensor:
        return ops.embed_layer_norm(*inputs, 1e-12)

    def eager(ids, positions, types, word, position, token_type, weight, bias):
        y = F.embedding(ids, word) + F.embedding(types, token_type) + F.embedding(positions, position)
        return F.layer_norm(y, (hidden,), weight, bias, 1e-12)

    # The rows of the words that are looked up, as many as are expected to differ, and of the other tables.
    rows = words * (1 - (1 - 1 / words) ** tokens) + length + 2
    matrix, ids = tokens * hidden * _size(dtype), 3 * 8 * tokens
    if direction == FORWARD:
        nbytes = ids + rows * hidden * _size(dtype) + matrix
    else:  # read ids, dout and the rows; write three whole tables
        nbytes = ids + matrix + (rows + words + 512 + 2) * hidden * _size(dtype)
    return Case(
        "embed_layer_norm",
        f"{tokens}x{hidden}",
        dtype,
        direction,
        make,
        ours,
        lambda *inputs: reference.embed_layer_norm(*inputs, 1e-12),
        eager,
        {"eager": Peer(eager)},
        0,
        nbytes,
        device,
        compiled=eager if headline else None,
        goals=BANDWIDTH_GOAL if headline else {},
    )


def linear(
    tokens: int, columns: int, depth: int, activation: str, dtype: str, device: str, headline: bool = False
) -> Case:
    """linear with one weight, forward: cuBLAS with bias_gelu against Triton's GEMM with the activation in it."""

    def make(g: torch.Generator) -> tuple:
        weight = _normal(g, columns, depth, dtype=dtype, scale=depth**-0.5)
        return _normal(g, tokens, depth, dtype=dtype), weight, _normal(g, columns, dtype=dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if activation == "none" else F.gelu(y)

    return Case(
        f"linear {activation}",
        f"{tokens}x{columns}x{depth}",
        dtype,
        FORWARD,
        make,
        lambda x, weight, bias: ops.linear(x, weight, bias, activation=activation),
        lambda x, weight, bias: reference.linear(x, [weight], [bias], activation),
        eager,
        {"eager": Peer(eager)},
        2.0 * tokens * columns * depth,
        (tokens * depth + columns * depth + tokens * columns) * _size(dtype),
        device,
        compiled=eager if headline else None,
    )


def qkv(tokens: int, hidden: int, dtype: str, device: str) -> Case:
    """linear with three weights that lie apart, against one GEMM over neighbours and one over a copy."""

    def make(g: torch.Generator) -> tuple:
        weights = [_normal(g, hidden, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(3)]
        return _normal(g, tokens, hidden, dtype=dtype), *weights, *(_normal(g, hidden, dtype=dtype) for _ in range(3))

    def ours(x: Tensor, *t: Tensor) -> Tensor:
        return ops.linear(x, t[:3], t[3:])

    def copied(x: Tensor, *t: Tensor) -> Tensor:
        return F.linear(x, torch.cat(t[:3]), torch.cat(t[3:]))

    def neighbours(x: Tensor, *t: Tensor) -> tuple:
        return x, *torch.cat(t[:3]).split(hidden), *torch.cat(t[3:]).split(hidden)

    columns = 3 * hidden
    return Case(
        "linear qkv",
        f"{tokens}x{columns}x{hidden}",
        dtype,
        FORWARD,
        make,
        ours,
        lambda x, *t: reference.linear(x, t[:3], t[3:]),
        copied,
        {"a copy of the weights": Peer(copied), "neighbours": Peer(ours, neighbours)},
        2.0 * tokens * columns * hidden,
        (tokens * hidden + columns * hidden + tokens * columns) * _size(dtype),
        device,
    )


SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def attention(
    lengths: Sequence[int],
    heads: int,
    size: int,
    dtype: str,
    direction: str,
    device: str,
    name: str,
    dropout: bool = False,
) -> Case:
    """varlen_attention against each backend of PyTorch's attention: on the same tokens, padded where they are ragged.

    The others are given query, key and value apart and already padded, which is not timed.
    """
    tokens, longest, sequences = sum(lengths), max(lengths), len(lengths)
    p = DROPOUT if dropout else 0.0
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    valid = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).to(device)
    full = all(length == longest for length in lengths)
    order = torch.tensor(lengths).argsort(descending=True).to(torch.int32).to(device)

    def make(g: torch.Generator) -> tuple:
        return _normal(g, tokens, 3, heads, size, dtype=dtype), _seed(g)

    def ours(qkv: Tensor, seed: Tensor) -> Tensor:
        return ops.varlen_attention(
            qkv, borders, max_seqlen=longest, order=order, dropout_p=p, seed=seed if dropout else None
        )

    def gold(qkv: Tensor, seed: Tensor) -> Tensor:
        return reference.varlen_attention(qkv, borders, None, p, seed)

    def plain(qkv: Tensor, seed: Tensor) -> Tensor:
        outputs = []
        for b, part in enumerate(qkv.split(list(lengths))):
            q, k, v = part.permute(1, 2, 0, 3)
            weights = torch.softmax(q @ k.transpose(1, 2) * size**-0.5, dim=-1)
            weights = weights * _key_multiplier(weights, b, seed) if dropout else weights
            outputs.append((weights @ v).transpose(0, 1))
        return torch.cat(outputs)

    def padded(qkv: Tensor, seed: Tensor) -> tuple:
        rectangle = qkv.new_zeros(sequences, longest, 3, heads, size)
        rectangle[valid] = qkv.detach()
        parts = (t.contiguous().transpose(1, 2) for t in rectangle.unbind(2))
        return tuple(t.requires_grad_(qkv.requires_grad) for t in parts)

    mask = None if full else valid[:, None, None]

    def sdpa(which: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    def nested(qkv: Tensor, seed: Tensor) -> tuple:
        offsets = borders.long()
        parts = (
            torch.nested.nested_tensor_from_jagged(t.detach().contiguous(), offsets, max_seqlen=longest)
            for t in qkv.unbind(1)
        )
        return tuple(t.requires_grad_(qkv.requires_grad) for t in parts)

    def jagged(which: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(which):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).values()

    peers = {n: Peer(functools.partial(sdpa, which), padded) for n, which in SDPA.items()}
    if not full:
        for n in ("sdpa flash", "sdpa efficient"):
            peers[f"{n} nested"] = Peer(functools.partial(jagged, SDPA[n]), nested, captured=False)
    squares = sum(length * length for length in lengths)
    forward, backward = 4.0 * squares * heads * size, 10.0 * squares * heads * size
    matrix = tokens * heads * size * _size(dtype)
    flops = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]
    matrices = {FORWARD: 4, BACKWARD: 8, BOTH: 12}[direction]
    goals: dict[str, float] = {}
    if longest <= 512 and dtype != "float32":
        if direction == FORWARD and not dropout:
            goals = {"against the best of sdpa": 1.5 if longest <= 128 else 1.0}
        elif direction == BOTH and dropout:
            goals = {"against the best of sdpa": 1.2}
    return Case(
        "varlen_attention" + (" dropout" if dropout else ""),
        f"{name} {heads}x{size}",
        dtype,
        direction,
        make,
        ours,
        gold,
        plain,
        peers,
        flops,
        matrices * matrix,
        device,
        backends=("cuda", "triton"),  # the reference goes through the sequences one by one
        goals=goals,
    )


def small(device: str) -> list[Case]:
    """Each op once, in both directions, as small as it shows something."""
    short = (33, 1, 0, 64, 7)
    made = [
        gelu(37, 96, "float32", BOTH, device),
        norm(37, 96, "float32", BOTH, device, dropout=True),
        embedding(37, 96, "float32", BOTH, device),
        linear(37, 72, 96, "gelu", "float32", device),
        qkv(37, 48, "float32", device),
        attention(short, 2, 32, "float32", BOTH, device, "ragged", dropout=True),
    ]
    if device == "cpu":
        return made
    half = [
        gelu(37, 96, "bfloat16", BOTH, device),
        norm(37, 96, "float16", BOTH, device),
        linear(130, 136, 96, "gelu", "bfloat16", device),
        attention(short, 2, 64, "bfloat16", BOTH, device, "ragged", dropout=True),
        attention((300, 17), 2, 64, "float16", BOTH, device, "long"),
    ]
    return made + half


def all_cases(device: str, quick: bool) -> Iterator[Case]:
    """The most telling first: headlines, attention by length, then other dtypes, sizes and models."""
    if quick:
        yield from small(device)
        yield gelu(40, 96, "bfloat16", FORWARD, device, headline=True)
        return
    half, many = "bfloat16", 16384
    for direction in (FORWARD, BACKWARD):
        yield norm(many, 768, half, direction, device, headline=True)
        yield gelu(many, 3072, half, direction, device, headline=True)
    by_length = {length: (length,) * (many // length) for length in (32, 64, 128, 256, 384, 512)}
    ragged = ragged_lengths(64, 512, 0.4)
    for length in (128, 512, 64, 256, 384, 32):
        yield attention(by_length[length], 12, 64, half, FORWARD, device, f"{len(by_length[length])}x{length}")
    yield attention(ragged, 12, 64, half, FORWARD, device, "64x512 40% filled")
    yield linear(many, 3072, 768, "gelu", half, device, headline=True)
    yield norm(many, 768, half, BACKWARD, device, dropout=True, headline=True)
    for length in (128, 512, 256):
        name = f"{len(by_length[length])}x{length}"
        yield attention(by_length[length], 12, 64, half, BOTH, device, name, dropout=True)
    yield attention(ragged, 12, 64, half, BOTH, device, "64x512 40% filled", dropout=True)
    for direction in (FORWARD, BACKWARD):
        yield embedding(many, 768, half, direction, device, headline=True)
    yield qkv(many, 768, half, device)
    yield from _other_linears(half, device)
    yield norm(many, 768, half, FORWARD, device, dropout=True)
    for length in (64, 128):
        yield attention(by_length[length], 12, 32, half, FORWARD, device, f"{len(by_length[length])}x{length}")
    yield attention(by_length[384], 16, 64, half, FORWARD, device, f"{len(by_length[384])}x384")
    for dtype in ("float16", "float32"):
        for length in (128, 512):
            yield attention(by_length[length], 12, 64, dtype, FORWARD, device, f"{len(by_length[length])}x{length}")
        for direction in (FORWARD, BACKWARD):
            yield norm(many, 768, dtype, direction, device)
            yield gelu(many, 3072, dtype, direction, device)
            yield embedding(many, 768, dtype, direction, device)
    for length in (512, 128):
        yield attention(by_length[length], 12, 64, half, BACKWARD, device, f"{len(by_length[length])}x{length}")
    for tokens, hidden in ((128, 768), (1024, 768), (65536, 768), (many, 1024), (many, 384)):
        for direction in (FORWARD, BACKWARD):
            yield norm(tokens, hidden, half, direction, device)
            yield gelu(tokens, 4 * hidden, half, direction, device)
        yield embedding(tokens, hidden, half, FORWARD, device)


def _other_linears(dtype: str, device: str) -> Iterator[Case]:
    """Up-projections by tokens and model, where the epilogue could pay, and the other GEMMs, where it hardly can."""
    for tokens in (128, 1024, 4096, 65536):
        yield linear(tokens, 3072, 768, "gelu", dtype, device)
    yield linear(16384, 4096, 1024, "gelu", dtype, device)
    yield linear(16384, 1536, 384, "gelu", dtype, device)
    for columns, depth in ((2304, 768), (768, 3072)):
        yield linear(16384, columns, depth, "none", dtype, device)
    for tokens in (128, 1024):
        yield qkv(tokens, 768, dtype, device)
