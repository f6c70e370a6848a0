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
