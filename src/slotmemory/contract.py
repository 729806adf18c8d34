"""What every memory must hold to, as checks that any policy can be put through: the package's own and a file of yours.

A check takes a `Trial` (a policy and an engine to run it on) and raises AssertionError or InputError with a sentence,
or DoesNotApply. It knows no policy by name, no weights and no test framework; streams run through the one session loop.
The toy engine is random, tiny and blind to meaning: enough to tell right arithmetic from wrong, in milliseconds.
"""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slotmemory import memory as memories
from slotmemory.backbones.attention import Dense
from slotmemory.backbones.causal_wan import CausalWan, Seen, WanConfig
from slotmemory.engine import Engine, Text
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memory import Bank, Memory, Now, Prefix, State, Written, banks, held_bytes
from slotmemory.sampler import FewStep
from slotmemory.session import SeededNoise, Session
from slotmemory.trace import names_of

ONE_PROMPT = {0: "a red cat walks"}
TWO_PROMPTS = {0: "a red cat walks", 4: "the blue dog sleeps in the sun"}
# Batched and single products round differently; wrong keys, values or places move the toy's latents by 1e-2 and more.
CLOSE = 2e-4


class DoesNotApply(Exception):
    """The policy does not claim what the check asks."""


# the toy


class ToyText(Text):
    """Words by their checksum: the same vector for the same word, in every process."""

    def __init__(self, width: int):
        self.width = width

    def check(self, prompt: str) -> None:
        if not prompt.split():
            raise ValueError("the prompt is empty; expected a few words")

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        words = [prompt.split() for prompt in prompts]
        embeddings = torch.zeros(len(prompts), max(len(row) for row in words), self.width)
        for row, spoken in enumerate(words):
            for column, word in enumerate(spoken):
                generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                embeddings[row, column] = torch.randn(self.width, generator=generator)
        return embeddings, torch.tensor([len(row) for row in words])


class ToyCodec:
    """Three latent channels as colours; it remembers the last latent frame, so that a lost decoder state shows."""

    space_stride, time_stride, latent_channels, dtype = 1, 1, 4, torch.float32

    def start(self) -> dict[str, list[Tensor]]:
        return {"last": []}

    def push(self, latents: Tensor, state: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        before = state["last"][0] if state["last"] else torch.zeros_like(latents[:, :1])
        video = (latents + torch.cat((before, latents[:, :-1]), 1)) / 4
        return video[:, :, :3], {"last": [latents[:, -1:]]}


@cache
def toy(dtype: torch.dtype = torch.float32) -> Engine:
    """A random engine of 2 layers and 16 tokens per latent frame, with a memory of its own size for every policy."""
    config = WanConfig(24, 48, 2, 2, 16, 8, 8, 4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = CausalWan(config)
        for part in (*backbone.blocks, backbone.head):
            nn.init.normal_(part.modulation, std=0.5)
        nn.init.normal_(backbone.head.head.weight, std=config.dim**-0.5)
    layout = Layout(
        64,
        64,
        latent_channels=config.in_dim,
        layers=config.num_layers,
        heads=config.num_heads,
        head_dim=config.head_dim,
        text_tokens=config.text_len,
    )
    defaults = {"window": 9, "slots": 3, "slot_dim": 8, "tokens_per_slot": 4, "bank": 2, "record_every": 1}
    networks = {"width": 16, "heads": 2}
    return Engine(
        backbone.to(dtype).eval().requires_grad_(False),
        ToyCodec(),
        ToyText(config.text_dim),
        FewStep((1000, 500)),
        memories.build("none", layout),
        layout,
        memory_defaults=defaults | networks,
    )


# trials


@dataclass(frozen=True)
class Trial:
    """A policy, how to build it and what to run it on; `chunks` is the length of a stream, enough for evictions."""

    policy: type[Memory]
    engine: Engine = field(default_factory=toy)
    options: Mapping[str, Any] = field(default_factory=dict)
    chunks: int = 6

    @property
    def name(self) -> str:
        return f"memory '{self.policy.called()}'"

    def knows(self, argument: str) -> bool:
        return argument in memories.arguments(self.policy)

    def memory(self, budget: int | None = None, **changes: Any) -> Memory:
        """Build the policy anew; arguments it does not have are left out of the changes."""
        known = memories.arguments(self.policy)
        defaults = {k: v for k, v in self.engine.memory_defaults.items() if k in known}
        changes = {k: v for k, v in changes.items() if k in known}
        policy = self.policy(self.engine.layout, budget, **{**defaults, **self.options, **changes})
        policy.adopt(*self.engine.patch)
        return policy.to(self.engine.device).eval().requires_grad_(False)

    def session(
        self,
        memory: Memory | None = None,
        prompts: Mapping[int, str] | None = None,
        seeds: Sequence[int] = (7,),
        engine: Engine | None = None,
    ) -> Session:
        engine = replace(engine or self.engine, memory=memory or self.memory())
        return Session(engine, dict(prompts or TWO_PROMPTS), self.chunks, seeds)

    def run(self, *given: Any, **options: Any) -> Tensor:
        """Make a whole stream; arguments of `session`. Latents [B, F, C, h, w]."""
        return latents_of(self.session(*given, **options))


def latents_of(session: Session) -> Tensor:
    """Make what is left of a stream."""
    return torch.cat([chunk.latents for chunk in session], 1)


class Watched(Memory):
    """A policy with somebody looking over its shoulder: `around(call, policy's method, arguments)` makes every call."""

    def __init__(self, policy: Memory, around: Callable[[str, Callable, tuple], Any]):
        super().__init__(policy.layout, policy.budget)
        self.policy, self.around = policy, around
        self.replays, self.called = policy.replays, policy.called

    def start(self, batch: int) -> State:
        return self.policy.start(batch)

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return self.around("read", self.policy.read, (state, layer, now))

    def attend(self, state: State, now: Now, read: list[list[Bank]], context: list[tuple[Tensor, Tensor]]) -> Any:
        return self.around("attend", self.policy.attend, (state, now, read, context))

    def prefix(self, state: State, written: Written) -> tuple[State, Prefix | None]:
        return self.around("prefix", self.policy.prefix, (state, written))

    def write(self, state: State, written: Written) -> State:
        return self.around("write", self.policy.write, (state, written))

    def update(self, state: State, written: Written) -> State:
        return self.around("update", self.policy.update, (state, written))

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        return self.around("switch", self.policy.switch, (state, now))


def tokens_of(found: Iterable[Bank]) -> int:
    return sum(bank.tokens for bank in found)


def demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def demand_close(found: Tensor, expected: Tensor, limit: float, sentence: str) -> None:
    """Demand equal latents, to the bit where the limit is 0; the complaint names the first chunk that differs."""
    apart = (found.float() - expected.float()).abs()
    frame = int((apart.amax((0, 2, 3, 4)) > limit).float().argmax())
    most = float(apart.max())
    demand(most <= limit, f"{sentence}: from latent frame {frame} on, by up to {most:.2g}")


def difference(a: Any, b: Any, where: str) -> str | None:
    """Where two trees of tensors, banks and plain values first differ; None if nowhere."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
        return None if same else where
    if type(a) is not type(b):
        return where
    if is_dataclass(a):
        return difference({f.name: getattr(a, f.name) for f in fields(a)}, vars(b), where)
    if isinstance(a, dict):
        if set(a) != set(b):
            return where
        return next((d for key in a if (d := difference(a[key], b[key], f"{where}[{key!r}]"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return where
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{where}[{i}]"))), None)
    return None if a == b else where


def dense(engine: Engine, prompt: str, chunks: int, seeds: Sequence[int], past: bool) -> Tensor:
    """The reference: every chunk made together with its clean past under a mask, or alone. No memory is involved."""
    layout, noise = engine.layout, SeededNoise(seeds)
    shape = (len(seeds), layout.frames_per_chunk, layout.latent_channels, layout.latent_height, layout.latent_width)
    embeddings, _ = engine.text.encode([prompt] * len(seeds))
    text = engine.backbone.text_keys(embeddings)
    made: list[Tensor] = []

    def next_chunk(chunk: int, before: list[Tensor]) -> Tensor:
        frames = torch.arange((chunk - len(before)) * shape[1], (chunk + 1) * shape[1], device=engine.device)
        block = frames // shape[1]
        pattern = Dense(block[None] <= block[:, None])

        def predict(noisy: Tensor, t: float) -> Tensor:
            steps = torch.zeros(len(seeds), len(frames), device=engine.device)
            steps[:, -shape[1] :] = t
            flow, _ = engine.backbone(torch.cat((*before, noisy), 1), steps, text, frames, pattern)
            return flow[:, -shape[1] :]

        def draw() -> Tensor:
            return noise.fresh(shape).to(engine.device)

        return engine.sampler.denoise(predict, noise.first(shape).to(engine.device), draw)

    for chunk in range(chunks):
        made.append(next_chunk(chunk, made if past else []))
    return torch.cat(made, 1)


# checks


def reads_within_its_budget(trial: Trial) -> None:
    """It never reads more tokens per layer than its budget, whatever the budget."""

    def run_at(budget: int | None) -> None:
        memory = trial.memory(budget)
        limit = memory.budget  # None: a policy that declares no budget is a ceiling
        if budget is not None and limit is not None:
            demand(limit <= budget, f"{trial.name} was given a budget of {budget} tokens and took {limit}")

        def around(call, method, given):
            found = method(*given)
            if call == "read" and limit is not None:
                tokens = tokens_of(found)
                demand(tokens <= limit, f"{trial.name} read {tokens} tokens at a budget of {limit}")
            return found

        trial.run(Watched(memory, around))

    per_frame = trial.engine.layout.tokens_per_frame
    for budget in (None, 0, 2 * per_frame + 5, 5 * per_frame):
        run_at(budget)


def holds_no_more_than_its_budget(trial: Trial) -> None:
    """`update` merges and evicts down to the budget, in every layer."""

    def run_at(budget: int | None) -> None:
        memory = trial.memory(budget)
        limit = memory.budget
        if limit is None:
            raise DoesNotApply(f"{trial.name} declares no budget")

        def around(call, method, given):
            found = method(*given)
            for layer in range(trial.engine.layout.layers if call == "update" else 0):
                tokens = tokens_of(layers[layer] for _, layers in banks(found))
                told = f"{trial.name} holds {tokens} tokens in layer {layer} after update; its budget is {limit}"
                demand(tokens <= limit, told)
            return found

        trial.run(Watched(memory, around))

    for budget in (None, 5 * trial.engine.layout.tokens_per_frame + 3):
        run_at(budget)


def repeats_itself(trial: Trial) -> None:
    """Built and run again with the same seed it makes the same bits, whatever the global random state."""
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(trial.run())
    demand_close(found[0], found[1], 0, f"{trial.name} makes another video when the same stream is run again")


def keeps_rows_apart(trial: Trial) -> None:
    """A batch of two streams makes what the two make alone."""
    together = trial.run(seeds=(7, 8))
    for row, seed in enumerate((7, 8)):
        alone = trial.run(seeds=(seed,))
        told = f"{trial.name} lets batch row {row} depend on its neighbour"
        demand_close(together[row : row + 1], alone, CLOSE, told)


def edits_nothing_it_is_given(trial: Trial) -> None:
    """State in, state out: read, attend, prefix, write, update and switch leave their arguments as they were."""

    def around(call, method, given):
        # a pattern is the policy's own, made for this chunk
        shown = [replace(part, pattern=None) if isinstance(part, Written) else part for part in given]
        before = copy.deepcopy(shown)
        found = method(*given)
        names = {
            "read": ("state", "layer", "now"),
            "attend": ("state", "now", "read", "context"),
            "switch": ("state", "now"),
        }.get(call, ("state", "written"))
        for name, old, new in zip(names, before, shown):
            changed = difference(old, new, name)
            demand(changed is None, f"{trial.name} changes {changed} in `{call}`; return a new state, edit none")
        return found

    trial.run(Watched(trial.memory(recache=True), around))


def reads_only_the_past(trial: Trial) -> None:
    """What is read was born before the chunk and stands before it in time."""

    def around(call, method, given):
        found = method(*given)
        if call == "read":
            now = given[2]
            end = now.frame + now.frames if now.replay else now.frame  # a replay may see what it computes again
            for bank in (bank for bank in found if bank.items):
                born, place = int(bank.born.max()), float(bank.positions[..., 0].max())
                demand(born < end, f"{trial.name} reads an item born at frame {born} for frames from {now.frame} on")
                demand(place < end, f"{trial.name} reads a key placed at {place:g} for frames from {now.frame} on")
        return found

    trial.run(Watched(trial.memory(recache=True), around))


def goes_on_exactly_after_save_and_load(trial: Trial) -> None:
    """A stream saved to a file and loaded on a newly built memory goes on to the bit, wherever it was cut."""
    whole = trial.run(trial.memory(recache=True))
    session, made = trial.session(trial.memory(recache=True)), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        while not session.done:
            try:
                session.save(path)
            except TypeError as error:
                raise AssertionError(f"{trial.name} holds what cannot be saved: {error}") from error
            session = trial.session(trial.memory(recache=True), prompts={0: "not this"}, seeds=(99,))
            session.load(path)
            made.append(session.step().latents)
    demand_close(torch.cat(made, 1), whole, 0, f"{trial.name} does not go on exactly after save and load")


def lets_forks_go_their_own_ways(trial: Trial) -> None:
    """A fork starts as the same stream; what happens to one of the two never shows in the other."""
    memory = trial.memory()
    whole = trial.run(trial.memory())
    session, made = trial.session(memory), []
    for chunk in range(trial.chunks):
        fork, twin = session.fork(), session.fork()
        fork.prompt("something quite different")
        fork.step()
        made.append(session.step().latents)
        if chunk in (1, trial.chunks - 1):
            demand_close(twin.step().latents, made[-1], 0, f"{trial.name} makes another chunk in a fork")
    demand_close(torch.cat(made, 1), whole, 0, f"{trial.name} lets a fork change the stream it came from")


def passes_gradients_to_its_parameters_only(trial: Trial) -> None:
    """Every trainable parameter gets a gradient, by losses, state or attention; what is read carries none to earlier chunks."""
    memory = trial.memory().requires_grad_(True)
    leaves: list[Tensor] = []
    shown: list[Any] = []  # what was read, and what attention inside the policy made of it
    made: list[Tensor] = []  # tokens handed to the model
    patterns: list[Any] = []

    def around(call, method, given):
        with torch.enable_grad():
            if call == "write":
                state, written = given
                layers = [Seen(*(x.detach().clone().requires_grad_() for x in seen)) for seen in written.layers]
                leaves.extend(x for seen in layers for x in (seen.keys, seen.values))
                pattern = patterns[-1] or written.pattern
                given = state, replace(written, layers=layers, pattern=pattern)
            found = method(*given)
        if call == "read":
            shown.extend(found)
        if call == "prefix" and found[1] is not None:
            made.append(found[1].tokens)
        if call == "attend":
            patterns.append(found)
            return found and watched(found)
        return found

    def watched(pattern):
        def attended(*given):
            with torch.enable_grad():
                shown.append(pattern(*given))
            return shown[-1].detach()

        return attended

    session = trial.session(Watched(memory, around))
    try:
        for _ in range(min(3, trial.chunks)):
            session.step()
        with torch.enable_grad():
            read = sum((total(part) for part in shown), torch.zeros(()))
            kept = sum(memory.losses(session.state).values(), torch.zeros(())) + total(session.state) + total(made)
        if read.requires_grad:
            reached = torch.autograd.grad(read, leaves, retain_graph=True, allow_unused=True)
            told = f"{trial.name} lets a chunk's gradient reach the keys of earlier chunks"
            demand(all(g is None for g in reached), told)
        names, parameters = zip(*memory.named_parameters()) if list(memory.parameters()) else ((), ())
        if parameters:
            demand((read + kept).requires_grad, f"{trial.name} has parameters, but nothing it makes depends on them")
            gradients = torch.autograd.grad(read + kept, parameters, allow_unused=True)
            lost = [n for n, g in zip(names, gradients) if g is None]
            demand(not lost, f"{trial.name} has parameters that no gradient reaches: {', '.join(lost[:3])}")
            wild = [n for n, g in zip(names, gradients) if not bool(g.isfinite().all())]
            demand(not wild, f"{trial.name} has parameters whose gradient is not finite: {', '.join(wild[:3])}")
    except RuntimeError as error:
        raise AssertionError(f"{trial.name} cannot be differentiated: {error}") from error


def total(tree: Any) -> Tensor:
    """Sum all finite numbers of a tree that carry a gradient (scores may say -inf)."""
    if isinstance(tree, Tensor):
        return tree[tree.isfinite()].float().sum() if tree.requires_grad else torch.zeros(())
    if is_dataclass(tree):
        tree = vars(tree)
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum((total(child) for child in children), torch.zeros(()))


def does_not_know_what_time_it_is(trial: Trial) -> None:
    """A stream whose latent frames are all numbered later by a constant makes the same video."""
    here = trial.session(trial.memory(recache=True))
    there = trial.session(trial.memory(recache=True))
    there.frame = 1000 * trial.engine.layout.frames_per_chunk
    demand_close(latents_of(there), latents_of(here), CLOSE, f"{trial.name} makes another video late in time")


def equals_dense_attention_when_it_may_read_everything(trial: Trial) -> None:
    """With a window as long as the video, or without a budget, it is dense causal attention."""
    trial = replace(trial, engine=replace(trial.engine, context_noise=0.0))
    frames = trial.chunks * trial.engine.layout.frames_per_chunk
    most = 0

    def around(call, method, given):
        nonlocal most
        found = method(*given)
        if call == "read":
            most = max(most, tokens_of(found))
        return found

    memory = trial.memory(window=frames, bank=0, placing="native")
    found = trial.run(Watched(memory, around), prompts=ONE_PROMPT)
    if not trial.knows("window") and most < trial.engine.layout.tokens(frames - trial.engine.layout.frames_per_chunk):
        raise DoesNotApply(f"{trial.name} never reads the whole past")
    expected = dense(trial.engine, ONE_PROMPT[0], trial.chunks, (7,), past=True)
    demand_close(found, expected, CLOSE, f"{trial.name} may read everything, but is not dense causal attention")


def equals_no_context_when_it_may_read_nothing(trial: Trial) -> None:
    """At a budget of 0 every chunk is made from its prompt alone."""
    trial = replace(trial, engine=replace(trial.engine, context_noise=0.0))
    memory = trial.memory(0)
    if memory.budget is None:
        raise DoesNotApply(f"{trial.name} declares no budget")
    found = trial.run(memory, prompts=ONE_PROMPT)
    expected = dense(trial.engine, ONE_PROMPT[0], trial.chunks, (7,), past=False)
    demand_close(found, expected, CLOSE, f"{trial.name} shows a past at a budget of 0")


def accounts_for_every_token(trial: Trial) -> None:
    """The trace derived from its banks says exactly what was read, written, evicted and held."""
    layer = trial.engine.layout.layers // 2
    read = 0

    def around(call, method, given):
        nonlocal read
        found = method(*given)
        if call == "read" and given[1] == layer:
            read = tokens_of(found)
        return found

    session = trial.session(Watched(trial.memory(recache=True), around))

    def held() -> int:
        return tokens_of(layers[layer] for _, layers in banks(session.state))

    before, alive = 0, set()
    for chunk in session:
        trace, after = chunk.trace, held()
        size = {item["id"]: item["tokens"] for item in trace["items"]}
        lost = alive - set(size)
        demand(not lost, f"{trial.name}: the trace of chunk {chunk.index} loses sight of {', '.join(sorted(lost)[:3])}")
        alive = set(size) - set(trace["evicted"])
        evicted = sum(size[name] for name in trace["evicted"])
        told = sum(trace["read"].values())
        demand(told == read, f"{trial.name} read {read} tokens for chunk {chunk.index}, its trace says {told}")
        sentence = (
            f"{trial.name} at chunk {chunk.index}: {before} tokens + {trace['written']} written - {evicted} evicted "
            f"are not the {after} held; items of a bank must differ in birth or owner"
        )
        demand(before + trace["written"] - evicted == after, sentence)
        demand(trace["bytes"] == held_bytes(session.state), f"{trial.name}: the trace miscounts bytes")
        before = after


def stays_finite_in_bf16(trial: Trial) -> None:
    """With a model in bf16 it makes finite latents."""
    halved = copy.deepcopy(trial.engine.backbone).to(torch.bfloat16)
    engine = replace(trial.engine, backbone=halved)
    try:
        found = trial.run(trial.memory(recache=True).to(torch.bfloat16), engine=engine, seeds=(7, 8))
    except RuntimeError as error:
        raise AssertionError(f"{trial.name} cannot run in bf16: {error}") from error
    demand(bool(found.isfinite().all()), f"{trial.name} is not finite in bf16")


def replays_without_repeating(trial: Trial) -> None:
    """A prompt switch replays frames that exist, leaves older items as they are and doubles none."""
    for start in (2, 4):  # in a young stream and in one that has evicted
        switches_well_at(trial, start)


def switches_well_at(trial: Trial, start: int) -> None:
    """Step a stream whose prompt changes at chunk `start`."""
    switch: tuple[State, int] | None = None  # the state before, and the frames to replay

    def around(call, method, given):
        nonlocal switch
        found = method(*given)
        if call == "switch":
            asked, made, keeps = found[1], session.frame, session.engine.memory.replays
            demand(0 <= asked <= made, f"{trial.name} asks to replay {asked} of {made} latent frames")
            demand(asked <= keeps, f"{trial.name} asks to replay {asked} latent frames, but declares replays={keeps}")
            switch = given[0], asked
        return found

    session = trial.session(Watched(trial.memory(recache=True), around), {0: "a red cat", start: "a dog sleeps"})
    while not session.done:
        switch, first = None, session.frame
        session.step()
        for name, layers in banks(session.state):
            for layer, bank in enumerate(layers):
                told = f"{trial.name} holds an item of bank '{name}' twice after a switch"
                demand(len(set(names_of(bank))) == bank.items, told)
                if switch and switch[1]:
                    old = dict(banks(switch[0])).get(name)
                    changed = old and changed_before(first - switch[1], old[layer], bank)
                    demand(not changed, f"{trial.name} changes the item of frame {changed}, which was not replayed")


def changed_before(frame: int, old: Bank, new: Bank) -> str | None:
    """The first item born before a frame whose keys or values are not what they were, by its birth."""
    places = {item: i for i, item in enumerate(names_of(old))}
    for i, item in enumerate(names_of(new)):
        if item in places and item[0] < frame:
            a, b = old.map(lambda x, j=places[item]: x[:, j]), new.map(lambda x, j=i: x[:, j])
            if not (torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)):
                return str(item[0])
    return None


CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        reads_within_its_budget,
        holds_no_more_than_its_budget,
        repeats_itself,
        keeps_rows_apart,
        edits_nothing_it_is_given,
        reads_only_the_past,
        goes_on_exactly_after_save_and_load,
        lets_forks_go_their_own_ways,
        passes_gradients_to_its_parameters_only,
        does_not_know_what_time_it_is,
        equals_dense_attention_when_it_may_read_everything,
        equals_no_context_when_it_may_read_nothing,
        accounts_for_every_token,
        stays_finite_in_bf16,
        replays_without_repeating,
    )
}


@dataclass(frozen=True)
class Verdict:
    """How a check ended: it holds (True), fails (False) or does not apply (None), and why."""

    check: str
    holds: bool | None
    reason: str


def examine(memory: str | type[Memory], engine: Engine | None = None, **options: Any) -> list[Verdict]:
    """Put a memory (a name, a path or a class) through all checks, on the toy engine unless another is given."""
    policy = memories.find(memory) if isinstance(memory, str) else memory
    trial = Trial(policy, engine or toy(), options)
    verdicts = []
    for name, check in CHECKS.items():
        claim = (check.__doc__ or name).splitlines()[0]
        try:
            check(trial)
            verdicts.append(Verdict(name, True, claim))
        except DoesNotApply as reason:
            verdicts.append(Verdict(name, None, str(reason)))
        except (AssertionError, InputError) as reason:
            verdicts.append(Verdict(name, False, str(reason)))
        except Exception as error:  # whatever a policy raises is its verdict, and the other checks go on
            verdicts.append(Verdict(name, False, f"{trial.name} raised {type(error).__name__}: {error}"))
    return verdicts
