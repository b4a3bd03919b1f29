"""Triton's interpreter, without what it does over and over.

For a launch it puts functions of its own in the place of those of `triton.language`, and does so again, in vain, when
one `@triton.jit` function calls another: two thirds of the time of a list kernel. Here the functions that a module sees
are replaced once a launch. What is computed is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace_once_a_launch() -> None:
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang
    launch: Callable[..., None] = interpreter.GridExecutor.__call__
    replaced: set[int] | None = None  # the modules whose functions see the replacements, while a kernel runs

    def once(fn: Any) -> Any:
        place = id(fn.__globals__)
        if replaced is None:
            return replace(fn)
        if place in replaced:
            return interpreter._LangPatchScope()
        replaced.add(place)
        return replace(fn)

    def launched(*args: Any, **kwargs: Any) -> None:
        nonlocal replaced
        replaced = set()
        try:
            launch(*args, **kwargs)
        finally:
            replaced = None

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched
