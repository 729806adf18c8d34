"""Recipes: what is rejected, and how it is said."""

from pathlib import Path

import pytest

from slotmemory.training.recipe import dump_recipe, find_objective, load_recipe, objectives, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "train"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("objective: codec\nstpes: 5", "unknown key 'stpes'; did you mean 'steps'"),
        ("objective: codec\nsteps: 5\noptimizer: {learning_rat: 1}", "optimizer: unknown key 'learning_rat'; did"),
        ("objective: codec\nsteps: 5\noptions: {fames: 17}", "options: unknown key 'fames'; did you mean 'frames'"),
        ("objective: codec\nsteps: 5\noptions: {sizes: {pach: 4}}", "sizes: unknown key 'pach'; did you mean 'patch'"),
        ("objective: codek\nsteps: 5", "unknown objective 'codek'; did you mean 'codec'"),
        ("objective: nowhere.py\nsteps: 5", "no such file"),
        ("steps: 5", "objective is missing"),
        ("objective: codec", "steps: Field required"),
        ("objective: codec\nsteps: many", "steps: .*got many"),
        ("objective: codec\nsteps: 5\nbatch: 3\nprocesses: 2", "batch=3 does not divide"),
        ("objective: codec\nsteps: 5\noptimizer: {decay_by: minutes}", "needs max_minutes"),
        ("- a", "holds list"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_reach_inner_keys(tmp_path):
    path = write(tmp_path, "objective: codec\nsteps: 5\n")
    recipe = load_recipe(path, ["optimizer.clip=0.5", "options.sizes.patch=4", "init=runs/x"])
    assert recipe.optimizer.clip == 0.5 and recipe.options.sizes.patch == 4 and recipe.init == "runs/x"
    assert load_recipe(path, {"steps": 7}).steps == 7
    with pytest.raises(ValueError, match="unknown key 'clp'"):
        load_recipe(path, ["optimizer.clp=1"])
    with pytest.raises(ValueError, match="is not key=value"):
        load_recipe(path, ["steps"])


def test_a_written_recipe_reads_back_the_same(tmp_path):
    recipe = parse_recipe({"objective": "codec", "steps": 5, "options": {"frames": 9}})
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe({"objective": "codec", "steps": 5}).steps = 6


def test_objectives_are_found_by_file_name():
    assert "codec" in objectives() and not {"loop", "recipe"} & set(objectives())


def test_the_codec_recipe_that_ships_is_valid():
    assert load_recipe(RECIPES / "tiny" / "codec.yaml").objective == "codec"


def test_objectives_that_draw_from_a_pool_tell_it_alike_and_refuse_an_empty_one():
    told, drawing = {"seconds": set(), "pool": set(), "refresh": set()}, 0
    for name in objectives():
        model = find_objective(name).Options
        drawing += "pool" in model.model_fields
        for option in told.keys() & model.model_fields:
            told[option].add(model.model_fields[option].description)
            with pytest.raises(ValueError, match=f"{option}: Input should be greater than .*got 0"):
                parse_recipe({"objective": name, "steps": 1, "options": {option: 0, **needed(model)}})
    assert drawing > 5 and all(len(descriptions) == 1 for descriptions in told.values())


def needed(model):
    return {name: "x" for name, field in model.model_fields.items() if field.is_required()}
