"""The table of bad recipes: what is wrong, the text, and every message that it must give, as `line:column: message`."""

# Messages stay on one line, as users see them.
# ruff: noqa: E501

from __future__ import annotations

HEAD = "version: 1\n"
STAGE = HEAD + "stages:\n  - place: after_vision\n"
FIXED = STAGE + "    scheduler: {type: fixed, keep: 4}\n"
BUDGET = HEAD + "budget: {keep: 0.5}\nstages:\n"
COUNT = "a whole number from 1 to 1000000"
KEEP = "a whole number from 1 to 1000000, or a number in (0, 1]"
FIXED_KEEP = "a whole number from 0 to 1000000, or a number in (0, 1]"
LAYER = "a layer from 0 to 9999, or a share of the depth between 0 and 1, such as 25% or 3/32"
STAGE_KEYS = "name, place, raters, scorer, scheduler, grouper, sampler, recycler, rectifier, positions, kv, dropped"
RECIPE_KEYS = "version, name, summary, paper, differences, budget, pictures, again, stages, variants, extends"
RECIPE_NAME = "a name of letters, digits and . _ + -, at most 80 of them"
STAGE_NAME = "a name of letters, digits, _ and -, a letter first, at most 80 of them"

# <role> stands for the names of all parts of that role, so that a new part changes nothing here.
BAD: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["1:1: the recipe is empty: it starts with `version: 1`"]),
    "only comment": ("# nothing\n", ["1:1: the recipe is empty: it starts with `version: 1`"]),
    "scalar": ("42\n", ["1:1: a recipe is a mapping that starts with `version: 1` (got 42)"]),
    "top list": ("- a\n- b\n", ["1:1: a recipe is a mapping that starts with `version: 1` (got a list)"]),
    "null": ("~\n", ["1:1: a recipe is a mapping that starts with `version: 1` (got null)"]),
    "tab indent": (
        HEAD + "stages:\n\t- place: after_vision\n",
        [
            "3:1: while scanning for the next token, found character '\\t' that cannot start any token (indent with spaces, not tabs)"
        ],
    ),
    "two documents": (HEAD + "---\nversion: 1\n", ["2:1: a recipe is one YAML document, a second one starts here"]),
    "yaml 3": ("%YAML 3.0\n---\nversion: 1\n", ["1:1: found incompatible YAML document (version 1.* is required)"]),
    "nul": (HEAD + "name: a\0b\n", ["2:8: character '\\x00' is not allowed"]),
    "unclosed": (
        HEAD + "stages: [\n",
        ["3:1: while parsing a flow node, expected the node content, but found '<stream end>'"],
    ),
    "huge integer": ("version: " + "9" * 5000 + "\n", ["1:10: this number is too large"]),
    "integer of 30 digits": (
        FIXED + "    sampler: {type: random, seed: " + "1" * 30 + "}\n",
        ["5:35: this number is too large"],
    ),
    "int tag": ("version: !!int x\n", ["1:10: 'x' is not of type int, as its tag says"]),
    "self alias": ("version: &a [*a]\n", ["1:14: *a stands inside its own anchor, so it would never end"]),
    "undefined alias": ("version: *a\n", ["1:10: no anchor &a before this alias"]),
    "tagged sequence": (
        HEAD + "stages: !!python/tuple []\n",
        ["2:9: tag '!!python/tuple' is not allowed: a recipe is plain data"],
    ),
    "python tag": (
        "version: !!python/object/apply:os.system [ls]\n",
        ["1:10: tag '!!python/object/apply:os.system' is not allowed: a recipe is plain data"],
    ),
    "own tag": ("version: !mine 1\n", ["1:10: tag '!mine' is not allowed: a recipe is plain data"]),
    "tagged mapping": (
        HEAD + "budget: !!omap {keep: 1}\n",
        ["2:9: tag '!!omap' is not allowed: a recipe is plain data"],
    ),
    "infinite": (HEAD + "budget: {keep: 1e999}\n", ["2:16: numbers must be finite (got 1e999)"]),
    "nan": (HEAD + "budget: {keep: .nan}\n", ["2:16: numbers must be finite (got .nan)"]),
    "merge key": (
        FIXED + "    <<: {positions: original}\n",
        [f"5:5: unknown key '<<' in stages.0; allowed: {STAGE_KEYS}"],
    ),
    "duplicate": (
        FIXED + "    positions: original\n    positions: renumber\n",
        ["6:5: duplicate key 'positions' in stages.0 (first on line 5, column 5)"],
    ),
    "duplicate top": (
        HEAD + "name: a\nname: b\n",
        ["3:1: duplicate key 'name' in the recipe (first on line 2, column 1)"],
    ),
    "leading zero": (
        FIXED + "    sampler: {type: random, seed: 017}\n",
        ["5:35: a leading zero is octal to some programs: write 17, or quote it"],
    ),
    "leading zero 9": (
        FIXED + "    sampler: {type: random, seed: 089}\n",
        ["5:35: a leading zero is octal to some programs: write 89, or quote it"],
    ),
    "list key": (HEAD + "[a]: 1\n", ["2:1: keys must be text (got a list in the recipe): quote it"]),
    "bool key": (HEAD + "true: 1\n", ["2:1: keys must be text (got true in the recipe): quote it"]),
    "surrogate": (HEAD + 'name: "\\ud800"\n', ["2:7: half of a surrogate pair is not text"]),
    "escape": (HEAD + 'name: "\\UFFFFFFFF"\n', ["2:10: a number or an escape here is out of range"]),
    "deep": (HEAD + "stages: " + "[" * 200_000, ["2:72: nested deeper than 64 levels"]),
    "deep block": (HEAD + "stages: " + "[" * 70 + "]" * 70, ["2:72: nested deeper than 64 levels"]),
    "alias bomb": (
        HEAD
        + "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d]\n",
        ["5:29: more than 10000 values, with aliases written out"],
    ),
    "many aliases": (
        "version: 1\nname: &a x\ndifferences: [" + ", ".join(["*a"] * 65) + "]\n",
        ["3:271: more than 64 aliases"],
    ),
    "no version": ("name: a\n", ["1:1: missing required key 'version'"]),
    "version true": ("version: true\n", ["1:10: version: should be a whole number (got true)"]),
    "version float": ("version: 1.0\n", ["1:10: version: should be a whole number (got 1.0)"]),
    "version text": ("version: '1'\n", ["1:10: version: should be a whole number (got '1')"]),
    "version 2": ("version: 2\n", ["1:10: version: should be 1: this tokenprune reads no other version (got 2)"]),
    "unknown top": (
        HEAD + "budgets: {keep: 3}\n",
        [f"2:1: unknown key 'budgets' in the recipe (did you mean 'budget'?); allowed: {RECIPE_KEYS}"],
    ),
    "name with blank": (HEAD + "name: a b\n", [f"2:7: name: should be {RECIPE_NAME} (got 'a b')"]),
    "name number": (HEAD + "name: 3\n", [f"2:7: name: should be {RECIPE_NAME} (got 3)"]),
    "differences text": (HEAD + "differences: none\n", ["2:14: differences: should be a list of text (got 'none')"]),
    "differences number": (HEAD + "differences: [a, 3]\n", ["2:18: differences.1: should be text (got 3)"]),
    "stages mapping": (
        HEAD + "stages: {place: after_vision}\n",
        [f"2:9: stages: should be a list of mappings with {STAGE_KEYS} (got a mapping)"],
    ),
    "stage scalar": (
        HEAD + "stages: [after_vision]\n",
        [f"2:10: stages.0: should be a mapping with {STAGE_KEYS} (got 'after_vision')"],
    ),
    "stage unknown": (FIXED + "    prunner: x\n", [f"5:5: unknown key 'prunner' in stages.0; allowed: {STAGE_KEYS}"]),
    "no place": (
        HEAD + "stages:\n  - scheduler: {type: fixed, keep: 4}\n",
        ["3:5: stages.0: missing required key 'place'"],
    ),
    "place typo": (
        HEAD + "stages:\n  - place: after_visoin\n    scheduler: {type: fixed, keep: 4}\n",
        [
            "3:12: stages.0.place: should be after_vision, or a mapping such as {before_layer: 3} (got 'after_visoin') (did you mean 'after_vision'?)"
        ],
    ),
    "place number": (
        HEAD + "stages:\n  - {place: 3, scheduler: {type: fixed, keep: 4}}\n",
        ["3:13: stages.0.place: should be after_vision, or a mapping such as {before_layer: 3} (got 3)"],
    ),
    "place key": (
        HEAD + "stages:\n  - {place: {on_vision: 3}, scheduler: {type: fixed, keep: 4}}\n",
        [
            "3:14: unknown key 'on_vision' in stages.0.place (did you mean 'in_vision'?); "
            "allowed: before_layer, in_vision"
        ],
    ),
    "place without block": (
        HEAD + "stages:\n  - {place: {in_vision: 3}, scheduler: {type: fixed, keep: 4}}\n",
        ["3:25: stages.0.place.in_vision: should be a mapping such as {block: 6} (got 3)"],
    ),
    "block key": (
        HEAD + "stages:\n  - {place: {in_vision: {blok: 3}}, scheduler: {type: fixed, keep: 4}}\n",
        ["3:26: unknown key 'blok' in stages.0.place.in_vision (did you mean 'block'?); allowed: block"],
    ),
    "block number": (
        HEAD + "stages:\n  - {place: {in_vision: {block: -1}}, scheduler: {type: fixed, keep: 4}}\n",
        [
            "3:33: stages.0.place.in_vision.block: should be a block from 0 to 9999, or a share of the depth between "
            "0 and 1, such as 25% or 3/32 (got -1)"
        ],
    ),
    "two places": (
        HEAD + "stages:\n  - {place: {in_vision: {block: 1}, before_layer: 3}, scheduler: {type: fixed, keep: 4}}\n",
        ["3:51: stages.0.place.before_layer: should have exactly one of before_layer, in_vision"],
    ),
    "tower after decoder": (
        HEAD
        + "stages:\n  - {place: after_vision, scheduler: {type: fixed, keep: 4}}\n"
        + "  - {place: {in_vision: {block: 1}}, scheduler: {type: fixed, keep: 2}}\n",
        [
            "4:13: stages.1.place: in_vision: block 1 comes before after_vision, where 'stage_0' acts: "
            "put the stages in order"
        ],
    ),
    "attention in the tower": (
        HEAD
        + "stages:\n  - {place: {in_vision: {block: 1}}, raters: last_text, scorer: attention, "
        + "scheduler: {type: fixed, keep: 4}}\n",
        [
            "3:46: stages.0.raters: 'last_text' reads what is not to be had at in_vision: block 1: the question: "
            "the vision tower runs before the language model"
        ],
    ),
    "place empty": (
        HEAD + "stages:\n  - {place: {}, scheduler: {type: fixed, keep: 4}}\n",
        ["3:13: stages.0.place: missing required key 'before_layer'"],
    ),
    "layer 0": (
        HEAD + 'stages:\n  - place: {before_layer: "2"}\n    scheduler: {type: fixed, keep: 4}\n',
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got '2')"],
    ),
    "layer 1": (
        HEAD + "stages:\n  - place: {before_layer: true}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got true)"],
    ),
    "layer 2": (
        HEAD + "stages:\n  - place: {before_layer: 2.0}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got 2.0)"],
    ),
    "layer 3": (
        HEAD + "stages:\n  - place: {before_layer: -1}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got -1)"],
    ),
    "layer 4": (
        HEAD + "stages:\n  - place: {before_layer: 10000}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got 10000)"],
    ),
    "layer 5": (
        HEAD + "stages:\n  - place: {before_layer: 101%}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got '101%')"],
    ),
    "layer 6": (
        HEAD + "stages:\n  - place: {before_layer: 0%}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got '0%')"],
    ),
    "layer 7": (
        HEAD + "stages:\n  - place: {before_layer: 4/4}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got '4/4')"],
    ),
    "layer 8": (
        HEAD + "stages:\n  - place: {before_layer: 1/0}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got '1/0')"],
    ),
    "layer 9": (
        HEAD + "stages:\n  - place: {before_layer: null}\n    scheduler: {type: fixed, keep: 4}\n",
        [f"3:27: stages.0.place.before_layer: should be {LAYER} (got null)"],
    ),
    "positions": (
        FIXED + "    positions: orignal\n",
        ["5:16: stages.0.positions: should be original or renumber (got 'orignal') (did you mean 'original'?)"],
    ),
    "unknown key": (
        STAGE + "    scheduler: {type: fixed, kep: 0.5, keep: 0.5}\n",
        ["4:30: unknown key 'kep' in stages.0.scheduler (did you mean 'keep'?); allowed: type, keep"],
    ),
    "unknown part": (
        FIXED + "    recycler: clusters\n",
        ["5:15: stages.0.recycler: no such part 'clusters' (did you mean 'cluster'?); known: <recycler>"],
    ),
    "unknown part far": (
        FIXED + "    recycler: {type: xyz}\n",
        ["5:22: stages.0.recycler: no such part 'xyz'; known: <recycler>"],
    ),
    "no type": (
        FIXED + "    recycler: {share: 0.3}\n",
        ["5:15: stages.0.recycler: needs a `type:`; known: <recycler>"],
    ),
    "type list": (
        FIXED + "    recycler: {type: [drop]}\n",
        ["5:22: stages.0.recycler: `type` should be the name of a part (got a list); known: <recycler>"],
    ),
    "part number": (
        FIXED + "    recycler: 5\n",
        ["5:15: stages.0.recycler: should be the name of a part, or a mapping with a `type` (got 5)"],
    ),
    "part list": (
        FIXED + "    recycler: [drop]\n",
        ["5:15: stages.0.recycler: should be the name of a part, or a mapping with a `type` (got a list)"],
    ),
    "part null": (
        FIXED + "    recycler: null\n",
        ["5:15: stages.0.recycler: should be the name of a part, or a mapping with a `type` (got null)"],
    ),
    "missing key": (STAGE + "    scheduler: fixed\n", ["4:16: stages.0.scheduler: missing required key 'keep'"]),
    "missing key block": (
        STAGE + "    scheduler:\n      type: fixed\n",
        ["5:7: stages.0.scheduler: missing required key 'keep'"],
    ),
    "keep -1": (
        STAGE + "    scheduler: {type: fixed, keep: -1}\n",
        [f"4:36: stages.0.scheduler.keep: should be {FIXED_KEEP} (got -1)"],
    ),
    "keep 1.5": (
        STAGE + "    scheduler: {type: fixed, keep: 1.5}\n",
        [f"4:36: stages.0.scheduler.keep: should be {FIXED_KEEP} (got 1.5)"],
    ),
    "keep text": (
        STAGE + "    scheduler: {type: fixed, keep: half}\n",
        [f"4:36: stages.0.scheduler.keep: should be {FIXED_KEEP} (got 'half')"],
    ),
    "keep true": (
        STAGE + "    scheduler: {type: fixed, keep: true}\n",
        [f"4:36: stages.0.scheduler.keep: should be {FIXED_KEEP} (got true)"],
    ),
    "keep null": (
        STAGE + "    scheduler: {type: fixed, keep:}\n",
        [f"4:35: stages.0.scheduler.keep: should be {FIXED_KEEP} (got null)"],
    ),
    "bool yes": (
        STAGE
        + "    raters: last_text\n    scorer: {type: attention, rope: yes}\n    scheduler: {type: fixed, keep: 4}\n",
        ["5:37: stages.0.scorer.rope: should be true or false (got 'yes')"],
    ),
    "choice": (
        STAGE
        + "    raters: last_text\n    scorer: {type: attention, layer: nxt}\n    scheduler: {type: fixed, keep: 4}\n",
        ["5:38: stages.0.scorer.layer: should be previous or next (got 'nxt') (did you mean 'next'?)"],
    ),
    "heads": (
        STAGE
        + "    raters: last_text\n    scorer: {type: attention, heads: 0}\n    scheduler: {type: fixed, keep: 4}\n",
        ["5:38: stages.0.scorer.heads: should be all, or a whole number from 1 to 1024 (got 0)"],
    ),
    "rows value": (
        STAGE + "    scheduler: {type: table, rows: {576: many}}\n",
        [f"4:42: stages.0.scheduler.rows.576: should be {COUNT} (got 'many')"],
    ),
    "rows key": (
        STAGE + "    scheduler: {type: table, rows: {x: 3}}\n",
        [f"4:37: stages.0.scheduler.rows.x: should be {COUNT} (got 'x')"],
    ),
    "rows list": (
        STAGE + "    scheduler: {type: table, rows: [576, 300]}\n",
        [f"4:36: stages.0.scheduler.rows: should be a mapping, each key {COUNT}, each value {COUNT} (got a list)"],
    ),
    "rows empty": (
        STAGE + "    scheduler: {type: table, rows: {}}\n",
        [
            f"4:36: stages.0.scheduler.rows: should be a mapping, each key {COUNT}, each value {COUNT} (got an empty mapping)"
        ],
    ),
    "rows more": (
        STAGE + "    scheduler: {type: table, rows: {576: 600}}\n",
        ["4:16: stages.0.scheduler: row 576 keeps 600, more than there are"],
    ),
    "union offset": (
        FIXED + "    sampler: {type: union, stride: 3, offset: 3}\n",
        ["5:14: stages.0.sampler: offset 3 must be less than the stride, 3"],
    ),
    "raters missing": (
        STAGE + "    scorer: attention\n    scheduler: {type: fixed, keep: 4}\n",
        ["4:13: stages.0.scorer: needs raters (scorer 'attention'): add for example `raters: last_text` to the stage"],
    ),
    "raters missing scheduler": (
        STAGE + "    scheduler: rank_ratio\n",
        [
            "4:16: stages.0.scheduler: needs raters (scheduler 'rank_ratio'): add for example `raters: last_text` to the stage"
        ],
    ),
    "raters useless": (
        FIXED + "    raters: last_text\n",
        [
            "5:13: stages.0.raters: without effect, as scorer 'constant' and scheduler 'fixed' ask no raters: leave them out"
        ],
    ),
    "solved": (
        STAGE + "    scheduler: solved\n",
        [
            "4:16: stages.0.scheduler: 'solved' needs a budget: add for example `budget: {keep: 0.33}` to the recipe, or give --keep 0.33"
        ],
    ),
    "solved default": (
        STAGE,
        [
            "3:5: stages.0.scheduler: 'solved' needs a budget: add for example `budget: {keep: 0.33}` to the recipe, or give --keep 0.33"
        ],
    ),
    "budget two": (
        HEAD + "budget: {keep: 3, final: 0.2}\n",
        ["2:26: budget.final: should have exactly one of keep, average, final, flops (got keep, final)"],
    ),
    "budget none": (
        HEAD + "budget: {}\n",
        ["2:9: budget: should have exactly one of keep, average, final, flops (got none)"],
    ),
    "budget number": (
        HEAD + "budget: 64\n",
        ["2:9: budget: should be a mapping with exactly one of keep, average, final, flops (got 64)"],
    ),
    "budget key": (
        HEAD + "budget: {flop: 0.4}\n",
        ["2:10: unknown key 'flop' in budget (did you mean 'flops'?); allowed: keep, average, final, flops"],
    ),
    "budget flops as a count": (
        HEAD + "budget: {flops: 64}\n",
        ["2:17: budget.flops: should be a number in (0, 1] (got 64)"],
    ),
    "budget 0": (HEAD + "budget: {keep: 0}\n", [f"2:16: budget.keep: should be {KEEP} (got 0)"]),
    "budget 1.5": (HEAD + "budget: {average: 1.5}\n", [f"2:19: budget.average: should be {KEEP} (got 1.5)"]),
    "budget true": (HEAD + "budget: {final: true}\n", [f"2:17: budget.final: should be {KEEP} (got true)"]),
    "budget text": (HEAD + "budget: {final: '3'}\n", [f"2:17: budget.final: should be {KEEP} (got '3')"]),
    "order": (
        BUDGET
        + "  - place: {before_layer: 5}\n  - place: {before_layer: 25%}\n  - place: {before_layer: 3}\n  - place: after_vision\n  - place: {before_layer: 1/8}\n",
        [
            "6:12: stages.2.place: before_layer: 3 comes before before_layer: 5, where 'stage_0' acts: put the stages in order",
            "7:12: stages.3.place: after_vision comes before before_layer: 5, where 'stage_0' acts: put the stages in order",
            "8:12: stages.4.place: before_layer: 1/8 comes before before_layer: 1/4, where 'stage_1' acts: put the stages in order",
        ],
    ),
    "names twice": (
        BUDGET + "  - {name: a, place: after_vision}\n  - {name: a, place: after_vision}\n",
        ["5:12: stages.1.name: 'a' is the name of stages.0 already"],
    ),
    "name default taken": (
        BUDGET + "  - {name: stage_1, place: after_vision}\n  - {place: after_vision}\n",
        ["5:5: stages.1.name: 'stage_1' is the name of stages.0 already"],
    ),
    "name list": (
        BUDGET + "  - {name: [a], place: after_vision}\n",
        [f"4:12: stages.0.name: should be {STAGE_NAME} (got a list)"],
    ),
    "name digits": (
        BUDGET + "  - {name: 7th, place: after_vision}\n",
        [f"4:12: stages.0.name: should be {STAGE_NAME} (got '7th')"],
    ),
    "extends number": (
        HEAD + "extends: 5\n",
        ["2:10: extends: should be the name of a recipe or a file next to this one (got 5)"],
    ),
    "extends list": (
        HEAD + "extends: [a]\n",
        ["2:10: extends: should be the name of a recipe or a file next to this one (got a list)"],
    ),
    "extends dot": (
        HEAD + "extends: .\n",
        ["2:10: extends: only a file can extend another file; this recipe is in none"],
    ),
    "extends file": (
        HEAD + "extends: a.yaml\n",
        ["2:10: extends: only a file can extend another file; this recipe is in none"],
    ),
    "extends null": (
        HEAD + "extends:\n",
        ["2:9: extends: should be the name of a recipe or a file next to this one (got null)"],
    ),
    "variants list": (
        HEAD + "variants: [a]\n",
        [
            "2:11: variants: should be a mapping, each key text, each value a mapping of overrides such as {stages.0.scheduler.keep: 300} (got a list)"
        ],
    ),
    "variant scalar": (
        HEAD + "variants: {a: 3}\n",
        ["2:15: variants.a: should be a mapping of overrides such as {stages.0.scheduler.keep: 300} (got 3)"],
    ),
    "variant path": (
        FIXED + "variants:\n  a: {stages.0.schedule.keep: 3}\n",
        [f"6:16: variant 'a': unknown key 'schedule' in stages.0 (did you mean 'scheduler'?); allowed: {STAGE_KEYS}"],
    ),
    "variant value": (
        FIXED + "variants:\n  a: {stages.0.scheduler.keep: -1}\n",
        [f"6:32: variant 'a': stages.0.scheduler.keep: should be {FIXED_KEEP} (got -1)"],
    ),
    "variant stage": (
        FIXED + "variants:\n  a: {stages.last.scheduler.keep: 5}\n",
        ["6:14: variant 'a': stages has no item 'last'; none has a name"],
    ),
    "variant version": (FIXED + "variants:\n  a: {version: 1}\n", ["6:7: variant 'a': version cannot be overridden"]),
    "wide": (HEAD + "budget: {keep: 3} # 宽宽\nname: 宽宽, ok: 2\n", ["3:13: mapping values are not allowed here"]),
}
