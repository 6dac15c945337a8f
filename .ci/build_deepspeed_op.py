"""Compile the extension that DeepSpeed's CPU communication needs, so that no run waits for it.

torch caches it under TORCH_EXTENSIONS_DIR, which `make` and the command line set to a folder of the environment: torch
builds again whenever the paths change, so two checkouts must not share it. With CUDA, DeepSpeed uses NCCL instead.
"""

from __future__ import annotations

import sys


def main() -> int:
    import torch
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    if torch.cuda.is_available():
        print("CUDA found: DeepSpeed uses NCCL, nothing to compile")
        return 0
    ShareMemCommBuilder().load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
