"""Guards over the source itself: imports go down, importing is free, sizes and prints stay where they belong."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "slotmemory"

# docs/architecture.md; a module imports from its own layer and those before it
LAYERS = [
    {"errors"},
    {"layout", "tree", "script", "config", "video", "pictures", "world"},
    {"memory"},
    {"memories", "slots", "backbones", "codecs", "checkpoints"},
    {"sampler", "trace", "guard", "engine", "session", "run", "models", "footprint"},
    {"training", "evaluation", "server", "contract", "bench"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# mathematics of tensors that happens to live beside the backbones: policies may build on it
OPEN = {"slotmemory.backbones.attention", "slotmemory.backbones.rope"}
EXCEPT = {("memory", "memories")}  # discovery lists the folder of policies when it is asked to

FORBIDDEN = {
    ("memories", "backbones"): "a memory never calls the backbone",
    ("slots", "backbones"): "a memory never calls the backbone",
    ("slots", "memory"): "slots are mathematics of tensors and know no memory",
    ("backbones", "memory"): "the backbone never knows which memory is in use",
    ("backbones", "memories"): "the backbone never knows which memory is in use",
    ("backbones", "slots"): "the backbone never knows which memory is in use",
    ("session", "memories"): "the loop knows no policy by name",
    ("engine", "memories"): "the engine knows no policy by name",
    ("memory", "slots"): "the interface knows no policy",
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ["slotmemory", *path.relative_to(SOURCE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def is_package(name: str) -> bool:
    return (SOURCE.parent / Path(*name.split(".")) / "__init__.py").is_file()


def imported(name: str, nodes) -> set[str]:
    """The package's own modules that import statements among the nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                up = parts[: len(parts) - node.level + is_package(name)]
                base = ".".join([*up, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in sources()} or {base}
    return {name for name in found if name.split(".")[0] == "slotmemory"}


def at_import(tree: ast.AST):
    """Nodes that run when the module is imported: not the bodies of functions, not what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_import(node)


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {inner for node in guarded for inner in ast.walk(node)}


def part(name: str) -> str:
    """slotmemory.world.grammar -> world; the package itself -> ''."""
    return (name.split(".") + [""])[1]


@cache
def edges() -> set[tuple[str, str]]:
    """Which module imports which, at import or later."""
    found = set()
    for name, tree in sources().items():
        nodes = set(ast.walk(tree)) - for_types_only(tree)
        found |= {(name, other) for other in imported(name, nodes)}
    return found


def test_every_module_has_a_place_in_the_layers():
    homeless = {part(name) for name in sources()} - set(RANK) - {""}
    assert not homeless, f"give {sorted(homeless)} a place in LAYERS and in docs/architecture.md"


def test_imports_only_go_down():
    upwards = [
        f"{name} imports {other}"
        for name, other in sorted(edges())
        if RANK.get(part(other), 0) > RANK.get(part(name), 0) and (part(name), part(other)) not in EXCEPT
    ]
    assert not upwards


def test_memories_and_backbones_do_not_know_each_other():
    broken = [
        f"{name} imports {other}: {FORBIDDEN[part(name), part(other)]}"
        for name, other in sorted(edges())
        if (part(name), part(other)) in FORBIDDEN and not (part(name) == "memories" and other in OPEN)
    ]
    assert not broken


def test_the_world_knows_nothing_of_the_rest():
    assert {part(other) for name, other in edges() if part(name) == "world"} <= {"world", "errors", ""}


def test_what_policies_may_build_on_knows_no_backbone():
    known = {other for name, other in edges() if name in OPEN}
    assert known <= OPEN


def test_no_two_modules_import_each_other():
    below = {name: imported(name, at_import(tree)) & set(sources()) - {name} for name, tree in sources().items()}
    while True:  # peel off whatever imports nothing that is left
        leaves = {name for name, others in below.items() if not others & set(below)}
        if not leaves:
            break
        below = {name: others for name, others in below.items() if name not in leaves}
    # a package and its own parts may name each other
    knots = {name: others & set(below) for name, others in below.items()}
    knots = {n: {o for o in os if not o.startswith(f"{n}.") and not n.startswith(f"{o}.")} for n, os in knots.items()}
    assert not {name: others for name, others in knots.items() if others}


@pytest.mark.parametrize(
    "modules",
    [["slotmemory"], ["slotmemory.errors", "slotmemory.layout", "slotmemory.script", "slotmemory.config"]],
    ids=["the package", "what is pure data"],
)
def test_importing_does_not_import_torch(modules):
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_importing_the_package_alone_is_free():
    code = "import sys; before = set(sys.modules); import slotmemory; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {name.split(".")[0] for name in found.stdout.split()} - {"slotmemory", "__future__"}


def test_sizes_of_one_published_model_are_written_nowhere():
    # the tokens of a latent frame, of a chunk and of the whole cache of Wan 1.3B at 832 x 480
    sizes = {1560, 4680, 32760}
    found = [
        f"{name}:{node.lineno} says {node.value}"
        for name, tree in sources().items()
        if "adapters" not in name
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in sizes
    ]
    assert not found, "derive sizes from the layout"


def test_only_the_command_line_prints():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in sources().items()
        if part(name) != "cli" and not name.endswith("__main__")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found, "use logging, or say it in the command line"


def test_the_environment_is_read_in_one_place_only():
    found = {
        name
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert {part(name) for name in found} <= {"config", "cli"}


def test_no_test_folder_hides_from_the_suite():
    """A folder whose files are called otherwise would never run."""
    tests = Path(__file__).parent
    for folder in (p for p in tests.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))):
        if list(folder.glob("*.py")):
            assert list(folder.glob("test_*.py")), f"{folder.name} holds code and no test"


def test_the_guards_see_relative_nested_and_late_imports_and_leave_out_those_for_types():
    tree = ast.parse(
        "from ..engine import Engine\n"
        "from . import grammar\n"
        "def late():\n    import slotmemory.run\n"
        "if TYPE_CHECKING:\n    from slotmemory.cli import app\n"
    )
    name = "slotmemory.world.motion"
    everything = set(ast.walk(tree)) - for_types_only(tree)
    assert imported(name, everything) == {"slotmemory.engine", "slotmemory.world.grammar", "slotmemory.run"}
    assert imported(name, at_import(tree)) == {"slotmemory.engine", "slotmemory.world.grammar"}
