"""What was measured, as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from snowmelt.pages.measures import percent, twins_share


def quality_tables(found: dict[str, Any]) -> list[Table]:
    """The tables of a figures.json."""
    tables = [_figures(found)] if any(one["value"] is not None for one in found["figures"]) else []
    return [*tables, *(_classes(found) if found["classes"] else []), *(_copies(found) if found["memorization"] else [])]


def reasons(found: dict[str, Any]) -> list[str]:
    """Why some numbers of a figures.json are missing, each sentence once."""
    told = [f"No {one['title']} ({one['space']}): {one['reason']}" for one in found["figures"] if one["reason"]]
    return list(dict.fromkeys([*told, *found["not_measured"]]))


def short(value: float | None) -> str:
    """A number to about three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _figures(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['samples']:,} drawn pictures against {found['real']:,} {found['reference']}")
    for name in ("", "seen by"):
        table.add_column(name)
    for name in ("value", "95 % interval", "floor: real against real", "better"):
        table.add_column(name, justify="right")
    for one in found["figures"]:
        if one["value"] is not None:
            floor = f"{short(one['floor'])} ({short(one['floor_low'])} to {short(one['floor_high'])})"
            interval = f"{short(one['low'])} to {short(one['high'])}"
            beside = found["spaces"].get(one["space"], found)["reference"]
            seen = one["space"] if beside == found["reference"] else f"{one['space']}, beside {beside}"
            table.add_row(one["title"], seen, short(one["value"]), interval, floor, one["better"])
    return table


def _classes(found: dict[str, Any]) -> list[Table]:
    classes = found["classes"]
    if classes.get("reason"):
        return []
    table = Table(title="Classes, as the trained encoder sees them")
    for name in ("", "drawn", "real"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("recognised beyond doubt", _share(classes["recognised"]), _share(classes["recognised_real"]))
    table.add_row("as the class asked for", _share(classes["as_asked"]), "")
    table.add_row("rarest class", *(percent(min(classes[name].values())) for name in ("balance", "balance_real")))
    return [table]


def _copies(found: dict[str, Any]) -> list[Table]:
    copies, closer = found["memorization"]["copies"], found["memorization"]["closer"]
    table = Table(title=f"Copies of the {found['memorization']['training']:,} training pictures")
    table.add_column("")
    table.add_column("share", justify="right")
    table.add_row("near-copies among the drawn", _share([copies["share"], copies["low"], copies["high"]]))
    table.add_row("the same among real held-out pictures: twins", percent(twins_share(found["memorization"])))
    table.add_row("the same among real held-out pictures: others", percent(copies["false_alarms"]))
    table.add_row(
        "nearer to a training picture than held-out ones are", _share([closer[k] for k in ("share", "low", "high")])
    )
    return [table]


def _share(three: list[float]) -> str:
    return f"{percent(three[0])} ({percent(three[1])} to {percent(three[2])})"
