"""The ledger: requests and what became of them, append-only and hash-chained."""

from .chain import EVENTS, Entry, Ledger, default_path

__all__ = ["EVENTS", "Entry", "Ledger", "default_path"]
