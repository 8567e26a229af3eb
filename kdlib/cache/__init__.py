"""Teacher targets on disk: written once, read by every student, keyed by document and position."""

from kdlib.cache.reader import TargetCache
from kdlib.cache.writer import write_targets

__all__ = ["TargetCache", "write_targets"]
