"""Where benchmarks keep what they measured: ``benchmarks/results.csv``, a row per thing and device."""

import csv
from pathlib import Path

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("what", "target", "measured", "unit", "detail", "device")


def record(rows: list[dict]) -> None:
    """Put ``rows`` in the file; a newer measurement of the same thing on the same device replaces the older."""
    known = []
    if RESULTS.is_file():
        with open(RESULTS, newline="", encoding="utf-8") as file:
            known = list(csv.DictReader(file))
    fresh = {(row["what"], row["device"]) for row in rows}
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in known if (row["what"], row["device"]) not in fresh] + rows)
