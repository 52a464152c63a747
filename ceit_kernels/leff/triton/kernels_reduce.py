"""From what program instances left behind to statistics and gradients of parameters, in a fixed order."""

import triton
import triton.language as tl

from ...common.kernel import kernel
from ...common.partials import is_last, store_rows, sum_by_last
from .kernels_common import ONE

__all__ = [
    "gradient_by_last",
    "gradient_of_sums",
    "leff_reduce_kernel",
    "leff_running_kernel",
    "leff_statistics_kernel",
    "norm_by_last",
    "sum_pairs",
    "sum_parts",
]


@kernel
def leff_statistics_kernel(
    p_partial, p_count, p_norm, p_total, p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches,
    momentum: tl.float64, T,
    EPS: tl.constexpr, E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The ``norm`` array (5, E) and the count (1,) from T partial moments (T, 2, E) and their counts (T,); where wanted
    it is averaged into running statistics.
    """
    i_e = tl.program_id(0)
    o_e = i_e * TILE_E + tl.arange(0, TILE_E)
    m_e = o_e < E
    b_mean, b_squares, n = _merge_moments(p_partial, p_count, T, o_e, m_e, E, TILE_T, TILE_E, ACC)
    vectors = p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches, momentum
    _store_norm(b_mean, b_squares / n, n, p_norm, p_total, vectors, i_e, o_e, m_e, EPS, E, ACC)


@triton.jit
def norm_by_last(
    p_partial, p_count, p_tickets, p_norm, p_total, vectors, n, i_t, i_e, T, GROUP,
    EPS: tl.constexpr, E: tl.constexpr, NUM_E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What ``leff_statistics_kernel`` makes of T partial moments, by the last program instance to leave some in these
    NUM_E tiles of channels, from tile i_e on; this one has left those i_t, of n tokens.

    Those of each GROUP are merged first, as ``partials.sum_by_last`` does, and left behind the T: partial moments are
    (T + groups, 2, E), and counts, of each such column of program instances, (columns, T + groups).
    """
    i_g, groups, i_column = i_t // GROUP, tl.cdiv(T, GROUP), i_e // NUM_E
    p_count += i_column * (T + groups)
    p_tickets += i_column * (1 + groups)
    tl.store(p_count + i_t, n)
    parts = tl.minimum(GROUP, T - i_g * GROUP)
    if is_last(p_tickets + 1 + i_g, parts):
        for k in tl.static_range(NUM_E):
            o_e = (i_e + k) * TILE_E + tl.arange(0, TILE_E)
            p_parts = p_partial + i_g * (GROUP * 2 * E)
            b_mean, b_squares, n_group = _merge_moments(
                p_parts, p_count + i_g * GROUP, parts, o_e, o_e < E, E, TILE_T, TILE_E, ACC
            )
            store_rows(p_partial, T + i_g, b_mean, b_squares, o_e, o_e < E, E)
            tl.store(p_count + T + i_g, n_group)
        if is_last(p_tickets, groups):
            for k in tl.static_range(NUM_E):
                o_e = (i_e + k) * TILE_E + tl.arange(0, TILE_E)
                b_mean, b_squares, n_all = _merge_moments(
                    p_partial + T * (2 * E), p_count + T, groups, o_e, o_e < E, E, TILE_T, TILE_E, ACC
                )
                b_variance = b_squares / n_all
                _store_norm(b_mean, b_variance, n_all, p_norm, p_total, vectors, i_e + k, o_e, o_e < E, EPS, E, ACC)


@triton.jit
def _merge_moments(
    p_partial, p_count, T, o_e, m_e, E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr
):
    """Mean, sum of squares about it, and of how many tokens, from those of T parts of other program instances."""
    # About the mean of the first part, so that a mean far from zero costs no digits.
    b_first = tl.load(p_partial + o_e, mask=m_e, other=0.0, cache_modifier=".cg")
    b_means = tl.zeros((TILE_T, TILE_E), dtype=ACC)
    b_counts = tl.zeros((TILE_T,), dtype=ACC)
    for t in range(0, T, TILE_T):
        b_n, p_rows, mask = _part(p_partial, p_count, t, o_e, m_e, T, E, TILE_T)
        b_mean = tl.load(p_rows, mask=mask, other=0.0, cache_modifier=".cg")
        b_means += b_n[:, None] * (b_mean - b_first[None, :])
        b_counts += b_n
    n = tl.sum(b_counts, axis=0)
    b_offset = tl.sum(b_means, axis=0) / n
    b_squares = tl.zeros((TILE_T, TILE_E), dtype=ACC)
    for t in range(0, T, TILE_T):
        b_n, p_rows, mask = _part(p_partial, p_count, t, o_e, m_e, T, E, TILE_T)
        b_centred = tl.load(p_rows, mask=mask, other=0.0, cache_modifier=".cg") - b_first[None, :] - b_offset[None, :]
        b_own = tl.load(p_rows + E, mask=mask, other=0.0, cache_modifier=".cg")
        b_squares += b_own + b_n[:, None] * b_centred * b_centred
    return b_first + b_offset, tl.sum(b_squares, axis=0), n


@triton.jit
def _part(p_partial, p_count, t, o_e, m_e, T, E: tl.constexpr, TILE_T: tl.constexpr):
    """Counts of TILE_T parts, 0 behind the last, and where their means are."""
    o_t = t + tl.arange(0, TILE_T)
    p_rows = p_partial + o_t.to(tl.int64)[:, None] * (2 * E) + o_e[None, :]
    b_n = tl.load(p_count + o_t, mask=o_t < T, other=0.0, cache_modifier=".cg")
    return b_n, p_rows, (o_t < T)[:, None] & m_e[None, :]


@triton.jit
def _store_norm(
    b_mean, b_variance, n, p_norm, p_total, vectors, i_e, o_e, m_e, EPS: tl.constexpr, E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Of tile i_e of channels the ``norm`` array (5, E), and what is wanted besides: the n tokens, in p_total (1,), and
    the running statistics averaged. The vectors are weight and bias of the norm and those of ``_average``.
    """
    p_weight, p_bias, p_running_mean, p_running_var, p_batches, momentum = vectors
    b_rstd = tl.rsqrt(b_variance + EPS)
    b_scale, b_shift = b_rstd, tl.zeros_like(b_mean)
    if p_weight is not None:
        b_scale *= tl.load(p_weight + o_e, mask=m_e, other=0.0).to(ACC)
    if p_bias is not None:
        b_shift += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(ACC)
    store_rows(p_norm, 0, b_mean, b_variance, o_e, m_e, E)
    store_rows(p_norm, 1, b_rstd, b_scale, o_e, m_e, E)
    tl.store(p_norm + 4 * E + o_e, b_shift, mask=m_e)
    if p_total is not None:
        if i_e == 0:
            tl.store(p_total, n)
    if p_running_mean is not None:
        _average(b_mean, b_variance, n, p_running_mean, p_running_var, p_batches, momentum, i_e, o_e, m_e, ACC)


@kernel
def leff_running_kernel(
    p_norm1, p_running_mean1, p_running_var1, p_batches1, momentum1: tl.float64,
    p_norm2, p_running_mean2, p_running_var2, p_batches2, momentum2: tl.float64,
    p_norm3, p_running_mean3, p_running_var3, p_batches3, momentum3: tl.float64,
    p_total, E: tl.constexpr, O: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Average the ``norm`` arrays of a batch of p_total (1,) tokens into the running statistics of their layers, and
    count the batch in p_batches (); a layer whose array is None has none.
    """
    i_e = tl.program_id(0)
    i_layer = tl.program_id(1)
    if i_layer == 0:
        _average_array(p_norm1, p_total, p_running_mean1, p_running_var1, p_batches1, momentum1, i_e, E, TILE_E, ACC)
    elif i_layer == 1:
        _average_array(p_norm2, p_total, p_running_mean2, p_running_var2, p_batches2, momentum2, i_e, E, TILE_E, ACC)
    else:
        _average_array(p_norm3, p_total, p_running_mean3, p_running_var3, p_batches3, momentum3, i_e, O, TILE_E, ACC)


@triton.jit
def _average_array(
    p_norm, p_total, p_mean, p_variance, p_batches, momentum, i_e,
    E: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of TILE_E channels of a layer, from its ``norm`` array if there is one, and if there is such a tile."""
    if p_norm is not None:
        if (i_e >= 0) & (i_e * TILE_E < E):
            o_e = i_e * TILE_E + tl.arange(0, TILE_E)
            m_e = o_e < E
            b_mean = tl.load(p_norm + o_e, mask=m_e, other=0.0)
            b_variance = tl.load(p_norm + E + o_e, mask=m_e, other=0.0)
            n = tl.load(p_total)
            _average(b_mean, b_variance, n, p_mean, p_variance, p_batches, momentum, i_e, o_e, m_e, ACC)


@triton.jit
def _average(b_mean, b_variance, n, p_mean, p_variance, p_batches, momentum, i_e, o_e, m_e, ACC: tl.constexpr):
    """Average a batch of n tokens into running statistics."""
    b_new, b_old = tl.full(b_mean.shape, momentum, dtype=ACC), tl.full(b_mean.shape, 1.0 - momentum, dtype=ACC)
    b_mean = b_new * b_mean + b_old * tl.load(p_mean + o_e, mask=m_e, other=0.0).to(ACC)
    tl.store(p_mean + o_e, b_mean.to(p_mean.dtype.element_ty), mask=m_e)
    # The variance of a population, from that of this sample of it.
    b_variance = b_new * b_variance * (n / (n - 1)) + b_old * tl.load(p_variance + o_e, mask=m_e, other=0.0).to(ACC)
    tl.store(p_variance + o_e, b_variance.to(p_variance.dtype.element_ty), mask=m_e)
    if p_batches is not None:
        if i_e == 0:
            tl.store(p_batches, tl.load(p_batches) + 1)


@kernel
def leff_reduce_kernel(
    p_partial, p_norm, p_total, p_sums, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias, T,
    p_partial1, p_out1, S1, N1, p_partial2, p_out2, S2, N2, p_partial3, p_out3, S3, N3, p_partial4, p_out4, S4, N4,
    E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr,
    TAPS: tl.constexpr, TILE_S: tl.constexpr, TILE_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From partial sums (T, 2, E) of a norm's gradient g and of g (z - mean): the sums (2, E), the ``gradient`` array
    (4, E), and what ``gradient_of_sums`` stores. And sums (N,) of S other partial results (S, N), in the types of the
    sums; of the fourth, (S, TAPS, E), as (E, TAPS). Each has program instances of its own, and none where it is None.
    """
    i = tl.program_id(0)
    if p_partial is not None:
        if i < tl.cdiv(E, TILE_E):
            o_e = i * TILE_E + tl.arange(0, TILE_E)
            m_e = o_e < E
            b_sum, b_moment = sum_pairs(p_partial, T, o_e, m_e, E, TILE_T, TILE_E, ACC)
            _store_gradient(
                b_sum, b_moment, p_norm, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias, o_e, m_e, E
            )
            if p_sums is not None:
                store_rows(p_sums, 0, b_sum, b_moment, o_e, m_e, E)
        i -= tl.cdiv(E, TILE_E)
    i = sum_parts(p_partial1, p_out1, S1, N1, i, ONE, TILE_S, TILE_N, ACC)
    i = sum_parts(p_partial2, p_out2, S2, N2, i, ONE, TILE_S, TILE_N, ACC)
    i = sum_parts(p_partial3, p_out3, S3, N3, i, ONE, TILE_S, TILE_N, ACC)
    sum_parts(p_partial4, p_out4, S4, N4, i, TAPS, TILE_S, TILE_N, ACC)


@triton.jit
def sum_pairs(p_partial, T, o_e, m_e, E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr):
    """Both sums over T row pairs (T, 2, E)."""
    b_sums = tl.zeros((TILE_T, TILE_E), dtype=ACC)
    b_moments = tl.zeros((TILE_T, TILE_E), dtype=ACC)
    for t in range(0, T, TILE_T):
        o_t = t + tl.arange(0, TILE_T)
        mask = (o_t < T)[:, None] & m_e[None, :]
        p_rows = p_partial + o_t.to(tl.int64)[:, None] * (2 * E) + o_e[None, :]
        b_sums += tl.load(p_rows, mask=mask, other=0.0)
        b_moments += tl.load(p_rows + E, mask=mask, other=0.0)
    return tl.sum(b_sums, axis=0), tl.sum(b_moments, axis=0)


@triton.jit
def gradient_by_last(
    p_partial, p_tickets, p_norm, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias, i_t, i_e, T, GROUP, o_e,
    m_e, E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What ``leff_reduce_kernel`` makes of T row pairs, by the last program instance of channels i_e to leave one."""
    p_own = p_tickets + i_e * (1 + tl.cdiv(T, GROUP))
    last, b_sum, b_moment = sum_by_last(p_partial, p_own, i_t, T, GROUP, o_e, m_e, E, TILE_T, TILE_E, ACC)
    if last:
        _store_gradient(
            b_sum, b_moment, p_norm, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias, o_e, m_e, E
        )


@triton.jit
def _store_gradient(
    b_sum, b_moment, p_norm, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias, o_e, m_e, E: tl.constexpr
):
    """The ``gradient`` array (4, E), where wanted, and what ``gradient_of_sums`` stores."""
    b_gradient = gradient_of_sums(
        b_sum, b_moment, p_norm, p_total, p_dbias, p_dnorm_weight, p_dnorm_bias, o_e, m_e, m_e, E
    )
    if p_gradient is not None:
        store_rows(p_gradient, 0, b_gradient[0], b_gradient[1], o_e, m_e, E)
        store_rows(p_gradient, 1, b_gradient[2], b_gradient[3], o_e, m_e, E)


@triton.jit
def gradient_of_sums(
    b_sum, b_moment, p_norm, p_total, p_dbias, p_dnorm_weight, p_dnorm_bias, o_e, m_e, m_store, E: tl.constexpr
):
    """The rows of a norm's ``gradient`` array, from the sums of the gradient g of its output and of g (z - mean).

    Stores the gradients, where wanted, of the norm's weight and bias and of the bias of the convolution before it. A
    total (1,) of tokens says that mean and variance are those of this batch, so that they have gradients too; such a
    norm takes the convolution's bias away, whose gradient is exactly 0.
    """
    b_mean = tl.zeros_like(b_sum)
    b_rstd, b_scale, b_slope, b_offset = b_mean + 1.0, b_mean + 1.0, b_mean, b_mean
    if p_norm is not None:
        b_mean += tl.load(p_norm + o_e, mask=m_e, other=0.0)
        b_rstd = tl.load(p_norm + 2 * E + o_e, mask=m_e, other=0.0)
        b_scale = tl.load(p_norm + 3 * E + o_e, mask=m_e, other=0.0)
    b_bias = b_scale * b_sum
    if p_total is not None:
        n = tl.load(p_total)
        b_slope = -b_scale * b_rstd * b_rstd * (b_moment / n)
        b_offset = -b_scale * (b_sum / n)
        b_bias = tl.zeros_like(b_sum)
    if p_dnorm_weight is not None:
        tl.store(p_dnorm_weight + o_e, (b_moment * b_rstd).to(p_dnorm_weight.dtype.element_ty), mask=m_store)
    if p_dnorm_bias is not None:
        tl.store(p_dnorm_bias + o_e, b_sum.to(p_dnorm_bias.dtype.element_ty), mask=m_store)
    if p_dbias is not None:
        tl.store(p_dbias + o_e, b_bias.to(p_dbias.dtype.element_ty), mask=m_store)
    return b_mean, b_scale, b_slope, b_offset


@triton.jit
def sum_parts(
    p_partial, p_out, S, N, i_n, TAPS: tl.constexpr, TILE_S: tl.constexpr, TILE_N: tl.constexpr, ACC: tl.constexpr
):
    """Tile i_n, if there is one, of the sum of parts (S, TAPS, N // TAPS), transposed; and i_n behind its tiles."""
    if p_partial is None:
        return i_n
    else:
        o_n = i_n * TILE_N + tl.arange(0, TILE_N)
        m_n = (o_n >= 0) & (o_n < N)
        if (i_n >= 0) & (i_n * TILE_N < N):
            b_sum = tl.zeros((TILE_S, TILE_N), dtype=ACC)
            for s in range(0, S, TILE_S):
                o_s = s + tl.arange(0, TILE_S)
                mask = (o_s < S)[:, None] & m_n[None, :]
                b_sum += tl.load(p_partial + o_s.to(tl.int64)[:, None] * N + o_n[None, :], mask=mask, other=0.0)
            o_out = o_n % (N // TAPS) * TAPS + o_n // (N // TAPS)
            tl.store(p_out + o_out, tl.sum(b_sum, axis=0).to(p_out.dtype.element_ty), mask=m_n)
        return i_n - tl.cdiv(N, TILE_N)
