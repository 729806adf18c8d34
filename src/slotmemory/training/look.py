"""Look at a transformer in training: stream short scripts from their text alone and lay the frames side by side."""

from pathlib import Path

import torch
from PIL import Image

from slotmemory.engine import Engine
from slotmemory.models import assemble
from slotmemory.training.parallel import whole

SCRIPTS = (
    ["A red cat walks in the meadow.", "A blue ball waits on the beach.", "The red cat jumps in the snow."],
    ["A green robot waits at night.", "The night is empty.", "The green robot walks at night."],
    ["A purple ghost jumps on the beach.", "A yellow cat walks in the meadow.", "A purple ghost walks on the beach."],
)
CHUNKS_PER_SHOT = 4


def filmstrips(objective, folder: Path, memory: str = "sink") -> None:
    """Write one PNG: a row per script, two frames per chunk."""
    dtype = objective.context.dtype
    backbone = type(objective.transformer)(objective.transformer.config).to(dtype)
    backbone.load_state_dict({name: whole(tensor) for name, tensor in objective.transformer.state_dict().items()})
    film(assemble(backbone.eval(), objective.codec, objective.words, objective.settings).with_memory(memory), folder)


def film(engine: Engine, folder: Path) -> None:
    """Write the scripts' sheet as an engine makes them: `filmstrips.png` in `folder`."""
    rows = []
    for number, prompts in enumerate(SCRIPTS):
        session = engine.session({i * CHUNKS_PER_SHOT: p for i, p in enumerate(prompts)}, seed=number)
        frames = [session.step().frames[0, 2::6][:2] for _ in range(len(prompts) * CHUNKS_PER_SHOT)]
        rows.append(torch.cat([frame for pair in frames for frame in pair], -1))
    sheet = torch.cat(rows, 1).permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(folder / "filmstrips.png")
