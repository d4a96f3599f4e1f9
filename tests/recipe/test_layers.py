"""`extends`, `variants` and ``--set``: what they do, and where they point when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune import registry
from tokenprune.errors import RecipeError
from tokenprune.recipe import Recipe, load_recipe, parse_recipe

BASE = """\
version: 1
name: base
summary: about the base
paper: arXiv:1
budget: {average: 192}
stages:
  - name: first
    place: {before_layer: 3}
    raters: above_mean
    scorer: {type: attention, rope: false}
    scheduler: {type: fixed, keep: 300}
    recycler: {type: cluster, share: 0.5}
  - name: second
    place: {before_layer: 9}
    scheduler: {type: fixed, keep: 100}
variants:
  64: {stages.first.scheduler.keep: 64, stages.1.scheduler: solved, budget.keep: 0.1}
  bare: {budget: null}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def extend(folder: Path, text: str, base: str = "base.yaml") -> Recipe:
    path = folder / "own.yaml"
    path.write_text(f"version: 1\nextends: {base}\n{text}")
    return load_recipe(path)


def messages(recipe: object, **options: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, **options)  # type: ignore[arg-type]
    return [f"{p.path}:{p.line}:{p.column}: {p.message}" for p in caught.value.problems]


def only(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    return [problem.message for problem in caught.value.problems]


# extends


def test_extends_merges_mappings_and_named_stages(folder: Path) -> None:
    own = extend(
        folder, "stages:\n  - {name: first, scorer: {heads: 4}}\n  - {name: last, place: {before_layer: 12}}\n"
    )
    base = load_recipe(folder / "base.yaml")
    assert [stage.name for stage in own.stages] == ["first", "second", "last"]
    assert own.stages[0].scorer.settings() == {**base.stages[0].scorer.settings(), "heads": 4}
    assert own.stages[1] == base.stages[1]
    assert own.budget == base.budget
    assert own.paper == "arXiv:1"


def test_extends_does_not_inherit_what_speaks_of_the_file(folder: Path) -> None:
    own = extend(folder, "")
    assert (own.name, own.summary, own.variants) == ("own", "", {})
    assert own.fingerprint == load_recipe(folder / "base.yaml").fingerprint


def test_extends_replaces_a_part_of_another_type(folder: Path) -> None:
    own = extend(folder, "stages: [{name: first, recycler: drop, raters: null, scorer: norm}]")
    assert own.stages[0].recycler.to_dict() == {"type": "drop"}
    assert own.stages[0].raters is None


def test_extends_replaces_a_budget_of_another_kind(folder: Path) -> None:
    budget = extend(folder, "budget: {final: 20}").budget
    assert budget is not None
    assert (budget.kind, budget.value) == ("final", 20)


def test_extends_replaces_lists_without_names(folder: Path) -> None:
    own = extend(folder, "stages:\n  - {place: after_vision, scheduler: {type: fixed, keep: 3}}\n")
    assert [stage.name for stage in own.stages] == ["stage_0"]


def test_extends_a_shipped_recipe() -> None:
    assert parse_recipe("version: 1\nextends: sparsevlm\n").fingerprint == load_recipe("sparsevlm").fingerprint


def test_error_points_into_the_layer_that_says_it(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("share: 0.5", "share: 5"))
    path = folder / "own.yaml"
    path.write_text("version: 1\nextends: base.yaml\nstages: [{name: first, positions: x}]\n")
    assert messages(path) == [
        f"{folder / 'base.yaml'}:12:38: stages.0.recycler.share: should be a number in (0, 1] (got 5)",
        f"{path}:3:35: stages.0.positions: should be original or renumber (got 'x')",
    ]


def test_every_file_states_its_version(folder: Path) -> None:
    path = folder / "own.yaml"
    path.write_text("extends: base.yaml\n")
    assert messages(path) == [f"{path}:1:1: missing required key 'version'"]


def test_names_that_are_lists_and_names_that_repeat(folder: Path) -> None:
    stage = "place: {before_layer: 3}, scheduler: {type: fixed, keep: 3}"
    for names, expected in {
        ("[first]", "x"): ["should be a name of letters"],
        ("first", "first"): ["'first' is the name of stages.0 already"],
    }.items():
        path = folder / "own.yaml"
        stages = ", ".join(f"{{name: {name}, {stage}}}" for name in names)
        path.write_text(f"version: 1\nextends: base.yaml\nstages: [{stages}]\n")
        found = messages(path)
        assert len(found) == 1
        assert expected[0] in found[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.yaml", "no such file"),
        ("bas.yaml", "did you mean"),
        ("sub/", "this is a folder"),
        ("./", "this is a folder"),
        ("../outside.yaml", "leads out of the folder"),
        ("../../../../etc/passwd", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("sub/../../outside.yaml", "leads out of the folder"),
        ("link.yaml", "leads out of the folder"),
        ("linked/outside.yaml", "leads out of the folder"),
        ("loop.yaml", "cannot be "),
        ('"a\\0.yaml"', "is not allowed"),
        (".", "this is a folder"),
        ("..", "leads out of the folder"),
        ("true", "should be the name of a recipe"),
        ("{a: b}", "should be the name of a recipe"),
    ],
)
def test_extends_refuses(tmp_path: Path, value: str, message: str) -> None:
    folder = tmp_path / "recipes"
    (folder / "sub").mkdir(parents=True)
    (folder / "base.yaml").write_text(BASE)
    (tmp_path / "outside.yaml").write_text(BASE)
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    path = folder / "own.yaml"
    path.write_text(f"version: 1\nextends: {value}\n")
    found = messages(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:2:")
    assert message in found[0] or "cannot be followed" in found[0]


def test_extends_in_a_circle(tmp_path: Path) -> None:
    for name, base in {"a": "b", "b": "c", "c": "a"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"version: 1\nextends: {base}.yaml\n")
    (tmp_path / "self.yaml").write_text("version: 1\nextends: self.yaml\n")
    assert messages(tmp_path / "a.yaml") == [
        f"{tmp_path / 'c.yaml'}:2:10: extends: a circle: a.yaml → b.yaml → c.yaml → a.yaml"
    ]
    assert messages(tmp_path / "self.yaml") == [
        f"{tmp_path / 'self.yaml'}:2:10: extends: a circle: self.yaml → self.yaml"
    ]


def test_extends_too_long_a_chain(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"r{index}.yaml").write_text(f"version: 1\nextends: r{index + 1}.yaml\n")
    assert "too long a chain" in messages(tmp_path / "r0.yaml")[0]


# variants


def test_variant_applies_its_overrides(folder: Path) -> None:
    recipe = load_recipe(folder / "base.yaml", variant="64")
    assert recipe.stages[0].scheduler.settings() == {"keep": 64}
    assert recipe.stages[1].scheduler.type == "solved"
    assert recipe.to_dict()["budget"] == {"keep": 0.1}
    assert recipe.variants == {}
    assert load_recipe(folder / "base.yaml", variant="bare").budget is None


def test_variants_stay_where_none_is_chosen(folder: Path) -> None:
    recipe = load_recipe(folder / "base.yaml", final=0.25)
    assert list(recipe.variants) == ["64", "bare"]
    assert load_recipe(recipe, variant="64") == load_recipe(folder / "base.yaml", variant="64")


def test_unknown_variant(folder: Path) -> None:
    assert messages(folder / "base.yaml", variant="bear") == [
        "--variant:1:1: no variant 'bear' (did you mean 'bare'?); known: 64, bare"
    ]


def test_variant_that_breaks_the_recipe_is_told_at_every_load(folder: Path) -> None:
    path = folder / "base.yaml"
    path.write_text(BASE.replace("{budget: null}", "{budget: null, stages.1.scheduler: solved}"))
    assert messages(path) == [
        f"{path}:18:44: variant 'bare': stages.1.scheduler: 'solved' needs a budget: add for example "
        "`budget: {keep: 0.33}` to the recipe, or give --keep 0.33"
    ]


# --set


def test_sets_apply_in_order_after_the_variant(folder: Path) -> None:
    recipe = load_recipe(
        folder / "base.yaml",
        variant="64",
        sets=[
            "stages.0.scheduler.keep=65",
            "stages.first.scheduler.keep=66",
            "stages.second.sampler=uniform",
            "stages.1.recycler.type=cluster",
            "stages.0.place=after_vision",
            "budget.average=0.5",
            "paper=arXiv:2",
        ],
    )
    assert recipe.stages[0].scheduler.settings() == {"keep": 66}
    assert (recipe.stages[1].sampler.type, recipe.stages[1].recycler.type) == ("uniform", "cluster")
    assert str(recipe.stages[0].place) == "after_vision"
    assert recipe.to_dict()["budget"] == {"average": 0.5}
    assert recipe.paper == "arXiv:2"


def test_set_of_a_type_replaces_the_part(folder: Path) -> None:
    recipe = load_recipe(folder / "base.yaml", sets=["stages.0.recycler.type=drop"])
    assert recipe.stages[0].recycler.to_dict() == {"type": "drop"}
    same = load_recipe(folder / "base.yaml", sets=["stages.0.recycler.type=cluster"])
    assert same.stages[0].recycler.settings()["share"] == 0.5


def test_set_reaches_unnamed_stages_by_their_default_name() -> None:
    recipe = {"version": 1, "budget": {"keep": 9}, "stages": [{"place": "after_vision"}]}
    assert load_recipe(recipe, sets=["stages.stage_0.positions=renumber"]).stages[0].positions == "renumber"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("stages.0.scheduler.keep", "1:1: expected PATH=VALUE, for example stages.0.scheduler.keep=64"),
        ("", "1:1: expected PATH=VALUE, for example stages.0.scheduler.keep=64"),
        ("=3", "1:1: expected a path such as stages.0.scheduler.keep (got '')"),
        ("stages..keep=3", "1:1: expected a path such as stages.0.scheduler.keep (got 'stages..keep')"),
        ("stages.0.scheduler.keep=-1", "1:25: stages.0.scheduler.keep: should be a whole number from 0 to 1000000, "
         "or a number in (0, 1] (got -1)"),
        ("stages.0.scheduler.keep=", "1:25: stages.0.scheduler.keep: should be a whole number from 0 to 1000000, "
         "or a number in (0, 1] (got null)"),
        ("stages.0.scheduler.kep=5", "1:20: unknown key 'kep' in stages.0.scheduler (did you mean 'keep'?); "
         "allowed: type, keep"),
        ("stages.1.sampler.stride=5", "1:18: unknown key 'stride' in stages.1.sampler; allowed: type"),
        ("stages.0.schedule=solved", "1:10: unknown key 'schedule' in stages.0 (did you mean 'scheduler'?); allowed: "
         "name, place, raters, scorer, scheduler, grouper, sampler, recycler, rectifier, positions, kv, dropped"),
        ("stages.0.scheduler.keep.x=5", "1:25: stages.0.scheduler.keep has no key 'x': it is 300"),
        ("stages.².positions=5", "1:8: stages has no item '²'; named are: first, second"),
        ("stages.frist.positions=5", "1:8: stages has no item 'frist' (did you mean 'first'?); "
         "named are: first, second"),
        ("stages.2.positions=5", "1:8: stages has no item '2': there are 0 … 1"),
        ("stages.-1.positions=5", "1:8: stages has no item '-1'; named are: first, second"),
        ("stages.0.scheduler.type=fxed", "1:25: stages.0.scheduler: no such part 'fxed' (did you mean 'fixed'?); "
         f"known: {', '.join(registry.parts('scheduler'))}"),
        ("stages.0.scheduler.type=table", "1:25: stages.0.scheduler: missing required key 'rows'"),
        ("stages.0.scorer={type: norm, order: [}", "1:38: while parsing a flow node, expected the node content, "
         "but found '}'"),
        ("stages.0.scheduler.keep=017", "1:25: a leading zero is octal to some programs: write 17, or quote it"),
        ("stages.0.scheduler=!!python/name:os.system", "1:20: tag '!!python/name:os.system' is not allowed: "
         "a recipe is plain data"),
        ("extends=base.yaml", "1:1: extends cannot be overridden"),
        ("variants.x={}", "1:1: variants cannot be overridden"),
        ("version=2", "1:1: version cannot be overridden"),
        ("budget.keep=1.5", "1:13: budget.keep: should be a whole number from 1 to 1000000, or a number in (0, 1] "
         "(got 1.5)"),
        ("budget.budget=1", "1:8: unknown key 'budget' in budget; allowed: keep, average, final, flops"),
        ("colour=red", "1:1: unknown key 'colour' in the recipe; allowed: version, name, summary, paper, differences, "
         "budget, pictures, again, stages, variants, extends"),
        ("stages.0.raters=null", "4:1: "),
    ],
)  # fmt: skip
def test_set_points_at_the_expression(folder: Path, expression: str, message: str) -> None:
    found = messages(folder / "base.yaml", sets=["stages.0.positions=renumber", expression])
    if message == "4:1: ":  # what is wrong then is the scorer, in the file
        assert found[0].startswith(f"{folder / 'base.yaml'}:10:13: stages.0.scorer: needs raters")
    else:
        assert found == [f"--set:{message}"]


def test_set_in_a_dict_source() -> None:
    recipe = {"version": 1, "stages": [{"place": "after_vision", "scheduler": {"type": "fixed", "keep": 3}}]}
    assert messages(recipe, sets=["stages.0.scheduler.keep=none"]) == [
        "--set:1:25: stages.0.scheduler.keep: should be a whole number from 0 to 1000000, or a number in (0, 1] "
        "(got 'none')"
    ]
    assert messages({**recipe, "variants": {"a": {"stages.9": 3}}}) == [
        "<dict>:None:None: variant 'a': stages has no item '9': there are 0 … 0"
    ]


def test_all_wrong_sets_are_told_at_once(folder: Path) -> None:
    found = messages(folder / "base.yaml", sets=["a", "stages.9.x=1", "stages.0.positions=x"])
    assert len(found) == 3
