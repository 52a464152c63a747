"""The order of a launch's program instances: in which they run here, and what tickets make of it.

ttsem and Triton's interpreter run them one after another, and ttsem calls it a race where one loads what another
stored. It is none where a ticket of ``common.partials`` stands between them, which ttsem does not know of.
"""

import random
import re

from support.where import INTERPRETING

# An addition that acquires and releases, for the whole GPU, in Triton's numbers.
_TICKET = re.compile(r"tt\.atomic_rmw.*atomic_rmw_op = 4 : i32, scope = 1 : i32, sem = 4 : i32")


def shuffle(monkeypatch, seed):
    """Run the program instances of launches in an order drawn from the seed."""
    if not INTERPRETING:
        monkeypatch.setenv("TTSEM_GRID_ORDER", f"shuffle:{seed}")
        return
    from triton.runtime.interpreter import interpreter_builder

    set_index = type(interpreter_builder).set_grid_idx

    def set_shuffled(*index):
        sizes = interpreter_builder.grid_dim
        orders = (random.Random(seed).sample(range(n), n) for n in sizes)
        set_index(interpreter_builder, *(order[i] for order, i in zip(orders, index, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_shuffled, raising=False)


def teach_tickets(pidraces):
    """Let ttsem's search for races leave out what tickets order."""
    find = pidraces.find_race
    pidraces.find_race = lambda log: find(without_ordered(log))


def without_ordered(log):
    """ttsem's log without the addresses of an access that tickets put behind every access that it could race with.

    An entry is an instance, a kind ("r", "w", "s" for a store of what was there, "a" for an atomic update), the
    operation, addresses, the size of an element, and what was written.
    """
    if not log or not any(_is_ticket(entry) for entry in log):
        return log
    seen, published, before = {}, {}, []  # of an instance, and of a ticket, the last entry of each other instance
    for i, entry in enumerate(log):
        instance = entry[0]
        if _is_ticket(entry):
            for address in entry[3].tolist():
                known = seen.get(instance, {}), published.get(address, {}), {instance: i}
                merged = {}
                for other, last in (pair for each in known for pair in each.items()):
                    merged[other] = max(last, merged.get(other, -1))
                seen[instance] = published[address] = merged
        before.append(seen.get(instance, {}))
    return [kept for i, entry in enumerate(log) if (kept := _unordered(entry, before[i], log)) is not None]


def _is_ticket(entry):
    return entry[1] == "a" and bool(_TICKET.search(entry[2]))


def _unordered(entry, before, log):
    instance, kind, operation, addresses, size, written = entry
    if not before or kind == "a":
        return entry
    racing = set()
    for i, (other, other_kind, _, others, *_) in enumerate(log):
        if other != instance and i > before.get(other, -1) and (kind != "r" or other_kind in "wa"):
            racing.update(others.tolist())
    keep = [place for place, address in enumerate(addresses.tolist()) if address in racing]
    if not keep:
        return None
    written = None if written is None else written.reshape(addresses.size, -1)[keep].reshape(-1)
    return instance, kind, operation, addresses[keep], size, written
