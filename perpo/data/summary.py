"""Counts as one line."""

from __future__ import annotations


def summary(*parts: str | tuple[int, str], separator: str = "; ") -> str:
    """Join texts and (count, what is counted) pairs; empty texts and zero counts are left out."""
    texts = (part if isinstance(part, str) else f"{part[0]} {part[1]}" * bool(part[0]) for part in parts)
    return separator.join(text for text in texts if text)
