"""Triton's kernels on the CPU: Triton's own interpreter, repaired and watched. Import it before triton.

The interpreter that triton brings runs a kernel's Python line by line on numpy arrays. Three things are added to it:

Repairs. It keeps bfloat16 as the 16 bits that it is made of and calculates with those, in silence; loops whose bounds
come from memory fail under numpy 2.4; a maximum of NaN and a number is NaN where a GPU's is the number; TF32 products
are exact. Here bfloat16 is calculated in float32 and rounded to the nearest even, after each operation as on a GPU, and
factors of TF32 products are rounded to TF32.

Watching. A pointer may reach what belongs to the tensor that it came from, and nothing else. Within one launch no
element may be written by one program and touched by another, because nobody knows which comes first (atomics apart);
`racing()` allows it. What a kernel does not write shows, as `poisoned()` fills new tensors with NaN.

Counting. `launches()` says which kernels ran, on which grid, and how many bytes they moved of each argument.

It is for triton 3.4 to 3.9; the parts of triton that are replaced here are no public interface.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("triton was imported before interpreter.py, which has to tell it to interpret")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import ptx
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

VERSIONS = (3, 4), (3, 9)
if not VERSIONS[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= VERSIONS[1]:
    raise ImportError(
        f"interpreter.py was written for triton 3.4 to 3.9, not {triton.__version__}: see whether test_interpreter.py "
        "passes with it, or run the tests with TRITON_INTERPRET=0"
    )

Handle = stock.TensorHandle


@dataclass
class Launch:
    """One launch of a kernel: its name, its grid, and the bytes that its programs asked for and wrote, by argument."""

    kernel: str
    grid: tuple[int, int, int]
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    atomic: Counter[str] = field(default_factory=Counter)


_watchers: list[list[Launch]] = []
_races_allowed = False


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches inside the block, in their order; a kernel that is called without one is not among them."""
    seen: list[Launch] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


@contextmanager
def racing() -> Iterator[None]:
    """Inside the block, programs of one launch may write what others read or write."""
    global _races_allowed
    before, _races_allowed = _races_allowed, True
    try:
        yield
    finally:
        _races_allowed = before


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block, PyTorch fills new tensors with NaN (whole numbers with their largest)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Storage:
    """Memory that tensors of a launch share, and which program has touched each byte of it."""

    MANY = -1

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start = storage.data_ptr()
        # By the first byte of an element: 0 for none, or the program's number from 1 on. Pages of zeros cost nothing.
        self.writer, self.reader = (np.zeros(storage.nbytes(), np.int32) for _ in range(2))

    def read(self, addresses: np.ndarray, program: int) -> int:
        """Another program that has written one of these, or 0."""
        at = addresses - self.start
        writer, reader = self.writer[at], self.reader[at]
        self.reader[at] = np.where((reader == 0) | (reader == program), program, self.MANY)
        return int(np.max(np.where(writer == program, 0, writer), initial=0))

    def write(self, addresses: np.ndarray, program: int) -> int:
        """Another program that has written or read one of these (MANY where several have), or 0."""
        at = addresses - self.start
        touched = np.stack((self.writer[at], self.reader[at]))
        self.writer[at] = program
        others = touched[(touched != 0) & (touched != program)]
        return int(others[0]) if others.size else 0


class Argument:
    """A tensor that was passed to a kernel: what a pointer to it may reach."""

    def __init__(self, name: str, tensor: Tensor, storage: Storage) -> None:
        self.name, self.tensor, self.storage = name, tensor, storage
        self.start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.start + ((last + 1) * tensor.element_size() if tensor.numel() else 0)


class Current:
    """The launch that is going on."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.launch = Launch(kernel, (0, 0, 0))
        storages: dict[int, Storage] = {}
        self.arguments = []
        for name, tensor in tensors.items():
            key = tensor.untyped_storage().data_ptr()
            storage = storages.get(key) or storages.setdefault(key, Storage(tensor))
            self.arguments.append(Argument(name, tensor, storage))

    def argument(self, pointer: Handle) -> Argument | None:
        """The tensor that a pointer came from; where that was lost on the way, the one that it points into."""
        found = pointer.attr.get("argument")
        if found is None and pointer.data.size:
            low = int(pointer.data.min())
            found = next((a for a in self.arguments if a.start <= low < a.end), None)
        return found

    def access(self, kind: str, builder: "Builder", pointer: Handle, mask: Any) -> None:
        """Count an access by the program that runs, and raise where it may not be."""
        addresses = pointer.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(getattr(mask, "data", mask), bool), addresses.shape)]
        if not addresses.size:
            return
        itemsize = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        argument = self.argument(Handle(addresses, pointer.dtype, pointer.attr))
        if argument is None or low < argument.start or high > argument.end:
            where = "of any argument" if argument is None else f"of {argument.name}"
            by = 0 if argument is None else max(argument.start - low, high - argument.end)
            raise IndexError(f"{self.launch.kernel}, program {builder.grid_idx}: {kind} {by} bytes outside {where}")
        getattr(self.launch, kind)[argument.name] += addresses.size * itemsize
        if _races_allowed or kind == "atomic":
            return
        x, y, z = builder.grid_idx
        program = 1 + (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        touch = argument.storage.read if kind == "loaded" else argument.storage.write
        other = touch(addresses.reshape(-1).astype(np.int64), program)
        if other:
            who = "several others" if other == Storage.MANY else f"program number {other - 1}"
            raise RuntimeError(
                f"{self.launch.kernel}: a race on {argument.name}: {kind} by program {builder.grid_idx}, "
                f"touched by {who} in the same launch"
            )


_current: Current | None = None


def to_bfloat16(x: np.ndarray, nearest: bool = True) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16, to the nearest even or towards 0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)) if nearest else np.uint32(0)
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + half) >> np.uint32(16)).astype(np.uint16))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the 10 bits of TF32's significand, halves away from 0, as the compiler asks for."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32), x)


def widened(*handles: Handle) -> list[Handle]:
    """The same with bfloat16 in float32."""
    return [
        Handle(from_bfloat16(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16 else h
        for h in handles
    ]


def narrowed(handle: Handle) -> Handle:
    return Handle(to_bfloat16(handle.data), tl.bfloat16)


class Builder(stock.InterpreterBuilder):
    """What carries out each operation of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        # The check of int32 overflows only does something in debug mode, and doubles the arithmetic on addresses.
        self.options = replace(self.options, sanitize_overflow=False)

    # bfloat16: in float32, rounded after each operation

    def get_bf16(self, value):
        return narrowed(Handle(np.array([value], np.float32), tl.float32))

    def cast_impl(self, source, to):
        scalar = to.scalar
        if source.dtype.scalar == scalar:
            return source
        (wide,) = widened(source)
        if scalar == tl.float32 and wide is not source:
            return wide
        if scalar == tl.bfloat16:
            return Handle(to_bfloat16(wide.data.astype(np.float32)), tl.bfloat16)
        return super().cast_impl(wide, to)

    def create_fp_to_fp(self, source, to, rounding):
        if tl.bfloat16 not in (source.dtype.scalar, to.scalar):
            return super().create_fp_to_fp(source, to, rounding)
        if to.scalar == tl.bfloat16 and rounding == ir.ROUNDING_MODE.RTZ:
            return Handle(to_bfloat16(source.data.astype(np.float32), nearest=False), tl.bfloat16)
        return self.cast_impl(source, to)

    def binary_op(self, left, right, operation):
        wide = widened(left, right)
        if wide[0] is left or operation.__name__.startswith("bitwise"):
            return super().binary_op(left, right, operation)
        result = super().binary_op(*wide, operation)
        return Handle(result.data, tl.int1) if result.data.dtype == bool else narrowed(result)

    def unary_op(self, x, operation):
        (wide,) = widened(x)
        result = super().unary_op(wide, operation)
        return result if wide is x else narrowed(result)

    def create_fma(self, x, y, z):
        # In float64 the product of two float32 numbers is exact.
        a, b, c = (h.data.astype(np.float64) for h in widened(x, y, z))
        if z.dtype.scalar == tl.bfloat16:
            return Handle(to_bfloat16((a * b + c).astype(np.float32)), tl.bfloat16)
        return Handle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    def create_clampf(self, x, low, high, propagate_nans):
        quiet = propagate_nans == ir.PROPAGATE_NAN.NONE
        lower, upper = (np.fmax, np.fmin) if quiet else (np.maximum, np.minimum)
        return self.binary_op(self.binary_op(x, low, lower), high, upper)

    def create_dot(self, a, b, d, precision, *rest):
        if a.dtype.primitive_bitwidth == 8:
            return super().create_dot(a, b, d, precision, *rest)
        # numpy multiplies matrices of float16 slowly; a GPU adds their products up in float32 too.
        factors = [h.data.astype(np.float32) if h.data.dtype == np.float16 else h.data for h in widened(a, b)]
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            factors = [to_tf32(f) for f in factors]
        (onto,) = widened(d)
        total = np.matmul(*factors, dtype=np.promote_types(factors[0].dtype, onto.data.dtype)) + onto.data
        return (
            narrowed(Handle(total, tl.float32)) if onto is not d else Handle(total.astype(d.data.dtype), d.dtype.scalar)
        )

    # The number where the other is NaN, as the GPU's instructions have it

    def create_minnumf(self, left, right):
        return self.binary_op(left, right, np.fmin)

    def create_maxnumf(self, left, right):
        return self.binary_op(left, right, np.fmax)

    def get_all_ones_value(self, kind):
        """-1, of unsigned numbers too, which numpy 2.4 refuses."""
        dtype = stock._get_np_dtype(kind.scalar)
        return Handle(np.array([-1]).astype(dtype), kind.scalar)

    # PTX between the lines

    def create_inline_asm(self, code, constraints, values, types, pure, pack):
        """Which elements share a call, and with it the registers of less than 32 bits, is a layout's affair: here it
        is drawn anew each time, so that code which relies on it shows."""
        (kind,), arrays = types, np.broadcast_arrays(*(value.data for value in values))
        size = arrays[0].size
        calls = -(-size // pack)
        order = np.random.default_rng().permutation(calls * pack) % size
        registers: list[np.ndarray] = []
        for array in arrays:
            elements = array.reshape(-1)[order]
            registers += list(elements.view(np.uint32).reshape(calls, -1).T)
        result = np.empty(size, stock._get_np_dtype(kind))
        result[order] = ptx.run(code, registers).view(result.dtype)
        handle = Handle(result.reshape(arrays[0].shape), kind.scalar)
        return SimpleNamespace(get_result=lambda _: handle)

    # Pointers remember the argument that they came from

    def create_addptr(self, pointer, offset):
        return _same_argument(super().create_addptr(pointer, offset), pointer)

    def create_splat(self, kind, x):
        return _same_argument(super().create_splat(kind, x), x)

    def create_broadcast(self, x, shape):
        return _same_argument(super().create_broadcast(x, shape), x)

    def create_expand_dims(self, x, axis):
        return _same_argument(super().create_expand_dims(x, axis), x)

    def create_bitcast(self, x, to):
        return _same_argument(super().create_bitcast(x, to), x)

    # Memory

    def create_masked_load(self, pointer, mask, *rest, **named):
        _current.access("loaded", self, pointer, mask)
        return super().create_masked_load(pointer, mask, *rest, **named)

    def create_masked_store(self, pointer, value, mask, *rest, **named):
        _current.access("stored", self, pointer, mask)
        result = super().create_masked_store(pointer, value, mask, *rest, **named)
        if not _races_allowed:
            _check_written(pointer, value, getattr(mask, "data", mask))
        return result

    def create_atomic_cas(self, pointer, *rest):
        _current.access("atomic", self, pointer, None)
        return super().create_atomic_cas(pointer, *rest)

    def create_atomic_rmw(self, operation, pointer, value, mask, *rest):
        _current.access("atomic", self, pointer, mask)
        if value.dtype.scalar != tl.bfloat16 or operation != ir.ATOMIC_OP.FADD:
            return super().create_atomic_rmw(operation, pointer, value, mask, *rest)
        addresses, inside = pointer.data, np.broadcast_to(mask.data, pointer.data.shape)
        before = np.zeros(addresses.shape, np.uint16)
        for i in np.argwhere(inside):
            one = np.s_[tuple(slice(n, n + 1) for n in i)]
            before[one] = memory.load(addresses[one], inside[one], before[one], np.dtype(np.uint16))
            total = from_bfloat16(before[one]) + from_bfloat16(value.data[one])
            memory.store(addresses[one], to_bfloat16(total), inside[one])
        return Handle(before, tl.bfloat16)


def _same_argument(pointer: Handle, origin: Handle) -> Handle:
    if "argument" in origin.attr:
        pointer.attr["argument"] = origin.attr["argument"]
    return pointer


def _check_written(pointer: Handle, value: Handle, mask: Any) -> None:
    """Raise where two elements of one store went to the same place and were not the same."""
    inside = np.broadcast_to(np.asarray(mask, bool), pointer.data.shape)
    nothing = np.zeros(value.data.shape, value.data.dtype)
    there = memory.load(pointer.data, np.ascontiguousarray(inside), nothing, value.data.dtype)
    meant = np.ascontiguousarray(np.where(inside, value.data, np.zeros_like(value.data)))
    if (there.view(np.uint8) != meant.view(np.uint8)).any():
        raise RuntimeError(f"{_current.launch.kernel}: a race: one store puts different values into one place")


class InFloat32:
    """A reduction or scan of bfloat16 is one of float32, rounded once."""

    def apply_impl(self, inputs):
        if not any(x.dtype == tl.bfloat16 for x in inputs):
            return super().apply_impl(inputs)
        wide = tuple(tl.core.tensor(widened(x.handle)[0], tl.block_type(_wide(x.dtype), list(x.shape))) for x in inputs)
        results = super().apply_impl(wide)
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        for i, result in enumerate(results):
            # Of a maximum and its index, the inputs may be fewer than the results.
            if result.dtype == tl.float32 and (i >= len(inputs) or inputs[i].dtype == tl.bfloat16):
                shape = list(result.shape)
                kind = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
                results[i] = tl.core.tensor(narrowed(result.handle), kind)
        return results


class Reduction(InFloat32, stock.ReduceOps):
    pass


class Scan(InFloat32, stock.ScanOps):
    pass


def _wide(dtype: tl.dtype) -> tl.dtype:
    return tl.float32 if dtype == tl.bfloat16 else dtype


class Executor(stock.GridExecutor):
    """Runs the programs of a launch, one after another."""

    def _init_args_hst(self, args, kwargs):
        global _current
        on_host = super()._init_args_hst(args, kwargs)
        named = {**dict(zip(self.arg_names, on_host[0], strict=False)), **on_host[1]}
        _current = Current(self.fn.__name__, dict(_tensors(named)))
        return on_host

    def __call__(self, *args, **kwargs):
        global _current
        before, seen = _current, None
        try:
            with np.errstate(all="ignore"):
                super().__call__(*args, **kwargs)
            seen = _current.launch
        finally:
            _current = before
        seen.grid = tuple(stock.interpreter_builder.grid_dim)
        for watcher in _watchers:
            watcher.append(seen)


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        value = value.base if isinstance(value, stock.TensorDescriptor) else stock._unwrap_tensor(value)
        if isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif hasattr(value, "data_ptr"):
            yield name, value


_convert = stock._implicit_cvt


def _convert_argument(value: Any) -> Any:
    """A kernel's argument as the interpreter has it; a tensor's pointer knows whose it is."""
    converted = _convert(value)
    if hasattr(value, "data_ptr"):
        tensor = stock._unwrap_tensor(value)
        converted.handle.attr["argument"] = next(a for a in _current.arguments if a.tensor is tensor)
    return converted


def _call_device_function(self, *args, **kwargs):
    try:
        return self.rewrite()(*args, **kwargs)
    except stock.InterpreterError:
        raise
    except Exception as error:
        raise stock.InterpreterError(f"{self.fn.__name__}: {error!r}") from error


def _remember_shapes() -> None:
    """Types and shapes of tensors are made once and not for every operation, which is half of the time otherwise."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple, dict[str, Any]] = {}
    shapes: dict[tuple, tuple] = {}

    def block_type(self, element_ty, shape):
        values = tuple(getattr(n, "value", n) for n in shape)
        key = element_ty.name, values
        if key not in types:
            make_type(self, element_ty, list(values))
            types[key] = self.__dict__
        self.__dict__ = types[key]

    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def _install() -> None:
    stock.InterpreterBuilder, stock.GridExecutor = Builder, Executor
    stock.ReduceOps, stock.ScanOps = Reduction, Scan
    stock.interpreter_builder = Builder()
    stock.interpreter_semantic = TritonSemantic(stock.interpreter_builder)
    stock._implicit_cvt = _convert_argument
    dtypes = stock._get_np_dtype
    known: dict[Any, np.dtype] = {}

    def numpy_dtype(dtype: tl.dtype) -> np.dtype:
        key = "pointer" if isinstance(dtype.scalar, tl.pointer_type) else dtype.scalar.name
        return known.get(key) or known.setdefault(key, dtypes(dtype))

    stock._get_np_dtype = numpy_dtype
    # triton.language is made to interpret once and for all, not for each launch and each call of a function in it.
    nothing = type("Nothing", (), {"restore": lambda self: None})()
    for module in (tl, tl.core):
        stock._patch_lang(type("Function", (), {"__globals__": {"tl": module}}))
    stock._patch_lang = lambda function: nothing
    stock.InterpretedFunction.__call__ = _call_device_function
    _remember_shapes()
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    try:
        from scipy.special import erf
    except ImportError:
        return
    stock.np_erf_fp32, stock.np_erf_fp64 = (lambda x: erf(x).astype(np.float32)), erf


_install()
