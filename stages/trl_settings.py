"""Which settings a recipe may pass to TRL by `trl:`, and why not the others.

a stage's `trl` mapping -> the first setting that cannot be passed, with what to do instead. Every field of SFTConfig
and of GRPOConfig is either refused here or in a stage's own table, or listed in the test of this module: a new version
of TRL has to be read before its settings pass. `stages.inspections.rehearsal` tries those that pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

SET = "switchback sets it; remove it"
EVALUATED = "a policy is evaluated after its stage; remove it"
SAVED = "switchback saves, resumes and publishes; remove it"
SHARDED = "write it into the accelerate config that launch.accelerate names"
REPORTED = "switchback writes its own metrics; remove it"
FIXED = "the batch of a step is a setting of the stage; remove it"
BY_MICRO_BATCH = (
    "it is normalised within a micro-batch, so that launch.micro_batch, which no key holds, would change the result; "
    "remove it"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "output_dir",
            "seed",
            "data_seed",
            "use_cpu",
            "bf16",
            "fp16",
            "disable_tqdm",
            "logging_steps",
            "logging_strategy",
            "trust_remote_code",
            "ddp_backend",
            "local_rank",
            "model_init_kwargs",
            "chat_template_kwargs",
            "do_train",
            "max_steps",
            "use_cache",
        ),
        SET,
    ),
    **dict.fromkeys(
        (
            "do_eval",
            "do_predict",
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "eval_packing",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "per_device_eval_batch_size",
            "num_generations_eval",
            "batch_eval_metrics",
            "include_for_metrics",
            "prediction_loss_only",
            "label_names",
            "bf16_full_eval",
            "fp16_full_eval",
            "metric_for_best_model",
            "greater_is_better",
            "load_best_model_at_end",
        ),
        EVALUATED,
    ),
    **dict.fromkeys(
        (
            "save_strategy",
            "save_steps",
            "save_only_model",
            "save_total_limit",
            "save_on_each_node",
            "ignore_data_skip",
            "enable_jit_checkpoint",
            "resume_from_checkpoint",
            "restore_callback_states_from_checkpoint",
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "log_completions_hub_repo",
        ),
        SAVED,
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), SHARDED),
    **dict.fromkeys(
        ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        REPORTED,
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "dataloader_drop_last"),
        FIXED,
    ),
    "remove_unused_columns": "the trainers read columns of their own; remove it",
    "logging_nan_inf_filter": "a loss that is no number stops the stage; remove it",
    "average_tokens_across_devices": "the loss is normalised over all processes; remove it",
    "label_smoothing_factor": "the loss has no label smoothing; remove it",
    "dataloader_in_order": "rows come in one order, so that a stage can be resumed; remove it",
    "dataloader_multiprocessing_context": "workers are forked; remove it",
    "torch_compile": "compiled trainers have not been tried; remove it",
    "torch_compile_backend": "compiled trainers have not been tried; remove it",
    "torch_compile_mode": "compiled trainers have not been tried; remove it",
}
"""Name -> what to do instead, in every stage that trains."""

ACCELERATOR = ("use_seedable_sampler", "even_batches")
"""What `accelerator_config` may set. Its other settings change batches behind the trainer's back."""


def refusals(trl: Mapping[str, Any], refused: Mapping[str, str], words: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """A line for each setting that cannot be passed. `refused` is the stage's own table, `words` says what a setting
    may be."""
    for name, value in trl.items():
        if reason := {**REFUSED, **refused}.get(name):
            yield f"trl.{name}: {reason}"
        elif not _is_json(value):
            yield (
                f"trl.{name}: found {value!r}, expected a number, a string, true, false, null, or lists and mappings "
                f"of them"
            )
        elif name in words and value not in words[name]:
            yield f"trl.{name}: found {value!r}, expected one of {', '.join(map(str, words[name]))}"
        elif name.endswith(("_kwargs", "_config")) and not isinstance(value, dict | None):
            yield f"trl.{name}: found {value!r}, expected a mapping. Fix: write the mapping out"
        elif name == "accelerator_config" and (unknown := [key for key in value or {} if key not in ACCELERATOR]):
            yield (
                f"trl.{name}.{unknown[0]}: it changes batches or precision behind the stage's settings (expected "
                f"{' or '.join(ACCELERATOR)}). Fix: remove it"
            )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
