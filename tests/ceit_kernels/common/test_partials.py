"""The last program instance of a launch takes up what all of them left behind, whichever it is."""

import pytest
import torch
import triton
import triton.language as tl
from support import instances
from support.where import DEVICE, UNDER_TTSEM

from ceit_kernels.common.partials import store_rows, sum_by_last

pytestmark = pytest.mark.kernels

GROUP = tl.constexpr(4)


@triton.jit
def sum_kernel(p_x, p_partial, p_tickets, p_out, T, E: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr):
    """The sums over T row pairs (T, 2, E), of which every program instance first copies one."""
    i, o_e = tl.program_id(0), tl.arange(0, TILE)
    m_e = o_e < E
    p_row = p_x + i * 2 * E + o_e
    store_rows(p_partial, i, tl.load(p_row, mask=m_e), tl.load(p_row + E, mask=m_e), o_e, m_e, E)
    if ORDERED:
        last, b_0, b_1 = sum_by_last(p_partial, p_tickets, i, T, GROUP, o_e, m_e, E, 2, TILE, tl.float32)
    else:
        last = i == T - 1
        b_0 = tl.load(p_partial + o_e, mask=m_e)
        b_1 = tl.load(p_partial + E + o_e, mask=m_e)
    if last:
        store_rows(p_out, 0, b_0, b_1, o_e, m_e, E)


def make(parts):
    """Row pairs, and counters of a launch over them."""
    return torch.randn(parts, 2, 20).to(DEVICE), torch.zeros(1 + -(-parts // GROUP.value), dtype=torch.int32).to(DEVICE)


def sums_of(x, tickets, ordered=True):
    parts, channels = x.shape[0], x.shape[2]
    partial = x.new_full((parts + len(tickets) - 1, 2, channels), float("nan"))
    out = torch.full_like(x[0], float("nan"))
    sum_kernel[(parts,)](x, partial, tickets, out, parts, E=channels, TILE=32, ORDERED=ordered)
    return out


@pytest.mark.parametrize("parts", [1, 4, 11])
def test_whichever_is_the_last_takes_the_same_sums_and_leaves_the_counters_at_zero(monkeypatch, parts):
    x, tickets = make(parts)
    expected = sums_of(x, tickets)
    torch.testing.assert_close(expected, x.sum(0))
    for seed in range(3):
        instances.shuffle(monkeypatch, seed)
        assert torch.equal(sums_of(x, tickets), expected)
        assert not tickets.any()


@pytest.mark.skipif(not UNDER_TTSEM, reason="ttsem alone looks for races")
def test_what_no_ticket_orders_is_a_race():
    x, tickets = make(11)
    with pytest.raises(Exception, match="both touch element"):
        sums_of(x, tickets, ordered=False)


@pytest.mark.gpu
def test_the_sums_are_the_same_bits_a_thousand_times_on_two_streams_and_in_a_graph():
    x, tickets = make(500)
    expected = sums_of(x, tickets)
    streams = [torch.cuda.Stream() for _ in range(2)]
    others = [torch.zeros_like(tickets) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(1000):
        found = []
        for stream, own in zip(streams, others, strict=True):
            with torch.cuda.stream(stream):
                found.append(sums_of(x, own))
        torch.cuda.synchronize()
        assert all(torch.equal(sums, expected) for sums in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sums_of(x, tickets)
    for _ in range(1000):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)
