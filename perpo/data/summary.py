"""One line of what was counted."""

from __future__ import annotations


def summary(*parts: str | tuple[int, str], separator: str = "; ") -> str:
    """Texts as they are and counts before what they count; an empty text and a count of 0 are left out."""
    texts = (part if isinstance(part, str) else f"{part[0]} {part[1]}" * bool(part[0]) for part in parts)
    return separator.join(text for text in texts if text)
