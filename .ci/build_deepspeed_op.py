"""Compile the extension that DeepSpeed's CPU communication needs, so that no run waits for it.

torch caches it (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions); a second call takes a second. With CUDA,
DeepSpeed uses NCCL and needs no extension here.
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
