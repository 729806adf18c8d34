"""What memories cost: run beside each other on one engine (`measure`), told as a table, as files and as a picture."""

from slotmemory.bench.choices import Case, case, cases
from slotmemory.bench.folder import Folder
from slotmemory.bench.picture import plot
from slotmemory.bench.report import table, write
from slotmemory.bench.streams import Plan, Row, clock, measure

__all__ = ["Case", "Folder", "Plan", "Row", "case", "cases", "clock", "measure", "plot", "table", "write"]
