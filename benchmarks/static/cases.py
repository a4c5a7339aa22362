"""What BERT asks of the Triton kernels: calls of their launchers, with tensors that have no memory.

The shapes are those of MiniLM, BERT-base and BERT-large, and of whatever other model it takes to reach each line of the
kernels' tables of tiles. What kernels are told of sizes (whether 16 divides them, above all) is the same for all
batches, so one number of tokens stands for all.
"""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.static.capture import Kernel
from bertfast import kernels
from bertfast.kernels import attention, attention_tiled, embedding, gelu, linear, masked_attention, norm

TOKENS, SEQUENCES, VOCABULARY, POSITIONS = 8192, 64, 30522, 512
EPS, DROPOUT = 1e-12, 0.1
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BFLOAT16, FLOAT16, FLOAT32)


class Model(NamedTuple):
    hidden: int
    intermediate: int
    heads: int


MODELS = {"MiniLM": Model(384, 1536, 12), "base": Model(768, 3072, 12), "large": Model(1024, 4096, 16)}
BASE = MODELS["base"]


class Case(NamedTuple):
    """A call that launches kernels: "bias_gelu forward base bfloat16"."""

    name: str
    call: Callable[[], Any]
    half: bool
    main: bool = False  # only the first kernel that it launches is of interest, other cases have the others


def cases(architecture: int) -> Iterator[Case]:
    """All of them, for GPUs of this architecture."""
    for family in (_gelu, _norm, _embedding, _attention, _masked_attention):
        yield from family()
    yield from _linear(architecture)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _case(op: str, about: str, dtype: torch.dtype, function: Callable[..., Any], *arguments: Any) -> Case:
    name = " ".join(word for word in (op, about, str(dtype).removeprefix("torch.")) if word)
    return Case(name, partial(function, *arguments), dtype != FLOAT32)


def _shapes() -> Iterator[tuple[str, Model, torch.dtype]]:
    """Every model in bfloat16, and base in the other dtypes."""
    for name, model in MODELS.items():
        for dtype in DTYPES if name == "base" else (BFLOAT16,):
            yield name, model, dtype


def _seed() -> Tensor:
    return _meta(1, dtype=torch.int64)


def _gelu() -> Iterator[Case]:
    def tensors(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _meta(TOKENS, columns, dtype=dtype), _meta(columns, dtype=dtype)

    for name, model, dtype in _shapes():
        x, bias = tensors(model.intermediate, dtype)
        yield _case("bias_gelu forward", name, dtype, gelu.bias_gelu_fwd, x, bias, "none")
        yield _case("bias_gelu backward", name, dtype, gelu.bias_gelu_bwd, x, x, bias, "none")
    for dtype in (BFLOAT16, FLOAT32):
        x, bias = tensors(BASE.intermediate, dtype)
        yield _case("bias_gelu forward", "base tanh", dtype, gelu.bias_gelu_fwd, x, bias, "tanh")
        yield _case("bias_gelu backward", "base tanh", dtype, gelu.bias_gelu_bwd, x, x, bias, "tanh")
    x, _ = tensors(BASE.intermediate, BFLOAT16)
    yield _case("bias_gelu forward", "base without bias", BFLOAT16, gelu.bias_gelu_fwd, x, None, "none")
    yield _case("bias_gelu backward", "base without bias", BFLOAT16, gelu.bias_gelu_bwd, x, x, None, "none")


def _norm() -> Iterator[Case]:
    def forward(hidden: int, dtype: torch.dtype, p: float, save: bool) -> None:
        x, vector = _meta(TOKENS, hidden, dtype=dtype), _meta(hidden, dtype=dtype)
        seed = _seed() if p else None
        norm.residual_layer_norm_fwd(x, x, vector, vector, vector, EPS, p, seed, save)

    def backward(hidden: int, dtype: torch.dtype, p: float) -> None:
        x, vector, row = _meta(TOKENS, hidden, dtype=dtype), _meta(hidden, dtype=dtype), _meta(TOKENS, dtype=FLOAT32)
        norm.residual_layer_norm_bwd(x, x, x, vector, vector, row, row, EPS, p, _seed() if p else None)

    for name, model, dtype in _shapes():
        yield _case("residual_layer_norm forward", name, dtype, forward, model.hidden, dtype, 0.0, False)
        yield _case(
            "residual_layer_norm forward", f"{name} training", dtype, forward, model.hidden, dtype, DROPOUT, True
        )
        yield _case("residual_layer_norm backward", f"{name} training", dtype, backward, model.hidden, dtype, DROPOUT)
    yield _case("residual_layer_norm backward", "base no dropout", BFLOAT16, backward, BASE.hidden, BFLOAT16, 0.0)
    for hidden in norm.TILES:
        if hidden not in (512, 1024):  # those are MiniLM's, and the others'
            for op, call in (("forward", forward), ("backward", backward)):
                settings = (DROPOUT, True) if call is forward else (DROPOUT,)
                made = _case(
                    f"residual_layer_norm {op}", f"hidden {hidden}", BFLOAT16, call, hidden, BFLOAT16, *settings
                )
                yield made._replace(main=True)


def _embedding() -> Iterator[Case]:
    def tables(hidden: int, dtype: torch.dtype) -> list[Tensor]:
        vectors = [_meta(hidden, dtype=dtype) for _ in range(2)]
        return [*(_meta(rows, hidden, dtype=dtype) for rows in (VOCABULARY, POSITIONS, 2)), *vectors]

    ids = (_meta(TOKENS, dtype=torch.int64),) * 3

    def forward(hidden: int, dtype: torch.dtype, p: float, save: bool) -> None:
        embedding.embed_layer_norm_fwd(ids, tables(hidden, dtype), EPS, p, _seed() if p else None, save)

    def backward(hidden: int, dtype: torch.dtype, p: float) -> None:
        dout, row = _meta(TOKENS, hidden, dtype=dtype), _meta(TOKENS, dtype=FLOAT32)
        embedding.embed_layer_norm_bwd(dout, ids, tables(hidden, dtype), row, row, EPS, p, _seed() if p else None)

    for name, model, dtype in _shapes():
        yield _case("embed_layer_norm forward", name, dtype, forward, model.hidden, dtype, 0.0, False)
        if dtype != FLOAT16:
            about = f"{name} training"
            yield _case("embed_layer_norm forward", about, dtype, forward, model.hidden, dtype, DROPOUT, True)
            yield _case("embed_layer_norm backward", about, dtype, backward, model.hidden, dtype, DROPOUT)
    for hidden in norm.TILES:
        if hidden not in (512, 1024):
            for op, call in (("forward", forward), ("backward", backward)):
                settings = (0.0, False) if call is forward else (0.0,)
                made = _case(f"embed_layer_norm {op}", f"hidden {hidden}", BFLOAT16, call, hidden, BFLOAT16, *settings)
                yield made._replace(main=True)


def _attention() -> Iterator[Case]:
    def tensors(heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        qkv = _meta(TOKENS, 3, heads, size, dtype=dtype)
        return qkv, _meta(SEQUENCES + 1, dtype=torch.int32), _meta(SEQUENCES, dtype=torch.int32)

    def forward(heads: int, size: int, dtype: torch.dtype, longest: int, p: float, save: bool) -> None:
        qkv, borders, order = tensors(heads, size, dtype)
        attention.varlen_attention_fwd(qkv, borders, longest, order, size**-0.5, p, _seed() if p else None, save)

    def backward(heads: int, size: int, dtype: torch.dtype, longest: int, p: float) -> None:
        qkv, borders, order = tensors(heads, size, dtype)
        out, lse = _meta(TOKENS, heads, size, dtype=dtype), _meta(heads, TOKENS, dtype=FLOAT32)
        seed = _seed() if p else None
        attention.varlen_attention_bwd(out, qkv, borders, longest, order, out, lse, size**-0.5, p, seed)

    def few_sequences() -> None:
        qkv, borders, order = tensors(BASE.heads, 64, BFLOAT16)
        attention.varlen_attention_fwd(qkv[:512], borders[:5], 128, order[:4], 0.125, 0.0, None, False)

    def inference(heads: int, size: int, dtype: torch.dtype, longest: int) -> Case:
        about = f"head size {size} length {longest}"
        return _case("varlen_attention forward", about, dtype, forward, heads, size, dtype, longest, 0.0, False)

    def training(heads: int, size: int, dtype: torch.dtype, longest: int, p: float = DROPOUT) -> Iterator[Case]:
        about, shape = f"head size {size} length {longest} training", (heads, size, dtype, longest)
        about += "" if p else " no dropout"
        yield _case("varlen_attention forward", about, dtype, forward, *shape, p, True)
        yield _case("varlen_attention backward", about, dtype, backward, *shape, p)

    for longest in (16, 32, 64, 128, 512):
        yield inference(BASE.heads, 64, BFLOAT16, longest)
        yield from training(BASE.heads, 64, BFLOAT16, longest)
        yield from training(BASE.heads, 64, BFLOAT16, longest, 0.0)
    yield _case("varlen_attention forward", "few sequences", BFLOAT16, few_sequences)
    for longest in (128, 512):
        yield inference(BASE.heads, 64, FLOAT16, longest)
        yield inference(12, 32, BFLOAT16, longest)  # MiniLM's
        yield from training(12, 32, BFLOAT16, longest)
    yield from training(6, 128, BFLOAT16, 512)
    for heads, size in ((12, 32), (12, 64), (6, 128)):
        yield from training(heads, size, FLOAT32, 512)
        yield from map(_in_tf32, training(heads, size, FLOAT32, 512))
    yield _in_tf32(inference(BASE.heads, 64, FLOAT32, 64))


def _masked_attention() -> Iterator[Case]:
    def call(dtype: torch.dtype, mask_dtype: torch.dtype, backward: bool) -> None:
        q, lse = _meta(16, BASE.heads, 512, 64, dtype=dtype), _meta(16, BASE.heads, 512, dtype=FLOAT32)
        mask, settings = _meta(16, 1, 1, 512, dtype=mask_dtype), (0.125, DROPOUT if backward else 0.0)
        seed = _seed() if backward else None
        if backward:
            masked_attention.masked_attention_bwd(q, q, q, q, mask, q, lse, *settings, seed)
        else:
            masked_attention.masked_attention_fwd(q, q, q, mask, *settings, seed, False)

    for name, mask in (("mask", torch.bool), ("bias", BFLOAT16)):
        yield _case("masked_attention forward", f"base {name}", BFLOAT16, call, BFLOAT16, mask, False)
        yield _case("masked_attention backward", f"base {name} training", BFLOAT16, call, BFLOAT16, mask, True)


def _in_tf32(case: Case) -> Case:
    """The same where PyTorch was told that float32 factors may be rounded to TF32."""

    def call() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            case.call()
        finally:
            torch.set_float32_matmul_precision(before)

    return case._replace(name=case.name.replace("float32", "tf32"), call=call)


def _linear(architecture: int) -> Iterator[Case]:
    def gemm(dtype: torch.dtype, activation: str, tile: linear.Tile | None) -> None:
        x, w = _meta(TOKENS, BASE.hidden, dtype=dtype), _meta(BASE.intermediate, BASE.hidden, dtype=dtype)
        bias, out = _meta(BASE.intermediate, dtype=dtype), _meta(TOKENS, BASE.intermediate, dtype=dtype)
        linear._gemm(x, w, bias, out, activation, tile)

    largest, *others = linear.TILES[architecture]
    for activation in ("none", "gelu", "gelu_tanh"):
        yield _case("linear", f"{_named(largest)} {activation}", BFLOAT16, gemm, BFLOAT16, activation, largest)
    for tile in others:
        yield _case("linear", f"{_named(tile)} gelu", BFLOAT16, gemm, BFLOAT16, "gelu", tile)
    yield _case("linear", f"{_named(largest)} gelu", FLOAT16, gemm, FLOAT16, "gelu", largest)
    in_float32 = _case("linear", "gelu", FLOAT32, gemm, FLOAT32, "gelu", None)
    yield in_float32
    yield _in_tf32(in_float32)


def _named(tile: linear.Tile) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.depth}"


class Entry(NamedTuple):
    """A line of a table of tiles: the kernel that is launched with it, and by what the launch shows it."""

    kernel: str
    constants: dict[str, Any]
    options: dict[str, int]
    types: tuple[tuple[str, str], ...] = ()  # of arguments, as Triton writes them

    def is_of(self, kernel: Kernel) -> bool:
        return (
            kernel.name == self.kernel
            and all(kernel.constants.get(name) == value for name, value in self.constants.items())
            and all(getattr(kernel.options, name) == value for name, value in self.options.items())
            and all(kernel.source.signature[name] == kind for name, kind in self.types)
        )


def entries(architecture: int) -> Iterator[Entry]:
    """Every line of every table that is for GPUs of this architecture."""
    for tile in norm.TILES.values():
        for op in ("residual_layer_norm", "embed_layer_norm"):
            for direction in ("fwd", "bwd"):
                constants = {"BLOCK_ROWS": tile.rows, "BLOCK": tile.columns}
                yield Entry(f"_{op}_{direction}_kernel", constants, {"num_warps": tile.warps})
    for tile in (*linear.TILES[architecture], linear.SMALL):
        constants = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
        yield Entry("_linear_fwd_kernel", constants, {"num_warps": tile.warps, "num_stages": tile.stages})
    generation = 90 if architecture >= 90 else 80
    half, masked = attention_tiled.HALF[generation], {64: attention_tiled.MASKED[generation]}
    float32 = (attention_tiled.IEEE, "*fp32", "ieee"), (attention_tiled.TF32[generation], "*fp32", "tf32")
    for table, kind, precision in ((half, "*bf16", "ieee"), (masked, "*bf16", "ieee"), *float32):
        for size, tiles in table.items():
            for direction, tile in zip(("fwd", "dq", "dkv"), tiles, strict=True):
                constants = {"QUERIES": tile.queries, "KEYS": tile.keys, "BLOCK_SIZE": size, "PRECISION": precision}
                options = {"num_warps": tile.warps, "num_stages": tile.stages}
                yield Entry(f"_varlen_attention_tiled_{direction}_kernel", constants, options, (("q", kind),))


def unreached(architecture: int, launched: Collection[Kernel]) -> list[str]:
    """What of bertfast/kernels was not launched: lines of tables, whole kernels; and tables that `entries` lacks."""
    names = {k.name for k in launched}
    of_attention = [attention_tiled.HALF, attention_tiled.TF32, attention_tiled.IEEE, attention_tiled.MASKED]
    of_attention += [table for by_gpu in of_attention[:2] for table in by_gpu.values()]
    known = norm.TILES, linear.TILES, *of_attention
    found = [f"no case launches {e}" for e in entries(architecture) if not any(e.is_of(k) for k in launched)]
    for module in _modules():
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, JITFunction) and name not in names:
                found.append(f"no case launches {module.__name__}.{name}")
            if _is_table(value) and not any(value is table for table in known):
                found.append(f"cases.entries does not know {module.__name__}.{name}")
    return sorted(set(found))


def _modules() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        yield importlib.import_module(module.name)


def _is_table(value: Any) -> bool:
    """Whether this is a dictionary of named tuples, or of tuples of them."""
    lines = list(value.values()) if isinstance(value, dict) and value else [None]
    return all(hasattr(line, "_fields") or (type(line) is tuple and hasattr(line[0], "_fields")) for line in lines)
