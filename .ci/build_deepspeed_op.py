"""Compile the extension that DeepSpeed's CPU communication needs, so that no run waits for it.

torch caches it under TORCH_EXTENSIONS_DIR, which `make` and the command line set to a folder of the environment: torch
builds again whenever the paths change, so two checkouts must not share it. With CUDA, DeepSpeed uses NCCL instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from learner.engines.compiled_op import load_communication_op

    load_communication_op()
