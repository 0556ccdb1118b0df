"""The gradients of test_sft_loss's fixed rows, shared out over the processes there are (`tests.one_and_two`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stages.runtime import ranks
from tests.stages.trl.test_sft_loss import BY_ROLE, gradient


def ways(world: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, rows, settings). Every one of them is one step over the same rows: "packed" makes 6 sequences of them. Of
    13 rows the last micro-batch holds one, and accelerate fills it up."""
    four = {"per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 4}
    eight = {"per_device_train_batch_size": 8 // world, "gradient_accumulation_steps": 2}
    two = {"per_device_train_batch_size": 2 // world, "gradient_accumulation_steps": 3}
    yield "full", 16, {"per_device_train_batch_size": 16 // world}
    yield "accumulated", 16, four
    yield "lora", 16, {"per_device_train_batch_size": 16 // world, "lora": True}
    yield "padding_free", 16, {**eight, "padding_free": True}
    yield "packed", 16, {**two, "packing": True, "max_length": 110}
    yield "ragged", 13, four
    yield "ragged padding_free", 13, {**four, "padding_free": True}


def main(out: Path) -> None:
    more = {"ddp_backend": "gloo"} if ranks.world() > 1 else {}
    for kind in ("weight_sum", "nonzero_count", "completion_count"):
        for name, rows, how in ways(ranks.world()):
            found = gradient(tempfile.mkdtemp(), BY_ROLE, kind, rows=rows, **how, **more)
            if ranks.first():
                save_file(
                    {key.removeprefix("module."): value.contiguous() for key, value in found.items()},
                    out / f"{name}-{kind}.safetensors",
                )
