"""One trace record per chunk, derived from what a memory read and from its banks before and after.

A policy writes no logging: whatever it is, its record can be drawn, counted and compared.
"""

from typing import Any

from slotmemory.memory import Bank, State, banks, held_bytes

Key = tuple[str, int, int]  # bank, born, owner


def items(state: State, layer: int) -> dict[Key, tuple[Bank, int]]:
    """The items of one layer (batch row 0), by bank name, latent frame of birth and owner."""
    found = {}
    for name, layers in banks(state):
        bank = layers[layer]
        for i, (born, owner) in enumerate(zip(bank.born[0].tolist(), bank.owner[0].tolist())):
            found[(name, born, owner)] = (bank, i)
    return found


def record(before: State, after: State, read: list[Bank], layer: int) -> dict[str, Any]:
    """Say which items were read, written and evicted in one layer; ids read `bank:born` or `bank:born.owner`.

    before, after: the state around the chunk's write and update; read: what `Memory.read` returned for this layer.
    """
    had, has = items(before, layer), items(after, layer)
    seen = {(born, owner) for bank in read for born, owner in zip(bank.born[0].tolist(), bank.owner[0].tolist())}
    tokens: dict[str, int] = {}
    for (name, born, owner), (bank, _) in had.items():
        if (born, owner) in seen:
            tokens[name] = tokens.get(name, 0) + bank.keys.shape[2]
    listed = []
    for key, (bank, i) in {**had, **has}.items():
        name, born, owner = key
        listed.append(
            {
                "id": label(key),
                "kind": name,
                "born": born,
                "owner": owner,
                "score": round(float(bank.score[0, i]), 4),
                "tokens": bank.keys.shape[2],
                "read": key in had and (born, owner) in seen,
            }
        )
    return {
        "read": tokens,
        "items": listed,
        "written": sum(bank.keys.shape[2] for key, (bank, _) in has.items() if key not in had),
        "evicted": [label(key) for key in had if key not in has],
        "bytes": held_bytes(after),
    }


def label(key: Key) -> str:
    name, born, owner = key
    return f"{name}:{born}" if owner < 0 else f"{name}:{born}.{owner}"
