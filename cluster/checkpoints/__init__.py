"""Checkpoints of the whole run.

layout.py what one is and whether it is whole; keeper.py when one is written and which stay; assembly.py the parts that
the controller writes; remote.py copies behind a URL.
"""

from cluster.checkpoints.keeper import CheckpointKeeper
from cluster.checkpoints.layout import Checkpoint, newest_whole

__all__ = ["Checkpoint", "CheckpointKeeper", "newest_whole"]
