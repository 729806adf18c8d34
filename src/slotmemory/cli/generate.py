"""`slotmemory generate` and `slotmemory resume`: from words on the command line to a run folder.

Says which option wins (flag, then script, then the run that is repeated, then default) and what is printed at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from slotmemory.errors import InputError

if TYPE_CHECKING:
    from slotmemory.cli.prepare import Prepared
    from slotmemory.config import Generate
    from slotmemory.run import Run
    from slotmemory.script import Script


class WithMemoryArguments(TyperCommand):
    """Takes `--memory.window 12` and `--memory.window=12` for `-m window=12`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words, rest = [], iter(args)
        for word in rest:
            if not word.startswith("--memory."):
                words.append(word)
                continue
            key, equals, value = word.removeprefix("--memory.").partition("=")
            if not equals:
                value = next(rest, None)
                if value is None:
                    raise InputError(f"{word}: a value is missing; write {word} VALUE")
            words += ["-m", f"{key}={value}"]
        return super().parse_args(ctx, words)


def generate(
    script: Path | None = typer.Argument(None, help="A script: .yaml, or .jsonl as LongLive and MemFlow use."),
    line: int | None = typer.Option(None, help="Which line of a .jsonl file, from 1."),
    prompt: str | None = typer.Option(None, help="Instead of a script: one prompt ..."),
    seconds: float = typer.Option(10.0, help="... and how long to show it."),
    like: Path | None = typer.Option(None, metavar="RUN", help="Repeat a run exactly; other options change it."),
    out: Path | None = typer.Option(None, metavar="FOLDER", help="Where to; default: a new folder in runs/."),
    model: str | None = typer.Option(None, help="A preset, folder, file, or org/name of the Hub; default: tiny."),
    memory: str | None = typer.Option(None, help="A name (see `slotmemory memories`) or a .py file; default: slots."),
    argument: list[str] = typer.Option(
        [], "-m", metavar="KEY=VALUE", help="An argument of the memory, also as --memory.KEY VALUE; repeatable."
    ),
    budget: int | None = typer.Option(None, help="Tokens that a layer may read from memory."),
    steps: str | None = typer.Option(None, help="1000,750,500,250: a few-step list; 20: so many Euler steps."),
    seed: int | None = typer.Option(None, help="Same seed, same video; default: the script's, else a new one."),
    scale: int | None = typer.Option(
        None, help="Enlarge the video by a whole number; default: until it is about 640 wide."
    ),
    save_every: int | None = typer.Option(None, help="Save the state every so many chunks; default: 10."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; default: a GPU where there is one."),
    dtype: str | None = typer.Option(None, help="fp32, bf16 or fp16; default: what the device is fast at."),
    quant: str | None = typer.Option(None, help="int8 or fp8: eight-bit weights in the transformer's blocks."),
    offload: str | None = typer.Option(None, help="text, codec or all: what rests on the processor beside a GPU."),
    compile: bool | None = typer.Option(None, "--compile/--no-compile", help="Compile the transformer's blocks."),
    kernel: str | None = typer.Option(None, help="Of attention: cudnn, flash, flash_attn, flash_attn_3, flex."),
    threads: int | None = typer.Option(None, help="Processor threads; default: one per core."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print schedule, memory, disk and time; write nothing."),
) -> None:
    """Make a video from a script, chunk by chunk, into a run folder."""
    from slotmemory.config import parse_arguments, parse_steps

    flags = {
        "model": model,
        "memory": memory,
        "budget": budget,
        "steps": None if steps is None else parse_steps(steps),
        "seed": seed,
        "scale": scale,
        "save_every": save_every,
        "device": device,
        "dtype": dtype,
        "quant": quant,
        "offload": offload,
        "compile": compile,
        "kernel": kernel,
        "threads": threads,
    }
    told, title, source = _told(script, line, prompt, seconds, like)
    options = resolve(told, flags, parse_arguments(argument), source)
    if out is not None and not dry_run:
        _check_free(out)

    from slotmemory.cli.prepare import prepare

    prepared = prepare(told, options, folder=None if dry_run else out or Path("runs"))
    if source is not None:
        _warn_of_differences(source, prepared)
    if dry_run:
        from slotmemory.cli.dry_run import print_plan

        print_plan(prepared)
        return
    from slotmemory.cli.stream import stream
    from slotmemory.run import Run, new_folder

    run = Run.create(out or new_folder("runs", title), told, prepared.recipe)
    stream(run, prepared)
    _print_result(run, prepared)


def resume(run: Path = typer.Argument(..., help="The folder of a run that was stopped, killed or failed.")) -> None:
    """Go on with a run that was interrupted; it ends as if it had not been."""
    from slotmemory.run import Run

    opened = Run.open(run)
    options = _recipe_options(opened)
    done = opened.status["status"] == "finished" and all(x.is_file() for x in (opened.filmstrip, opened.timeline))

    from slotmemory.cli.prepare import prepare
    from slotmemory.cli.stream import lock, stream

    with lock(opened.folder):  # a run that still goes on is told apart before anything is loaded
        pass
    prepared = prepare(opened.script, options, folder=opened.folder)
    if done:
        typer.echo(f"{run} is finished already; nothing to do")
    else:
        if opened.recipe.get("weights") != prepared.recipe["weights"]:
            raise InputError(
                f"the weights of model '{options.model}' are no longer those {run} was made with; start a new run, "
                f"`slotmemory generate --like {run}` repeats it with these"
            )
        _warn_of_differences(opened, prepared)
        stream(opened, prepared, resume=True)
    _print_result(opened, prepared)


def _told(
    path: Path | None, line: int | None, prompt: str | None, seconds: float, like: Path | None
) -> tuple[Script, str | None, Run | None]:
    """The script, a title for the folder, and the run that is to be repeated."""
    from slotmemory.run import Run
    from slotmemory.script import Script, Shot, load_script

    given = [name for name, value in (("a script", path), ("--prompt", prompt), ("--like", like)) if value is not None]
    if not given:
        raise InputError(
            "what to show is missing; give a script such as examples/lost-and-found.yaml, --prompt or --like"
        )
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other; give one of them")
    if line is not None and path is None:
        raise InputError(f"--line {line}: there is no file to choose a line of")
    if like is not None:
        run = Run.open(like)
        return run.script, run.script.title or Path(like).name, run
    if prompt is not None:
        return Script((Shot(prompt, seconds),)), "-".join(prompt.split()[:6]), None
    script = load_script(path, line)
    return script, script.title or path.stem, None


def resolve(script: Script, flags: dict[str, Any], arguments: dict[str, Any], source: Run | None = None) -> Generate:
    """Options for a script: a flag that is not None wins, then the script or the run that is repeated, then defaults."""
    from slotmemory.config import generate_options

    flags = {name: value for name, value in flags.items() if value is not None}
    values = _recipe_options(source).model_dump() if source else _script_options(script)
    if flags.get("memory", values.get("memory")) != values.get("memory"):
        values["arguments"] = {}  # another memory has arguments of its own
    values |= flags
    values["arguments"] = {**values.get("arguments", {}), **arguments}
    return generate_options(values)


def _script_options(script: Script) -> dict[str, Any]:
    values = dict(script.options)
    for name in ("width", "height"):  # sizes are the model's; `prepare` compares
        values.pop(name, None)
    if script.seed is not None:
        values["seed"] = script.seed
    return values


def _recipe_options(run: Run) -> Generate:
    from slotmemory.config import Generate, generate_options

    source = f"{run.folder}/recipe.yaml"
    missing = [name for name in Generate.model_fields if name not in run.recipe]
    if missing:
        raise InputError(f"{source} lacks '{missing[0]}'; it was not written by `slotmemory generate`, or was changed")
    return generate_options({name: run.recipe[name] for name in Generate.model_fields}, source)


def _check_free(out: Path) -> None:
    """Complain about a folder in use before the model is loaded; `Run.create` decides."""
    if (out / "recipe.yaml").exists():
        raise InputError(
            f"{out} already holds a run; continue it with `slotmemory resume {out}` or choose another --out"
        )


def _warn_of_differences(run: Run, prepared: Prepared) -> None:
    from slotmemory import __version__

    now = {**prepared.recipe, "version": __version__}
    changed = [
        f"{name} {run.recipe.get(name)} -> {now[name]}"
        for name in ("version", "weights", "torch", "device", "dtype", "threads")
        if run.recipe.get(name) != now[name]
    ]
    if changed:
        typer.echo(f"slotmemory: {run.folder} was made with other {', '.join(changed)}; frames may differ", err=True)


def _print_result(run: Run, prepared: Prepared) -> None:
    """Print where the files are and what they hold."""
    from slotmemory.video import count_chunks

    frames = count_chunks(run.video)[1]
    pace = run.status.get("frames_per_second")
    made = f", made at {pace:.1f} frames/s" if pace else ""
    typer.echo(
        f"{frames} frames, {frames / prepared.engine.layout.fps:.1f} s of video{made}, seed {prepared.options.seed}"
    )
    for name, path in (
        ("video", run.video),
        ("filmstrip", run.filmstrip),
        ("timeline", run.timeline),
        ("trace", run.trace),
    ):
        typer.echo(f"  {name:<10} {path}")
