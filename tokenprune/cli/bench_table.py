"""What `tokenprune bench` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.cli.terminal import console, table
from tokenprune.cli.verdicts import benched
from tokenprune.study.bench.result import FEWEST

if TYPE_CHECKING:
    from tokenprune.study.bench import Bench, Estimate, SideRow


def show(result: Bench) -> None:
    """A table for each batch size, and what its columns mean."""
    from rich.text import Text

    screen = console()
    size = f"{result.parameters / 1e9:.2f} billion" if result.parameters >= 1e8 else f"{result.parameters / 1e6:.1f} M"
    budget = "" if result.budget is None else f", {result.budget}"
    kernel = f"{result.attention}{', compiled' if result.compiled else ''}"
    screen.print(
        Text.assemble((result.recipe, "bold"), budget, " on ", (result.model, "bold"), f": {size} parameters"),
    )
    screen.print(
        f"{result.device}, {result.dtype}, {kernel}; {result.tokens} vision and {result.text} other tokens, "
        f"{result.new_tokens} generated",
    )
    decodes, counted = result.new_tokens > 1, result.rows[0].peak is not None
    for batch in dict.fromkeys(row.batch for row in result.rows):
        screen.print(f"\n[dim]batch of {batch}")
        # Two tables: one with all columns is wider than most terminals.
        first = table("side", ">tokens", ">prefill", ">faster", "95 %", ">ceiling", ">reached", ">method")
        after = [">decode", ">faster", ">all faster"] if decodes else []
        first.padding = (0, 1, 0, 0)
        second = table("side", *after, ">KV cache", *([">peak memory"] if counted else []))
        for row in result.rows:
            if row.batch == batch:
                first.add_row(*_prefill(row))
                second.add_row(*_rest(row, decodes=decodes))
        screen.print(first)
        screen.print(second)
    rounds = len(result.rows[0].samples)
    noise = "with a 95 % interval of this run's noise" if rounds >= FEWEST else f"no interval under {FEWEST} rounds"
    paired = " (paired by round, so it is not the ratio of the medians beside it)" if _differs(result) else ""
    screen.print(
        f"\n[dim]faster: untouched time over this one's{paired}, median of {rounds} rounds, {noise}. "
        "ceiling: if time went with multiply-adds, the recipe's own included. method: time of the stages, as a share "
        "of the untouched prefill."
    )
    if not all(row.ledger.exact for row in result.rows):
        screen.print("[dim]≈: the recipe decides its counts from the data; the ceiling is for those of the last run")
    for row in result.rows[:2]:  # the recipe's is the second
        layers = row.ledger.reduced.rows
        if any(layer.fed != layer.vision for layer in layers):
            through = sum(layer.fed for layer in layers) / len(layers)
            told = f"tokens of {row.name}: attention sees them; {through:.4g} go through feed-forwards"
            beside = ", as many as others beside it keep" if len({row.name for row in result.rows}) > 2 else ""
            screen.print(f"[dim]{told} (dropped: skip_ffn){beside}")
    for line in benched(result):
        screen.print(Text(line, style="bold"))


def _differs(result: Bench) -> bool:
    """Whether a speed-up in the tables is not what one gets by dividing the medians in them."""
    untouched = {row.batch: row for row in result.rows if row.samples == row.untouched}
    shown = [(row, phase, row.speedup(phase)) for row in result.rows for phase in ("prefill", "decode", "total")]
    return any(
        speed is not None and f"{speed.value:.2f}" != f"{untouched[row.batch].seconds(phase) / row.seconds(phase):.2f}"
        for row, phase, speed in shown
    )


def _prefill(row: SideRow) -> list[str]:
    about, cells = "" if row.ledger.exact else "≈", [row.name, f"{row.tokens:.4g}", _time(row.seconds("prefill"))]
    speed = row.speedup()
    if row.samples == row.untouched or speed is None:
        return [*cells, "", "", "", "", ""]
    method = f"{row.method_share:.1%}" if row.method_share else ""
    interval = "" if speed.low is None or speed.high is None else f"{speed.low:.2f}–{speed.high:.2f}"
    return [*cells, _ratio(speed), interval, f"{about}{row.ceiling():.2f}×", f"{about}{row.reached():.0%}", method]


def _rest(row: SideRow, *, decodes: bool) -> list[str]:
    cells = [row.name]
    if decodes:
        untouched = row.samples == row.untouched
        speed = ["", ""] if untouched else [_ratio(row.speedup("decode")), _ratio(row.speedup("total"))]
        cells += [_time(row.seconds("decode")), *speed]
    peak = [] if row.peak is None else [f"{row.peak / 2**30:.2f} GiB"]
    return [*cells, f"{'' if row.ledger.exact else '≈'}{row.kv_share:.1%}", *peak]


def _ratio(found: Estimate | None) -> str:
    return "" if found is None else f"{found.value:.2f}×"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
