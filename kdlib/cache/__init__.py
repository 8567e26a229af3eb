"""Teacher targets on disk: written once, read by every student, keyed by document and position."""

from kdlib.cache.kinds import Kind
from kdlib.cache.reader import TargetCache
from kdlib.cache.teachers import DenseTeacher, ModelTeacher
from kdlib.cache.writer import write_targets

__all__ = ["DenseTeacher", "Kind", "ModelTeacher", "TargetCache", "write_targets"]
