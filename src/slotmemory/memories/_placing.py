"""Where remembered keys stand in time, seen from the chunk that reads them. Shared by policies; not a policy.

native    at the latent frame they were made for (Wan, Self-Forcing, LongLive, MemFlow)
relative  in the order they are read, directly before the chunk, without gaps (Infinity-RoPE; LongLive's infinite mode)
capped    native, but no chunk further back than `reach` latent frames: distances stay in the range a model was trained
          on, however long the video; frames of one chunk keep their order
"""

import torch

from slotmemory.errors import InputError, unknown
from slotmemory.memory import Bank, Now

PLACINGS = ("native", "relative", "capped")


def check_placing(name: str) -> str:
    if name not in PLACINGS:
        raise InputError(unknown("placing", name, PLACINGS))
    return name


def place(banks: list[Bank], now: Now, placing: str, reach: int) -> list[Bank]:
    """Move the banks' temporal positions; banks in the order they are read, oldest first."""
    if placing == "native":
        return banks
    if placing == "relative":
        start, placed = now.frame - sum(bank.items for bank in banks), []
        for bank in banks:
            order = torch.arange(start, start + bank.items, device=bank.born.device)
            placed.append(bank.at(order.expand(bank.born.shape)))
            start += bank.items
        return placed
    # capped: shift whole chunks, so that an early frame of a far chunk still comes before a late one
    return [bank.at(cap_frames(bank.positions[..., 0], now.frame, now.frames, reach)) for bank in banks]


def cap_frames(frames: torch.Tensor, now: int, chunk: int, reach: int) -> torch.Tensor:
    """Bring latent frames within reach of frame `now`, moving each chunk of `chunk` frames as a whole."""
    return frames + (now - reach - (frames - frames % chunk)).clamp(min=0)
