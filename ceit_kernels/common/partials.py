"""What program instances leave behind in device memory, and who takes it up, in Triton.

Sums of it are taken in a fixed order. Instead of a launch of its own, the last program instance of the launch that
leaves it can take them: each stores what it has and takes a ticket, and whoever gets the last one goes on.
"""

import triton
import triton.language as tl

__all__ = ["is_last", "store_rows", "sum_by_last", "zero_tickets"]


@triton.jit
def is_last(p_ticket, count):
    """Whether the others of ``count`` program instances that take tickets here have taken theirs.

    What they stored before may then be loaded, with ``cache_modifier=".cg"``, since the cache of an SM knows nothing of
    other SMs. They have one warp each unless ``launch.one_publishes_for_all()``. The counter, an int32 that is 0 before
    the launch, is 0 behind it, so that a launch may find it again.
    """
    # The stores of all threads, then the ticket that one thread takes: it publishes them all (release) and makes the
    # others' visible (acquire), then the loads of all threads.
    tl.debug_barrier()
    last = tl.atomic_add(p_ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.debug_barrier()
    if last:
        tl.store(p_ticket, 0)
    return last


@triton.jit
def zero_tickets(p_tickets, COUNTERS, i):
    """Let the tickets (COUNTERS,) of later launches start at 0, which program instance 0 does."""
    if i == 0:
        for t in range(0, COUNTERS, 128):
            o_t = t + tl.arange(0, 128)
            tl.store(p_tickets + o_t, tl.zeros((128,), dtype=tl.int32), mask=o_t < COUNTERS)


@triton.jit
def sum_by_last(
    p_partial, p_tickets, i_t, T, GROUP, o_e, m_e,
    E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Whether this is the last program instance of T, of which i_t has left row pair i_t; if so, both sums of all.

    The sums of each GROUP are taken by the last of it, which leaves them behind the T row pairs, since one program
    instance alone would read for longer than a launch takes. There are a counter and one for each group.
    """
    b_0, b_1 = tl.zeros((TILE_E,), dtype=ACC), tl.zeros((TILE_E,), dtype=ACC)
    i_g, groups = i_t // GROUP, tl.cdiv(T, GROUP)
    parts = tl.minimum(GROUP, T - i_g * GROUP)
    last = is_last(p_tickets + 1 + i_g, parts)
    if last:
        p_parts = p_partial + i_g * (GROUP * 2 * E)
        b_0, b_1 = _sum_pairs(p_parts, parts, o_e, m_e, E, TILE_T, TILE_E, ACC)
        store_rows(p_partial, T + i_g, b_0, b_1, o_e, m_e, E)
        last = is_last(p_tickets, groups)
        if last:
            p_groups = p_partial + T * (2 * E)
            b_0, b_1 = _sum_pairs(p_groups, groups, o_e, m_e, E, TILE_T, TILE_E, ACC)
    return last, b_0, b_1


@triton.jit
def store_rows(p_partial, i_t, b_0, b_1, o_e, m_e, E: tl.constexpr):
    """Row pair i_t of a partial result (T, 2, E)."""
    p_row = p_partial + i_t * (2 * E) + o_e
    tl.store(p_row, b_0, mask=m_e)
    tl.store(p_row + E, b_1, mask=m_e)


@triton.jit
def _sum_pairs(p_partial, T, o_e, m_e, E: tl.constexpr, TILE_T: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr):
    """Both sums over T row pairs (T, 2, E) of other program instances."""
    b_0, b_1 = tl.zeros((TILE_E,), dtype=ACC), tl.zeros((TILE_E,), dtype=ACC)
    for t in range(0, T, TILE_T):
        o_t = t + tl.arange(0, TILE_T)
        mask = (o_t < T)[:, None] & m_e[None, :]
        p_rows = p_partial + o_t[:, None] * (2 * E) + o_e[None, :]
        # Summed at once, since registers say how many program instances an SM holds while the others still work.
        b_0 += tl.sum(tl.load(p_rows, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
        b_1 += tl.sum(tl.load(p_rows + E, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    return b_0, b_1
