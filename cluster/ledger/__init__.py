"""The ledger: every group's life as one SQLite journal with one writer.

reader.py   rows and books; also of a finished run, or beside a running writer
ledger.py   the way forward, from admission to published
endings.py  the ways out and back: discards, leases, crashes, roll-backs, freed bytes
writer.py   what transitions are made of; schema.py the file; clock.py the time they are stamped with
"""

from cluster.ledger.ledger import Ledger
from cluster.ledger.reader import Books, ClaimOrder, GroupRow, LedgerReader

__all__ = ["Books", "ClaimOrder", "GroupRow", "Ledger", "LedgerReader"]
