"""The page on training names options that exist, with their defaults, and recipes and commands that are there."""

import re
from pathlib import Path

import pytest
import yaml

from slotmemory.training import distribution_matching, ode, policies
from slotmemory.training.recipe import find_objective, load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name, section", SECTIONS, ids=[name for name, _ in SECTIONS])
def test_options_are_named_with_their_defaults(name, section):
    fields = find_objective(name).Options.model_fields
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
    assert len(rows) >= 4
    for option, told in rows:
        default = fields[option].default
        # YAML reads a bare `off` as false
        found = told if isinstance(default, str) else yaml.safe_load(told)
        assert found == (list(default) if isinstance(default, tuple) else default), option


def test_every_option_of_the_slot_losses_is_named():
    told = set(re.findall(r"^\| `(\w+)`", dict(SECTIONS)["slots"], re.MULTILINE))
    from slotmemory.training.lessons import LessonOptions

    assert set(LessonOptions.model_fields) <= told


def test_every_published_defect_is_named():
    told = set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Defects")[2].partition("\n## ")[0], re.MULTILINE))
    known = {
        *distribution_matching.Compat.__args__,
        *ode.Options.model_fields["compat"].annotation.__args__[0].__args__,
    }
    assert told == known and set(policies.Defect.__args__) < known


def test_recipes_and_commands_are_there():
    named = set(re.findall(r"`(\w+\.yaml)`", PAGE.partition("## A run")[0]))
    assert named and all((ROOT / "recipes" / "train" / "tiny" / name).is_file() for name in named - {"recipe.yaml"})
    for command in re.findall(r"^slotmemory train (recipes/\S+)", PAGE, re.MULTILINE):
        load_recipe(ROOT / command)
    for stage in re.findall(r"`(ode|distribution_matching|long_tuning|slots_stage\d)`", PAGE.partition("## Wan2.1")[2]):
        assert (ROOT / "recipes" / "train" / "wan2.1-1.3b" / f"{stage}.yaml").is_file()
