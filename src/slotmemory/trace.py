"""One trace record per chunk, derived from what a memory read and from its banks before and after.

A policy writes no logging: whatever it is, its record can be drawn, counted and compared.
"""

from collections import Counter
from typing import Any

from slotmemory.memory import Bank, State, banks, held_bytes

Key = tuple[str, int, int]  # bank, born, owner


def items(state: State, layer: int) -> dict[Key, tuple[Bank, int]]:
    """The items of one layer (batch row 0), by bank name, latent frame of birth and owner."""
    found = {}
    for name, layers in banks(state):
        bank = layers[layer]
        for i, (born, owner) in enumerate(names_of(bank)):
            found[(name, born, owner)] = (bank, i)
    return found


def record(before: State, shown: State, after: State, read: list[Bank], layer: int) -> dict[str, Any]:
    """Say which items were read, written and evicted in one layer; ids read `bank:born` or `bank:born.owner`.

    before: the state the chunk found; shown: what a prompt switch made of it (else the same), which `read` was called
    with; after: the state once the chunk was written; read: what `Memory.read` returned for this layer.
    """
    had, has, could = items(before, layer), items(after, layer), items(shown, layer)
    # two banks may hold items of the same frame and size; each reading counts for one of them
    times = Counter((*item, bank.keys.shape[2]) for bank in read for item in names_of(bank))
    tokens: dict[str, int] = {}
    seen = set()
    for (name, born, owner), (bank, _) in could.items():
        size = bank.keys.shape[2]
        if times[born, owner, size]:
            times[born, owner, size] -= 1
            seen.add((name, born, owner))
            tokens[name] = tokens.get(name, 0) + size
    made = sum(size * count for (_, _, size), count in times.items())  # a policy may read what it does not hold
    if made:
        tokens["made"] = made
    listed = []
    for key, (bank, i) in {**had, **has}.items():
        name, born, owner = key
        listed.append(
            {
                "id": label(key),
                "kind": name,
                "born": born,
                "owner": owner,
                "score": round(float(bank.score[0, i].detach()), 4),
                "tokens": bank.keys.shape[2],
                "read": key in seen,
            }
        )
    return {
        "read": tokens,
        "items": listed,
        "written": sum(bank.keys.shape[2] for key, (bank, _) in has.items() if key not in had),
        "evicted": [label(key) for key in had if key not in has],
        "bytes": held_bytes(after),
    }


def names_of(bank: Bank) -> list[tuple[int, int]]:
    """Birth and owner of each item, batch row 0."""
    return list(zip(bank.born[0].tolist(), bank.owner[0].tolist()))


def label(key: Key) -> str:
    name, born, owner = key
    return f"{name}:{born}" if owner < 0 else f"{name}:{born}.{owner}"
