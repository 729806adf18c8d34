"""Single latent frames for flow matching: five times as many pictures as clips for the same arithmetic.

*Stills* see themselves and their prompt: looks come first. *Recalls* see clean latent frames as a memory would hand them
back: somebody's own, strangers', both, or nobody's. Each of them comes twice, with and without the strangers, so that a
loss can ask that strangers change nothing. Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slotmemory.training.clips import Batch, ClipOptions, Levels, grown
from slotmemory.training.narratives import Encoded

PARTS = 0.5  # share of somebody's own clean frames of which only they show
HOME = 0.3  # share of strangers that are looked for in the same narrative first
NEAR = 0.5  # share of groups whose clean frames stand where a window's do
WINDOW = 9  # latent frames of such a window

CLEAN, ASKED = 3, 3  # rows of a group: an entity's and two strangers'; pairs of noisy ones
GROUP = CLEAN + 2 * ASKED

Picked = tuple[Encoded, int]  # a narrative and the number of a latent frame


class SingleFrames:
    """Draws batches of single latent frames."""

    def __init__(self, options: ClipOptions):
        self.options, self.levels = options, Levels(options)

    def stills(self, items: Sequence[Encoded], rows: int, random: torch.Generator) -> Batch:
        """Draw so many single latent frames from all narratives given; each sees itself and its prompt."""
        which = torch.randint(len(items), (rows,), generator=random).tolist()
        shares = torch.rand(rows, generator=random).tolist()
        picked = [(items[i], int(share * len(items[i].latents))) for i, share in zip(which, shares)]
        return self._batch(
            picked,
            torch.zeros(rows, dtype=torch.long),
            self.levels.draw(rows, random),
            torch.zeros(rows, 0, dtype=torch.long),
            torch.zeros(rows, picked[0][0].labels.shape[1], dtype=torch.bool),
            torch.ones(rows, dtype=torch.bool),
            (),
            random,
        )

    def recalls(self, items: Sequence[Encoded], rows: int, random: torch.Generator) -> Batch:
        """Draw groups of single latent frames, about so many rows: clean ones of an entity and of two strangers, and three
        noisy ones, each twice: of the entity beside all of the clean ones (twin: beside its own), of the entity beside
        strangers (twin: beside nobody), and of somebody else beside the entity and a stranger (twin: beside nobody). What
        cannot be had among the narratives given is left out."""
        peopled = [item for item in items if item.cells.any()]
        picked: list[Picked] = []
        table: list[list[int]] = []
        frames, hidden, noisy, twins = [], [], [], []
        for i in torch.randint(len(peopled), (max(1, rows // GROUP),), generator=random).tolist():
            item = peopled[i]
            which, part, near, *draws = torch.rand(6, generator=random).tolist()
            cast = [e for e in range(len(item.cells)) if item.cells[e].any()]
            entity = cast[int(which * len(cast))]
            theirs = item.cells[entity].flatten(1).any(1).nonzero()[:, 0].tolist()
            own, first, second = ((item, theirs[int(draw * len(theirs))]) for draw in draws)
            met = [s for _ in range(CLEAN - 1) if (s := stranger([first, second], peopled, random))]
            other = stranger([own, *met[:1]], peopled, random)

            row = len(picked)
            mine, strange = [row], list(range(row + 1, row + 1 + len(met)))
            asked = [(first, mine + strange, mine), (second, strange, [])]
            asked += [(other, mine + strange[:1], [])] if other else []
            picked += [own, *met]
            table += [[]] * (1 + len(met))
            for frame, beside, without in asked:
                twins.append((len(picked), len(picked) + 1))
                picked += [frame] * 2
                table += [beside, without]
            reach = WINDOW if near < NEAR else 3 * self.options.far
            away = -1 - torch.randint(reach, (1 + len(met),), generator=random)
            frames += [away, torch.zeros(2 * len(asked), dtype=torch.long)]
            noisy += [False] * len(away) + [True] * (2 * len(asked))
            around = ~grown(item.cells[entity, own[1] : own[1] + 1]).flatten()
            nothing = torch.zeros_like(around)
            hidden += [around if part < PARTS else nothing, *[nothing] * (len(picked) - row - 1)]
        is_noisy = torch.tensor(noisy)
        sigma = torch.where(is_noisy, self.levels.draw(len(noisy), random), self.levels.light(len(noisy), random))
        for beside, without in twins:
            sigma[without] = sigma[beside]
        padded = torch.tensor([sees + [-1] * (CLEAN - len(sees)) for sees in table])
        return self._batch(
            picked, torch.cat(frames), sigma, padded, torch.stack(hidden), is_noisy, tuple(twins), random
        )

    def _batch(
        self,
        picked: Sequence[Picked],
        frames: Tensor,
        sigma: Tensor,
        table: Tensor,
        hidden: Tensor,
        noisy: Tensor,
        twins: tuple[tuple[int, int], ...],
        random: torch.Generator,
    ) -> Batch:
        """A batch whose rows are the frames picked: frames, sigma and noisy [R], the rest as in `Batch`."""
        cells = torch.stack([item.cells[:, f].any(0).flatten() for item, f in picked])
        return Batch(
            torch.stack([item.latents[f : f + 1] for item, f in picked]),
            frames[:, None],
            sigma,
            table,
            hidden,
            1.0 + (self.options.entity_weight - 1.0) * cells.float(),
            self.levels.without_text([item.prompts[f // 3] for item, f in picked], twins, random),
            noisy,
            torch.stack([item.labels[f] for item, f in picked]),
            torch.stack([item.places[f] for item, f in picked]),
            twins=twins,
        )


def stranger(met: Sequence[Picked], items: Sequence[Encoded], random: torch.Generator) -> Picked | None:
    """Draw a latent frame with somebody and nobody of those whom the frames `met` show: of the first one's narrative, or of
    another that shares no name with theirs, in a scene that they do not show, for scenery differs between narratives."""
    home, which, pick = torch.rand(3, generator=random).tolist()
    if home < HOME and (found := _frames_without(met[0][0], [f for item, f in met if item is met[0][0]])):
        return met[0][0], found[int(pick * len(found))]
    names = frozenset().union(*(item.names for item, _ in met))
    scenes = {_scene(item, f) for item, f in met}
    elsewhere = [item for item in items if not item.names & names and not scenes.issuperset(item.scenes)]
    if not elsewhere:
        return None
    item = elsewhere[int(which * len(elsewhere))]
    found = [f for f in _frames_without(item, ()) if _scene(item, f) not in scenes]
    return (item, found[int(pick * len(found))]) if found else None


def _scene(item: Encoded, frame: int) -> str:
    return item.scenes[frame // 3]


def _frames_without(item: Encoded, frames: Sequence[int]) -> list[int]:
    """Latent frames that show somebody, and nobody of those whom these frames show."""
    shown = item.cells.flatten(2).any(2)  # [E, L]
    met = shown[:, list(frames)].any(1)
    return (shown.any(0) & ~shown[met].any(0)).nonzero()[:, 0].tolist()
