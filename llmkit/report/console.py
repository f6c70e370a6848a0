"""Tables for the terminal, drawn from the figures of result.json; imports no stage."""

from typing import Any

from rich.table import Table


def shard_table(shards: dict[str, dict[str, Any]], ngram_order: int | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    known = any(shard["entropy"] is not None for shard in shards.values())
    table.add_column("shard")
    columns = ["loss", *(["true entropy", "gap"] if known else []), "bits/byte"]
    columns += [f"order-{ngram_order} counts"] if ngram_order else []
    columns += ["gap closed"] if known and ngram_order else []
    for column in columns:
        table.add_column(column, justify="right")
    for name, s in shards.items():
        cells = [f"{s['loss']:.4f}"]
        if known:
            stderr = f" ±{s['gap_stderr']:.4f}" if s["gap_stderr"] is not None else ""
            has = s["entropy"] is not None
            cells += [f"{s['entropy']:.4f}" if has else "", f"{s['loss'] - s['entropy']:+.4f}{stderr}" if has else ""]
        cells.append(f"{s['bits_per_byte']:.4f}" if s["bits_per_byte"] is not None else "")
        if ngram_order:
            cells.append(f"{s[f'ngram{ngram_order}_loss']:.4f}")
        if known and ngram_order:
            cells.append(f"{s['closed']:.1%}" if "closed" in s else "")
        table.add_row(name, *cells)
    return table


def comparison_table(comparison: dict[str, Any]) -> Table:
    """Tasks, groups and shards of comparison.json against columns; beside a value its error, and what was lost."""
    names = [column["name"] for column in comparison["columns"]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("metric")
    table.add_column("items", justify="right")
    rows = [*comparison["tasks"], *comparison["groups"], *comparison["shards"]]
    against = {pair["column"]: pair["against"] for row in rows for pair in row["pairs"]}
    for name in names:
        table.add_column(name, justify="right")
        if name in against:
            table.add_column(f"- {against[name]}")
    for row in [*comparison["tasks"], *comparison["groups"]]:
        table.add_row(row["name"], row["metric"], f"{row['num_items']:,}", *_cells(row, names, against, "value"))
    for row in comparison["shards"]:
        entropy = f" (true {row['entropy']:.4f})" if row["entropy"] is not None else ""
        cells = _cells(row, names, against, "loss")
        table.add_row(row["name"], f"nats/token{entropy}", f"{row['num_documents']:,}", *cells)
    return table


def _cells(row: dict[str, Any], names: list[str], against: dict[str, str], what: str) -> list[str]:
    """A value and its error for each column; behind it, where it is compared, the difference and what it means."""
    pairs = {pair["column"]: pair for pair in row["pairs"]}
    cells = []
    for name in names:
        score = row["scores"][name]
        text = "-" if score[what] is None else f"{score[what]:.4f}"
        cells.append(text + (f" ±{score['stderr']:.4f}" if score["stderr"] is not None else ""))
        if name in against:
            pair = pairs.get(name)
            cells.append(f"{pair['difference']:+.4f} {pair['flag'] or 'same'}" if pair else "no paired test")
    return cells
