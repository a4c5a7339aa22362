"""Every op in plain PyTorch: the written specification, the test oracle, and the fallback everywhere.

Shapes: T tokens of all sequences behind one another, H hidden, A heads, D head size, B sequences. Statistics,
softmax and activations are computed in float32 (float64 for float64 input) and rounded once, to the input's
dtype, at the end. The forward functions are differentiable by autograd; the `_backward` functions beside them spell
out the gradients that the kernels compute, in the same precision.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_ROUNDS = 7  # the fewest that pass BigCrush: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers", table 2
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF
KEY_BITS = 8  # of dropout, for each of attention's probabilities; 16 for an element of a row


def philox(seed: Tensor, counter: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-7: four words of 32 random bits for each counter.

    seed: (1,) int64, its halves are the key. counter: four broadcastable int64 tensors of 32-bit words. Returns
    four int64 tensors in [0, 2^32). Source: Salmon et al. 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit products wrap around as int64, which leaves their bits right.
        left, right = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _LOW_32) ^ c1 ^ k0,
            right & _LOW_32,
            ((left >> 32) & _LOW_32) ^ c3 ^ k1,
            left & _LOW_32,
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _LOW_32, (k1 + _PHILOX_WEYL[1]) & _LOW_32
    return [c0, c1, c2, c3]


def dropout_threshold(p: float, bits: int = 16) -> int:
    """The dropout probability in units of 2^-16, as closely as so many random bits an element can have it.

    An element is dropped where its random bits, as the upper ones of 16, are below it.
    """
    step = 1 << (16 - bits)
    return min(round(p * 65536 / step) * step, 65536 - step)


def _multiplier(drawn: Tensor, threshold: int) -> Tensor:
    """0 where the 16 random bits are below the threshold, else what keeps the mean: 1 / (1 - p)."""
    return (drawn >= threshold).float() * (65536 / (65536 - threshold))


def dropout_multiplier(seed: Tensor, p: float, columns: int, counter: Sequence[Tensor]) -> Tensor:
    """0 for a dropped element and 1 / (1 - p) for a kept one, p rounded to a multiple of 2^-16.

    One Philox call serves eight neighbours, the 16 bytes that a thread loads at once of a half precision row: column
    8 b + 2 w + h takes half h, the lower first, of word w of counter (b, *counter). counter: three int64 tensors that
    broadcast to the leading shape, with a last axis of size 1. Returns (*leading, columns) float32.
    """
    groups = torch.arange(-(-columns // 8), device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, (groups, *counter))), dim=-1)
    drawn = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-3)[..., :columns]
    return _multiplier(drawn, dropout_threshold(p))


def key_dropout_multiplier(seed: Tensor, p: float, keys: int, counter: Sequence[Tensor]) -> Tensor:
    """As `dropout_multiplier`, for attention's probabilities: p rounded to a multiple of 2^-8, as in FlashAttention.

    One Philox call serves sixteen keys: pairs of neighbours, 8 apart, which are what one thread holds of 64 columns of
    a product of the matrix units. Key 64 b + 16 w + 8 h + 2 r + i takes byte 2 h + i of word w of counter
    (4 b + r, *counter). Returns (*leading, keys) float32.
    """
    groups = torch.arange(-(-keys // 64) * 4, device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, (groups, *counter))), dim=-1)
    bytes_ = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    b_r_w_h_i = bytes_.unflatten(-3, (-1, 4)).unflatten(-1, (2, 2))
    drawn = b_r_w_h_i.movedim(-4, -2).flatten(-5)[..., :keys]
    return _multiplier(drawn << 8, dropout_threshold(p, KEY_BITS))


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x * m / (1 - p), m ~ Bernoulli(1 - p) from the counter (column, row). x: (rows, columns).

    Its own backward: the gradient of x is dropout of the gradient of the output, with the same seed.
    """
    if p == 0.0 or seed is None:
        return x
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    multiplier = dropout_multiplier(seed, p, x.shape[1], (rows & _LOW_32, rows >> 32, torch.zeros_like(rows)))
    return x * multiplier.to(x.dtype)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the precision that statistics are computed in: float32, or float64 where they are that."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, var biased. Source: Ba et al. 2016."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight + bias


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(var + eps)) of each row, (T,) float32: what the backward of a norm is given."""
    mean = x.mean(-1)
    variance = (x - mean[:, None]).square().mean(-1)
    return mean.float(), torch.rsqrt(variance + eps).float()


def layer_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dx, dweight, dbias) of `layer_norm`.

    With xhat the normalised x and g = dout * weight: dx = (g - mean(g) - xhat mean(g xhat)) / std.
    """
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xhat, g = centred * rstd, dout * weight
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    return dx, (dout * xhat).sum(0), dout.sum(0)


def embedding_sum(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
) -> Tensor:
    """word[input_ids] + position[position_ids] + token_type[token_type_ids], unrounded: what the norm normalises."""
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    rows = [F.embedding(i, t) for i, t in ((input_ids, word), (position_ids, position), (types, token_type))]
    w, p, t = _wide(*rows)
    return w + t + p


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])): (T, H).

    Ids: (T,) int64, token_type_ids None means 0 everywhere. Tables: (vocabulary, H), (positions, H), (types, H).
    """
    y = embedding_sum(input_ids, position_ids, token_type_ids, word, position, token_type)
    gamma, beta = _wide(weight, bias)
    return dropout(layer_norm(y, gamma, beta, eps), dropout_p, seed).to(word.dtype)


def embed_layer_norm_backward(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of (word, position, token_type, weight, bias): each table's row sums those of its tokens."""
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    y = embedding_sum(input_ids, position_ids, types, word, position, token_type)
    g, gamma = _wide(dout, weight)
    dx, dweight, dbias = layer_norm_backward(dropout(g, dropout_p, seed), y, gamma, eps)
    lookups = ((input_ids, word), (position_ids, position), (types, token_type))
    tables = [dx.new_zeros(table.shape).index_add_(0, ids, dx) for ids, table in lookups]
    return [gradient.to(word.dtype) for gradient in (*tables, dweight, dbias)]


def residual_sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """dropout(x + x_bias) + residual, unrounded: what the norm normalises."""
    y, r, b = _wide(x, residual, x_bias)
    return dropout(y if b is None else y + b, dropout_p, seed) + r


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual). x, residual: (T, H); weight, bias, x_bias: (H,). Returns (T, H)."""
    gamma, beta = _wide(weight, bias)
    return layer_norm(residual_sum(x, residual, x_bias, dropout_p, seed), gamma, beta, eps).to(x.dtype)


def residual_layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of (x, residual, weight, bias, x_bias), the last whether or not there is an x_bias."""
    g, gamma = _wide(dout, weight)
    y = residual_sum(x, residual, x_bias, dropout_p, seed)
    dresidual, dweight, dbias = layer_norm_backward(g, y, gamma, eps)
    dx = dropout(dresidual, dropout_p, seed)
    return [gradient.to(x.dtype) for gradient in (dx, dresidual, dweight, dbias, dx.sum(0))]


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU(x + bias), GELU(u) = u Phi(u) = u (1 + erf(u / sqrt 2)) / 2. x: (T, F), bias: (F,). Returns (T, F).

    approximate="tanh": u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2. Source: Hendrycks & Gimpel 2016.
    """
    u, b = _wide(x, bias)
    if b is not None:
        u = u + b
    if approximate == "tanh":
        y = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    else:
        y = 0.5 * u * (1 + torch.erf(u * math.sqrt(0.5)))
    return y.to(x.dtype)


def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """The gradients of (x, bias), the latter whether or not there is a bias: dout (Phi(u) + u phi(u)) and its sum.

    approximate="tanh": with t = tanh(i(u)), dout ((1 + t) + u (1 - t^2) i'(u)) / 2.
    """
    g, u, b = _wide(dout, x, bias)
    if b is not None:
        u = u + b
    if approximate == "tanh":
        # Beyond 10 the tanh is 1 in any precision, and u^3 must not overflow.
        v = u.clamp(-10, 10)
        t = torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
        slope = 0.5 * (1 + t) + 0.5 * v * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v**2)
    else:
        density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
        slope = 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + torch.where(density == 0, density, u * density)
    dx = g * slope
    return dx.to(x.dtype), dx.sum(0).to(x.dtype)


def varlen_attention(
    qkv: Tensor, cu_seqlens: Tensor, scale: float | None = None, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """dropout(softmax(scale q k^T)) v inside each sequence, heads apart. qkv: (T, 3, A, D). Returns (T, A, D).

    cu_seqlens: (B + 1,) int32; the tokens of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1], lengths of 0
    allowed. scale defaults to 1 / sqrt(D). Source: Vaswani et al. 2017.
    """
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    (wide,) = _wide(qkv)
    outputs = [wide[:0, 0]]
    for b, (start, end) in enumerate(_pairs(cu_seqlens)):
        q, k, v = wide[start:end].permute(1, 2, 0, 3)  # (A, S, D) each
        p = torch.softmax((q @ k.transpose(1, 2)) * scale, dim=-1)
        outputs.append((p * _attention_multiplier(p, b, dropout_p, seed) @ v).transpose(0, 1))
    return torch.cat(outputs).to(qkv.dtype)


def varlen_attention_lse(qkv: Tensor, cu_seqlens: Tensor, scale: float | None = None) -> Tensor:
    """log sum exp(scale q k^T) over the keys, the natural logarithm, (A, T): what the backward is given."""
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    (wide,) = _wide(qkv)
    rows = [wide.new_zeros(qkv.shape[2], 0)]
    for start, end in _pairs(cu_seqlens):
        q, k, _ = wide[start:end].permute(1, 2, 0, 3)
        rows.append(torch.logsumexp((q @ k.transpose(1, 2)) * scale, dim=-1))
    return torch.cat(rows, dim=1).float()


def varlen_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The gradient of qkv, (T, 3, A, D).

    With P the probabilities, m the dropout multipliers and O = (m P) V: dV = (m P)^T dO, dP = m (dO V^T),
    dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
    """
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    gradients, wide = _wide(dout, qkv)
    dqkv = torch.empty_like(wide)
    for b, (start, end) in enumerate(_pairs(cu_seqlens)):
        q, k, v = wide[start:end].permute(1, 2, 0, 3)
        do = gradients[start:end].transpose(0, 1)
        p = torch.softmax((q @ k.transpose(1, 2)) * scale, dim=-1)
        m = _attention_multiplier(p, b, dropout_p, seed)
        dp = m * (do @ v.transpose(1, 2))
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        parts = torch.stack((ds @ k, ds.transpose(1, 2) @ q, (m * p).transpose(1, 2) @ do))
        dqkv[start:end] = parts.permute(2, 0, 1, 3)
    return dqkv.to(qkv.dtype)


def _pairs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(cu_seqlens.tolist()))


def _attention_multiplier(p: Tensor, sequence: int, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """The dropout multipliers of the probabilities (A, S, S) of one sequence: counter (keys, query, head, sequence)."""
    if dropout_p == 0.0 or seed is None:
        return 1.0
    heads, queries, keys = p.shape
    query = torch.arange(queries, device=p.device)[:, None]
    head = torch.arange(heads, device=p.device)[:, None, None]
    counter = (query, head, torch.full_like(query, sequence))
    return key_dropout_multiplier(seed, dropout_p, keys, counter).to(p.dtype)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T + mask)) v over rectangles. q: (B, A, Sq, D); k, v: (B, A, Sk, D). Returns q's shape.

    mask: broadcasts to (B, A, Sq, Sk); boolean, true where a query sees a key, or added to the scores, where what is
    below -1e30, as the lowest numbers of float32 and bfloat16 are, means -inf. A query that sees no key gets zeros.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    queries, keys, values = _wide(q, k, v)
    p = _masked_probabilities(queries, keys, mask, scale)
    return (p * _rectangle_multiplier(p, dropout_p, seed) @ values).to(q.dtype)


def masked_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of (q, k, v), as in `varlen_attention_backward`; the mask has none."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    do, queries, keys, values = _wide(dout, q, k, v)
    p = _masked_probabilities(queries, keys, mask, scale)
    m = _rectangle_multiplier(p, dropout_p, seed)
    dp = m * (do @ values.transpose(2, 3))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    gradients = ds @ keys, ds.transpose(2, 3) @ queries, (m * p).transpose(2, 3) @ do
    return [gradient.to(q.dtype) for gradient in gradients]


def masked_attention_lse(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """log sum exp(scale q k^T + mask) over the keys, (B, A, Sq) float32: inf where a query sees none."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    lse = torch.logsumexp(_masked_scores(*_wide(q, k), mask, scale), dim=-1)
    return lse.masked_fill(lse == -math.inf, math.inf).float()


def _masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + mask, -inf where a query does not see a key."""
    scores = (q @ k.transpose(2, 3)) * scale
    if mask is None:
        return scores
    masked = ~mask if mask.dtype == torch.bool else mask < -1e30
    return (scores if mask.dtype == torch.bool else scores + mask.to(scores.dtype)).masked_fill(masked, -math.inf)


def _masked_probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask), with rows of zeros where every score is -inf."""
    scores = _masked_scores(q, k, mask, scale)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _rectangle_multiplier(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """The dropout multipliers of the probabilities (B, A, Sq, Sk)."""
    if dropout_p == 0.0 or seed is None:
        return 1.0
    return torch.stack([_attention_multiplier(each, b, dropout_p, seed) for b, each in enumerate(p)])


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), activation: str = "none") -> Tensor:
    """activation(x [W1; W2; ...]^T + [b1; b2; ...]). x: (T, K), weights: (N_i, K), biases: (N_i,) or none at all.

    activation: "none", "gelu" (erf form) or "gelu_tanh". Returns (T, sum N_i).
    """
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(list(biases))
    y = F.linear(x, weight, bias)
    if activation == "none":
        return y
    return bias_gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u, scale, zero) with x = scale (u - zero) but for rounding, each row by itself. x: (T, K), taken as float32.

    scale = (max - min) / 255 over a row's values and 0, zero = round(-min / scale), u = round(x / scale) + zero, ties
    to even: (T, K) uint8, (T,) float32, (T,) int32, computed in float32 with the rounded 1 / scale. The scale is 0 for
    a row of zeros, or of values so small that 1 / scale overflows, and NaN where anything is not finite; both have
    u = zero = 0.
    """
    rows = x.float()
    high, low = rows.amax(-1).clamp(min=0), rows.amin(-1).clamp(max=0)
    scale = high / 255 - low / 255  # the difference of finite values may overflow
    scale, inverse = _usable(scale, rows)
    zero = torch.round(-low.where(inverse > 0, 0) * inverse)
    u = torch.round(rows.where(inverse[:, None] > 0, 0) * inverse[:, None]) + zero[:, None]
    return u.clamp(0, 255).to(torch.uint8), scale, zero.int()


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with weight = scale q but for rounding, each row by itself. weight: (N, K), taken as float32.

    scale = max |w| / 127 over a row, q = round(w / scale), ties to even: (N, K) int8, (N,) float32, computed in float32
    with the rounded 1 / scale. Rows of next to nothing and what is not finite are as in `quantise_rows`.
    """
    rows = weight.float()
    scale, inverse = _usable(rows.abs().amax(-1) / 127, rows)
    q = torch.round(rows.where(inverse[:, None] > 0, 0) * inverse[:, None])
    return q.clamp(-127, 127).to(torch.int8), scale


def _usable(scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, 1 / scale) of each row; (0, 0) where that overflows, (NaN, 0) where anything in the row is not finite."""
    finite, inverse = rows.isfinite().all(-1), 1 / scale
    usable = finite & inverse.isfinite()
    return scale.where(usable, torch.where(finite, 0.0, math.nan)), inverse.where(usable, 0)


def quantised_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with x and W quantised, and nothing rounded after that. x: (T, K); W: (N, K). Returns (T, N) float64.

    sum_k scale_t (u_tk - zero_t) scale_n q_nk = scale_t scale_n (sum_k u_tk q_nk - zero_t sum_k q_nk), in integers.
    """
    u, scale, zero = quantise_rows(x)
    q, weight_scale = quantise_weight(weight)
    sums = (u.double() - zero[:, None].double()) @ q.double().t()
    y = sums * scale[:, None].double() * weight_scale.double()
    return y if bias is None else y + bias.double()


def masked_lm_loss(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """- sum over labelled rows t of log softmax(x_t W^T + b)[label_t]; rows with the label -100 have no part in it.

    x: (T, H); labels: (T,) int64; weight: (V, H); bias: (V,) or None. Returns a scalar, float32 unless x is float64.
    """
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.double() if x.dtype == torch.float64 else logits.float(), labels, reduction="sum")


def feed_forward(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, activation: str = "gelu") -> Tensor:
    """activation(x W1^T + b1) W2^T, with what goes into the second GEMM rounded. x: (T, H), W1: (F, H), W2: (H, F)."""
    return linear(linear(x, [up], [up_bias], activation), [down])
