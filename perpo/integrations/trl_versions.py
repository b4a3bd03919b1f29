"""Which versions of TRL the online trainer is tested with. It overrides methods of GRPOTrainer that are TRL's own."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

OLDEST, BELOW = "1.13", "1.17"


def require_trl() -> None:
    """Raises:
    ImportError: TRL is not installed, or another version of it."""
    fix = f"pip install 'trl>={OLDEST},<{BELOW}'"
    try:
        found = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ImportError(f"perpo's list trainer on top of GRPOTrainer needs TRL: {fix}") from None
    if not Version(OLDEST) <= Version(found) < Version(BELOW):
        raise ImportError(
            f"trl {found} is installed, and perpo's list trainer on top of its GRPOTrainer is tested with {OLDEST} to "
            f"below {BELOW}: {fix}"
        )
