"""Read the slot parts of a SlotContrast checkpoint (github martius-lab/slotcontrast); its file history lives here only.

It opens no file: the caller loads the dictionary, best with `torch.load(..., weights_only=True)`.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from slotmemory.errors import InputError
from slotmemory.slots.attention import Grouper, LearnedInit, Predictor, SlotAttention

PREFIXES = {
    "initializer.": "initializer.",
    "processor.module.corrector.": "grouper.",
    "processor.module.predictor.": "predictor.",
}


def load_slotcontrast(state_dict: Mapping[str, Tensor], *, heads: int = 4) -> Grouper:
    """Build the released Grouper, sized by the checkpoint; its backbone, encoder head and decoder are dropped.

    Accepts a Lightning checkpoint too (weights under `state_dict`). The head count cannot be read off the shapes; the
    released models have 4. Raises InputError (a ValueError) that names the tensors missing, unknown or misshapen.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    ours, theirs = {}, {}
    for name, tensor in state_dict.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix:
            renamed = PREFIXES[prefix] + name.removeprefix(prefix)
            ours[renamed], theirs[renamed] = tensor, name

    def size(name: str, axes: int) -> tuple[int, ...]:
        if name not in ours:
            raise InputError(f"not a SlotContrast checkpoint with a learned table: {_original(name)} is missing")
        if ours[name].ndim != axes:
            shape = list(ours[name].shape)
            raise InputError(f"SlotContrast checkpoint: {theirs[name]} is {shape}, expected {axes} axes")
        return tuple(ours[name].shape)

    _, num_slots, dim = size("initializer.slots", 3)
    grouper = Grouper(
        LearnedInit(num_slots, dim),
        Predictor(dim, size("predictor.blocks.0.linear1.weight", 2)[0], heads=heads, attn_scale="released"),
        SlotAttention(dim, size("grouper.mlp.layers.1.weight", 2)[0], token_dim=size("grouper.to_k.weight", 2)[1]),
    )
    expected = grouper.state_dict()
    wrong = [
        f"{theirs[n]} is {list(ours[n].shape)}, expected {list(t.shape)}"
        for n, t in expected.items()
        if n in ours and ours[n].shape != t.shape
    ]
    complaints = {
        "missing": [_original(n) for n in expected if n not in ours],
        "unknown": [theirs[n] for n in ours if n not in expected],
        "misshapen": wrong,
    }
    if any(complaints.values()):
        told = "; ".join(f"{what}: {_list(names)}" for what, names in complaints.items() if names)
        raise InputError(f"SlotContrast checkpoint ({num_slots} slots of width {dim}): {told}")
    grouper.load_state_dict(ours)
    return grouper


def _original(name: str) -> str:
    theirs, ours = next((t, o) for t, o in PREFIXES.items() if name.startswith(o))
    return theirs + name.removeprefix(ours)


def _list(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
