"""What a recipe passes to TRL is judged before anything runs: what a trainer of ours cannot have is refused by name,
and the rest is tried on a small copy of the policy."""

from __future__ import annotations

import gc
import multiprocessing
import random
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from stages import trl_settings
from stages.errors import BadInput
from stages.grpo import GrpoConfig
from stages.inspections import rehearsal
from stages.inspections.preflight import look_at
from stages.kinds import STAGES
from stages.sft import SftConfig
from tests.models import save
from tests.stages.inspections.test_preflight import GRPO, SFT, job

PASSED = {
    "accelerator_config",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "debug",
    "full_determinism",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "include_num_input_tokens_seen",
    "liger_kernel_config",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "pad_to_multiple_of",
    "router_aux_loss_coef",
    "shuffle_dataset",
    "skip_memory_metrics",
    "tf32",
    "torch_empty_cache_steps",
    "use_liger_kernel",
}
PASSED_TO_SFT = {
    "activation_offloading",
    "dataloader_persistent_workers",
    "neftune_noise_alpha",
    "train_sampling_strategy",
}
PASSED_TO_GRPO = {
    "cache_implementation",
    "cast_lm_head_to_fp32",
    "delta",
    "disable_dropout",
    "ds3_gather_for_generation",
    "importance_sampling_level",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "loss_type",
    "mask_truncated_completions",
    "multi_objective_aggregation",
    "num_completions_to_print",
    "num_iterations",
    "off_policy_mask_threshold",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "scale_rewards",
    "transformers_continuous_batching_config",
    "use_bias_correction_kl",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
    "use_vllm",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
}
"""Settings that a recipe may pass; those of vLLM begin with vllm_."""


@pytest.mark.parametrize(
    ("kind", "theirs", "passed"), [(SftConfig, SFTConfig, PASSED_TO_SFT), (GrpoConfig, GRPOConfig, PASSED_TO_GRPO)]
)
def test_every_setting_of_trl_is_refused_or_known_to_pass(kind, theirs, passed):
    """A new version of TRL has to be read before its settings pass."""
    known = {name for name in theirs.__dataclass_fields__ if not name.startswith(("vllm_", "_"))}
    refused = set(trl_settings.REFUSED) | set(kind.REFUSED) | set(kind.TRANSLATED.values())
    assert known - refused == PASSED | passed
    assert set(kind.REFUSED) <= set(theirs.__dataclass_fields__)
    assert set(trl_settings.REFUSED) <= {*SFTConfig.__dataclass_fields__, *GRPOConfig.__dataclass_fields__}


SMALL_SFT = {**SFT, "epochs": 1.0, "rows_per_step": 4, "rows": "train[0:8]"}
SMALL_GRPO = {
    **GRPO,
    "rows": "train[0:8]",
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 4,
    "max_completion_length": 4,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def small(kind, policy, tmp_path, trl, **more):
    """A job of two steps on sums."""
    settings = SMALL_SFT if kind == "sft" else SMALL_GRPO
    made = job(policy, {**settings, "trl": trl, **more}, tmp_path, "")
    rows = made.rows.model_copy(update={"stop": 8})
    what = {"problem": {"name": "arithmetic"}, "rows": rows, "sources": {"policy": "plain"}}
    return made.model_copy(update=what)


@pytest.mark.parametrize(
    ("kind", "trl", "said"),
    [
        ("sft", {"remove_unused_columns": True}, "columns of their own"),
        ("grpo", {"remove_unused_columns": True}, "columns of their own"),
        ("sft", {"eval_strategy": "steps"}, "evaluated after its stage"),
        ("grpo", {"num_generations_eval": 2}, "evaluated after its stage"),
        ("sft", {"do_eval": True}, "evaluated after its stage"),
        ("sft", {"deepspeed": "ds.json"}, "launch.accelerate"),
        ("grpo", {"fsdp": "full_shard"}, "launch.accelerate"),
        ("sft", {"accelerator_config": {"dispatch_batches": True}}, "use_seedable_sampler or even_batches"),
        ("grpo", {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "behind the stage's"),
        ("sft", {"accelerator_config": "accelerator.json"}, "write the mapping out"),
        ("sft", {"activation_checkpointing_kwargs": "{}"}, "write the mapping out"),
        ("grpo", {"dataloader_persistent_workers": True}, "does not resume exactly"),
        ("sft", {"dataloader_in_order": False}, "one order"),
        ("grpo", {"loss_type": "ppo"}, "expected one of dapo"),
        ("grpo", {"loss_type": "bnpo"}, "launch.micro_batch"),
        ("grpo", {"entropy_coef": 0.1}, "launch.micro_batch"),
        ("grpo", {"importance_sampling_level": "word"}, "expected one of token, sequence"),
        ("grpo", {"scale_rewards": "std"}, "expected one of group"),
        ("grpo", {"neftune_noise_alpha": 5.0}, "policy that is trained"),
        ("sft", {"train_sampling_strategy": "alphabetical"}, "expected one of random"),
        ("sft", {"torch_compile": True}, "have not been tried"),
        ("sft", {"logging_nan_inf_filter": True}, "no number stops"),
    ],
)
def test_what_a_trainer_of_ours_cannot_have_is_refused_by_the_recipe(kind, trl, said):
    settings = {"name": "x", "policy": "base", "trl": trl, **(SMALL_SFT if kind == "sft" else SMALL_GRPO)}
    with pytest.raises(ValidationError) as refused:
        STAGES[kind].config.model_validate(settings)
    assert f"trl.{next(iter(trl))}" in str(refused.value) and said in str(refused.value)


def test_cispo_needs_a_cap_above_1(policy, tmp_path):
    """TRL clamps the ratio itself to epsilon_high there: with the 0.28 of clip-higher every gradient would have 0.28 of
    its size."""
    settings = {"name": "x", "policy": "base", "trl": {"loss_type": "cispo"}, **SMALL_GRPO}
    with pytest.raises(ValidationError, match="cap of the ratio"):
        GrpoConfig.model_validate(settings)
    assert look_at(small("grpo", policy, tmp_path, {"loss_type": "cispo"}, epsilon_high=5.0)) == []


@pytest.mark.parametrize(
    ("kind", "trl", "name"),
    [
        ("sft", {"optim": "adamw_8bit"}, "optim"),
        ("sft", {"lr_scheduler_kwargs": {"cycles": 2}, "adam_beta2": 0.9}, "lr_scheduler_kwargs"),
        ("grpo", {"num_iterations": 0}, "num_iterations"),
        ("grpo", {"use_vllm": True}, "use_vllm"),
        pytest.param("sft", {"adam_beta1": 2.0}, "adam_beta1", marks=pytest.mark.full),
        pytest.param("sft", {"dataloader_num_workers": -1}, "dataloader_num_workers", marks=pytest.mark.full),
        pytest.param("sft", {"activation_offloading": True}, "activation_offloading", marks=pytest.mark.full),
        pytest.param("grpo", {"sapo_temperature_pos": 0.0, "loss_type": "sapo"}, "sapo_temp", marks=pytest.mark.full),
        pytest.param("grpo", {"cache_implementation": "huge"}, "cache_implementation", marks=pytest.mark.full),
        pytest.param("grpo", {"use_liger_kernel": True, "delta": 2.0}, "use_liger_kernel", marks=pytest.mark.full),
    ],
)
def test_what_fails_only_in_training_fails_in_the_preflight_and_is_named(kind, trl, name, policy, tmp_path):
    with pytest.raises(BadInput, match=f"stages.{kind}.trl.{name}"):
        look_at(small(kind, policy, tmp_path, trl))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("grpo", {"mix": {"data": "general.jsonl", "share": 0.1}, "drop_overlap": True}),
        ("sft", {"drop_overlap": True}),
    ],
)
def test_a_rehearsal_drops_no_overlap(kind, more, policy, tmp_path):
    """It would end for another reason than the setting, and blame none."""
    one = small(kind, policy, tmp_path, {"optim": "adamw_8bit"}, **more)
    with pytest.raises(BadInput, match=f"stages.{kind}.trl.optim"):
        rehearsal.rehearse(one, STAGES[kind].config.model_validate(one.config), str(policy))


def test_a_rehearsal_does_not_stop_without_a_signal(policy, tmp_path):
    """Its random model may earn the same everywhere, of which the stage's settings say nothing."""
    one = small("grpo", policy, tmp_path, {"adam_beta2": 0.95}, stop_without_signal=1)
    rehearsed = rehearsal._small(one, one.config["trl"], str(policy), tmp_path / "place")
    assert GrpoConfig.model_validate(rehearsed.config).stop_without_signal is None


def test_settings_that_fail_only_together_are_named_together(policy, tmp_path):
    with pytest.raises(BadInput, match=r"stages.sft.trl: a rehearsal .* fails with its settings together"):
        look_at(small("sft", policy, tmp_path, {"adam_beta1": 2.0, "adam_beta2": 2.0}))


def test_an_architecture_that_cannot_be_rehearsed_is_a_warning_and_no_setting_is_blamed(policy, tmp_path, monkeypatch):
    """Here because the rehearsal's own batch does not divide."""
    monkeypatch.setattr(rehearsal, "SMALL", {"sft": {**rehearsal.SMALL["sft"], "rows_per_step": 3}})
    (finding,) = look_at(small("sft", policy, tmp_path, {"adam_beta2": 0.9}))
    assert finding.rule == "trl_not_rehearsed" and finding.severity == "warn"


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_settings_that_are_fine_are_silent(kind, policy, tmp_path):
    assert look_at(small(kind, policy, tmp_path, {"adam_beta2": 0.95, "optim": "adafactor"})) == []


OPTIMIZERS = ("adamw_torch", "adafactor", "sgd", "adamw_8bit", "galore_adamw", "lion_32bit", "stable_adamw", "nonsense")
SPECIAL = {
    "optim": OPTIMIZERS,
    "optim_args": ("weight_decay=0.1", "x=", "momentum=0.9"),
    "loss_type": ("dapo", "grpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo", "bnpo", "nll", "dft"),
    "importance_sampling_level": ("token", "sequence", "word"),
    "scale_rewards": ("group", "batch", "none", True, False, "std"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum", "max"),
    "lr_scheduler_kwargs": ({}, {"num_cycles": 0.5}, {"cycles": 1}, "x"),
    "accelerator_config": ({"even_batches": False}, {"split_batches": True}, {"use_seedable_sampler": False}, "x.json"),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {"use_reentrant": True}, {"x": 1}),
    "cache_implementation": ("dynamic", "static", "offloaded", "quantized", "huge"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "x"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, "x"),
    "dataloader_num_workers": (0, 1, -1),
    "transformers_continuous_batching_config": ({"num_blocks": 64}, {"x": 1}),
    "torch_compile": (False,),
}
"""Values of settings that hold words or mappings."""
BY_TYPE = (
    ("bool", (True, False)),
    ("int", (0, 1, 2, 5, -1)),
    ("float", (0.0, 0.3, 1.0, 2.5, -1.0)),
    ("str", ("", "x")),
)


def random_settings(rng, theirs):
    """One to three settings, half of them such as pass by name, with values of about the right type."""
    found = {}
    names = sorted(theirs.__dataclass_fields__)
    passed = sorted({*PASSED, *PASSED_TO_SFT, *PASSED_TO_GRPO} & {*names})
    for name in rng.sample(passed if rng.random() < 0.5 else names, rng.randint(1, 3)):
        kind = str(theirs.__dataclass_fields__[name].type)
        values = [value for word, some in BY_TYPE if word in kind for value in some]
        found[name] = rng.choice(
            [*(SPECIAL.get(name) or values or [None]), None] if rng.random() < 0.9 else [None, "x", 7]
        )
    return found


def outcome(number, policy, tmp_path):
    """What becomes of a job with random settings: refused before it runs, or run to its end."""
    gc.freeze()  # trainers collect garbage, which would copy all of the parent's pages
    rng = random.Random(number)
    kind, theirs = rng.choice([("sft", SFTConfig), ("grpo", GRPOConfig)])
    trl = random_settings(rng, theirs)
    more = {"epsilon_high": 5.0} if kind == "grpo" and rng.random() < 0.5 else {}
    made = small(kind, policy, tmp_path, trl, **more)
    try:
        look_at(made)
    except (BadInput, ValidationError) as refused:
        return "refused", f"{kind} {trl}: {refused}"
    try:
        Path(made.out).mkdir(parents=True)
        STAGES[kind].run(made)
    except Exception:
        return "broke", f"{kind} {trl}: {traceback.format_exc()}"
    return "ran", f"{kind} {trl}"


def in_a_process(number, policy, tmp_path):
    """`outcome` in a process of its own: some settings are switches of the whole process."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(outcome(number, policy, tmp_path)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "died", f"case {number}"
    finally:
        child.join()


@pytest.mark.parametrize("cases", [range(5), pytest.param(range(5, 105), marks=pytest.mark.full)], ids=["5", "100"])
def test_random_settings_are_refused_beforehand_or_run(cases, policy, tmp_path):
    seen = {number: in_a_process(number, policy, tmp_path / str(number)) for number in cases}
    assert [what for what in seen.values() if what[0] not in ("refused", "ran")] == []
    assert {what for what, _ in seen.values()} == {"refused", "ran"}
