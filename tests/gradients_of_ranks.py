"""Run under torchrun by test_processes_of_a_stage: the gradients of test_sft_loss's fixed rows, shared out over this
world's processes."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from tests.stages.trl.test_sft_loss import BY_ROLE, gradient

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
WAYS = {
    "full": {"per_device_train_batch_size": 16 // WORLD},
    "accumulated": {"per_device_train_batch_size": 4 // WORLD, "gradient_accumulation_steps": 4},
    "lora": {"per_device_train_batch_size": 16 // WORLD, "lora": True},
    "padding_free": {"per_device_train_batch_size": 8 // WORLD, "gradient_accumulation_steps": 2, "padding_free": True},
    "packed": {
        "per_device_train_batch_size": 2 // WORLD,
        "gradient_accumulation_steps": 3,
        "packing": True,
        "max_length": 110,
    },
}
"""Every one of them is one step over the same rows: "packed" makes 6 sequences of them."""
RAGGED = {
    "ragged": {"per_device_train_batch_size": 4 // WORLD, "gradient_accumulation_steps": 4},
    "ragged padding_free": {
        "per_device_train_batch_size": 4 // WORLD,
        "gradient_accumulation_steps": 4,
        "padding_free": True,
    },
}
"""13 rows: the last micro-batch holds one, and accelerate fills it up."""


def main(out: Path) -> None:
    for kind in ("weight_sum", "nonzero_count", "completion_count"):
        for name, how in (WAYS | RAGGED).items():
            more = {"ddp_backend": "gloo"} if WORLD > 1 else {}
            rows = 13 if name in RAGGED else 16
            found = gradient(tempfile.mkdtemp(), BY_ROLE, kind, rows=rows, **how, **more)
            if os.environ.get("RANK", "0") == "0":
                save_file(
                    {key.removeprefix("module."): value.contiguous() for key, value in found.items()},
                    out / f"{name}-{kind}.safetensors",
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
