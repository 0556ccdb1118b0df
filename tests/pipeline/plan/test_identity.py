"""Keys: they move with what decides the result, and with nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.base import base_of
from pipeline.plan.steps import steps as steps_of
from pipeline.recipe import recipe
from pipeline.recipe.checks import check
from pipeline.registry import Registry
from pipeline.registry.keys import canonical, changes, key_of
from stages.config import Config, part_of
from stages.errors import BadInput
from stages.inspections.kinds import INSPECTIONS
from stages.kinds import STAGES
from tests.conftest import TINY, TINY_BASE, stage

EVERYTHING: dict[str, Any] = copy.deepcopy(TINY)
EVERYTHING["model"] |= {"lora": {"r": 32, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}}
stage(EVERYTHING, "warmup").update(packing={"strategy": "bfd", "max_length": 512}, loss_weights={"system": 0.2})
stage(EVERYTHING, "distill").update(format={"response_prefix": "<think>\n"})
stage(EVERYTHING, "harvest")["keep"] |= {"per_prompt": 2, "pass_rate": [0.0, 1.0]}
stage(EVERYTHING, "harvest").update(source="both", training_steps=[1, 2])
EVERYTHING |= {"deadline": 100, "seed": 0}
EVERYTHING["launch"] |= {"processes": 1, "device": "auto", "micro_batch": 8}
"""A recipe in which every optional group is there, so that every field can be walked to."""

OTHER: dict[str, Any] = {
    "recipe.name": "other",
    "recipe.seed": 1,
    "recipe.registry": "elsewhere",
    "recipe.deadline": 7,
    "recipe.sampler": "continuous",
    "model.path": None,
    "model.hub": None,
    "model.revision": None,
    "model.artifact": None,
    "model.dtype": "bfloat16",
    "lora.r": 4,
    "lora.alpha": 4.0,
    "lora.dropout": 0.5,
    "lora.targets": ["q_proj"],
    "lora.quantize": "nf4",
    "problem.name": None,
    "problem.form": "text",
    "problem.overlap": "zero",
    "problem.reward_overlap": "touching",
    "format.prompt": "scheduler",
    "format.response_prefix": "",
    "format.per_row": None,
    "format.chat_template": "configs/tiny-base/chat_template.jinja",
    "evaluate.rows": 9,
    "evaluate.samples": 3,
    "evaluate.temperature": 0.5,
    "evaluate.max_completion_length": 9,
    "validation.rows": 5,
    "launch.processes": 2,
    "launch.threads": 2,
    "launch.device": "cpu",
    "launch.micro_batch": 4,
    "launch.sampler_tokens": 4096,
    "launch.accelerate": None,
    "launch.grace": 0.0,
    "work.mirror": "elsewhere",
    "stage.name": "renamed",
    "stage.policy": "base",
    "stage.replicate": 1,
    "stage.deadline": 5,
    "stage.kind": None,
    "stage.save_every": 7,
    "stage.keep_last": 1,
    "stage.data": "demonstrations",
    "stage.rows": "train[100:200]",
    "stage.learning_rate": 0.5,
    "stage.lr_scheduler": "constant",
    "stage.warmup_steps": 3.0,
    "stage.weight_decay": 0.5,
    "stage.max_grad_norm": 0.5,
    "stage.drop_overlap": True,
    "stage.trl": {"adam_beta2": 0.5},
    "stage.prompt_loss_weight": 0.7,
    "stage.completion_loss_weight": 0.7,
    "stage.epochs": 2.0,
    "stage.rows_per_step": 16,
    "stage.steps": 7,
    "stage.prompts_per_step": 4,
    "stage.group_size": 8,
    "stage.max_completion_length": 9,
    "stage.temperature": 0.5,
    "stage.epsilon": 0.1,
    "stage.epsilon_high": 0.5,
    "stage.audit": False,
    "stage.stop_without_signal": 7,
    "stage.samples": 3,
    "kl.beta": 0.5,
    "kl.reference": None,
    "stage.format": {"response_prefix": "x"},
    "stage.normaliser": "nonzero_count",
    "stage.padding_free": True,
    "stage.packing": {"max_length": 64},
    "packing.strategy": "wrapped",
    "packing.max_length": 99,
    **{f"loss_weights.{role}": 0.9 for role in ("system", "user", "template", "prefix", "completion")},
    "keep.min_score": 0.5,
    "keep.per_prompt": 1,
    "keep.pass_rate": [0.1, 0.9],
    "keep.min_reward": 0.5,
    "keep.max_length": 9,
    "keep.dedup": "off",
    "keep.max_similarity": 0.5,
    "stage.source": "training",
    "stage.training_steps": [2, 2],
    "stage.control": "random",
    "stage.mix": None,
}
"""Another value for every field; None where a field cannot be changed on its own (covered by tests of their own
below)."""

GROUPS = {
    "recipe": [()],
    "model": [("model",)],
    "lora": [("model", "lora")],
    "problem": [("problem",)],
    "format": [("format",), ("stages", 3, "format")],
    "packing": [("stages", 0, "packing")],
    "loss_weights": [("stages", 0, "loss_weights"), ("stages", 3, "loss_weights")],
    "evaluate": [("evaluate",)],
    "validation": [("validation",)],
    "launch": [("launch",)],
    "work": [("work",)],
    "stage": [("stages", i) for i in range(5)],
    "kl": [("stages", 1, "kl"), ("stages", 4, "kl")],
    "keep": [("stages", 2, "keep")],
}


def keys(settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """The keys of all steps, in order."""
    return [step.key for step in steps_of(recipe.Recipe.model_validate(settings), Registry(tmp_path / "r"))]


def config_at(loaded: Any, way: tuple[Any, ...]) -> Config:
    for name in way:
        loaded = loaded[name] if isinstance(name, int) else getattr(loaded, name)
    return loaded


def fields() -> list[tuple[str, tuple[Any, ...], str]]:
    """(group, way, field) of every field of every Config in the recipe, but for the few that cannot be changed on
    their own."""
    loaded = recipe.Recipe.model_validate(EVERYTHING)
    found = []
    for group, ways in GROUPS.items():
        for way in ways:
            config = config_at(loaded, way)
            for name in type(config).model_fields:
                value = getattr(config, name)
                is_group = isinstance(value, Config) or name == "stages"
                if not is_group and OTHER[f"{group}.{name}"] is not None and (way, name) not in FIXED:
                    found.append((group, way, name))
    return found


FIXED = {
    *((("stages", 0), "policy"), (("stages", 0), "data"), (("stages", 3), "rows")),
    *((("stages", 1), "drop_overlap"), (("stages", 4), "drop_overlap")),
}
"""The warm-up has no earlier stage to read, distill's rows are its data's, and a grpo stage without a mix drops
nothing."""


@pytest.mark.parametrize(
    ("group", "way", "name"), fields(), ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else v
)
def test_a_key_moves_exactly_when_an_identity_field_does(group, way, name, tmp_path):
    """Every field of every Config is changed, one at a time; a stage's field moves that stage's own key."""
    settings = copy.deepcopy(EVERYTHING)
    here: Any = settings
    for step in way:
        here = here.setdefault(step, {}) if isinstance(here, dict) else here[step]
    if (group, name) == ("stage", "name"):
        rename(settings, here["name"], OTHER["stage.name"])
    else:
        here[name] = OTHER[f"{group}.{name}"]
    if (group, name) == ("stage", "policy") and here.get("kind") == "rejection":
        here.update(rows="train[512:528]", source="fresh", training_steps=None)  # its policy is no grpo stage any more
    if (group, name) == ("stage", "source"):
        for how in ("samples", "max_completion_length"):  # nothing is sampled then
            del here[how]
    part = part_of(type(config_at(recipe.Recipe.model_validate(EVERYTHING), way)), name)
    assert part in ("identity", "resolved", "execution"), f"{group}.{name} is not marked"
    moved = [a != b for a, b in zip(keys(EVERYTHING, tmp_path), keys(settings, tmp_path), strict=True)]
    assert any(moved) == (part != "execution"), f"{group}.{name} is {part}"
    if way[:1] == ("stages",) and part != "execution":
        assert moved[POSITION[way[1]]], f"{group}.{name} does not move its own stage's key"


POSITION = {0: 1, 1: 3, 2: 5, 3: 6, 4: 8}
"""Where each stage's own step is among all, evaluations included."""


@pytest.mark.parametrize(
    ("problem", "field", "other"),
    [
        ({"name": "arithmetic"}, "digits", 3),
        ({"name": "arithmetic"}, "operations", ["*"]),
        ({"name": "countdown"}, "numbers", 3),
        ({"name": "countdown"}, "largest", 50),
        ({"name": "countdown"}, "largest_target", 500),
        ({"name": "countdown"}, "use_all", True),
        *(
            ({"dataset": "org/data", "rewards": ["accuracy"], "answer": "x"}, field, other)
            for field, other in {
                "dataset": "org/other",
                "rewards": ["accuracy", "think_format"],
                "answer": "y",
                "prompt": "question",
                "config": "main",
                "split": "test",
                "revision": "abc",
                "time_limit": 1.0,
            }.items()
        ),
    ],
)
def test_a_field_of_another_kind_of_problem_moves_the_keys_of_what_uses_it(problem, field, other, settings, tmp_path):
    before = keys(settings | {"problem": problem}, tmp_path)
    after = keys(settings | {"problem": problem | {field: other}}, tmp_path)
    assert not set(before) & set(after)


def test_how_user_code_is_run_and_a_short_name_of_a_reward_move_no_key(settings, tmp_path):
    seen = []
    for change in ({}, {"workers": 3}, {"max_failures": 0.5}, {"rewards": ["accuracy_reward"]}):
        problem = {"dataset": "org/data", "rewards": ["accuracy"], **change}
        seen.append(keys(settings | {"problem": problem}, tmp_path))
    assert all(found == seen[0] for found in seen)


def test_a_gold_column_moves_what_is_trained_on_it_and_nothing_else(settings, tmp_path):
    settings["stages"] = [
        {**stage(settings, "rl1"), "policy": "base"},
        {**stage(settings, "warmup"), "policy": "base"},
    ]
    problem = {"dataset": "org/data", "rewards": ["accuracy"]}
    seen = [keys(settings | {"problem": {**problem, "gold": gold}}, tmp_path) for gold in ("one", "other")]
    assert [a != b for a, b in zip(*seen, strict=True)] == [False, False, False, True, True]


def test_the_normaliser_that_was_revised_moves_the_keys_of_its_users_only(settings, tmp_path):
    """`identity["revised"]` is there for it, and for no other."""
    for normaliser in ("weight_sum", "nonzero_count", "completion_count"):
        stage(settings, "warmup")["normaliser"] = normaliser
        made = steps_of(recipe.Recipe.model_validate(settings), Registry(tmp_path / "r"))
        revised = {step.name: step.identity["revised"] for step in made if "revised" in step.identity}
        assert revised == ({"warmup": {"completion_count": 2}} if normaliser == "completion_count" else {})


def test_problems_of_ones_own_have_a_version_in_their_identity(settings, tmp_path):
    (tmp_path / "mine.py").write_text("")
    for problem in ({"dataset": "org/data", "rewards": ["accuracy"]}, {"file": str(tmp_path / "mine.py")}):
        made = steps_of(recipe.Recipe.model_validate(settings | {"problem": problem}), Registry(tmp_path / "r"))
        assert {step.identity["problem"]["version"] for step in made if step.identity["problem"]} == {"2"}


def test_lora_is_a_matter_of_training_and_not_of_evaluating_the_base(tmp_path):
    without = copy.deepcopy(EVERYTHING)
    del without["model"]["lora"]
    moved = [a != b for a, b in zip(keys(EVERYTHING, tmp_path), keys(without, tmp_path), strict=True)]
    assert moved == [False] + [True] * 9


def rename(settings, old, new):
    for box in settings["stages"]:
        for role in ("name", "policy", "data"):
            if box.get(role) == old:
                box[role] = new


def test_every_config_of_every_kind_is_marked():
    for kind, known in {**STAGES, **INSPECTIONS}.items():
        for name in known.config.model_fields:
            assert part_of(known.config, name), f"{kind}.{name} is neither identity nor execution"


def test_every_field_that_the_walk_skips_is_one_of_these():
    assert {name for name, value in OTHER.items() if value is None} == {
        "model.path",
        "model.hub",
        "model.revision",
        "model.artifact",
        "problem.name",
        "launch.accelerate",
        "stage.kind",
        "format.per_row",
        "stage.mix",
        "kl.reference",
    }


def test_one_changed_byte_of_the_base_model_moves_every_key(tmp_path, settings):
    model = tmp_path / "model"
    shutil.copytree(settings["model"]["path"], model)
    settings["model"]["path"] = str(model)
    before = keys(settings, tmp_path)
    (model / "README.md").write_text("not the model")
    assert keys(settings, tmp_path) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert not set(keys(settings, tmp_path)) & set(before)


def test_the_base_model_is_known_by_its_bytes_and_not_by_its_place(tmp_path, settings):
    before = keys(settings, tmp_path)
    shutil.copytree(settings["model"]["path"], tmp_path / "moved")
    settings["model"]["path"] = str(tmp_path / "moved")
    assert keys(settings, tmp_path) == before


def test_a_hub_model_is_known_by_name_and_revision(tmp_path, settings):
    settings["model"] = {"hub": "org/name", "revision": "abc"}
    before = keys(settings, tmp_path)
    for change in ({"hub": "org/other"}, {"revision": "abd"}):
        settings["model"] = {"hub": "org/name", "revision": "abc"} | change
        assert not set(keys(settings, tmp_path)) & set(before)


def test_positions_of_padded_rows_are_part_of_the_keys_of_rl_alone(tmp_path, settings):
    """On a base whose architecture needs them, and of what is made from what RL makes."""
    parsed, registry = recipe.Recipe.model_validate(settings), Registry(tmp_path / "r")
    base = base_of(parsed, registry)
    assert not base.own_positions
    before = steps_of(parsed, registry, base)
    after = steps_of(parsed, registry, base._replace(own_positions=True))
    moved = [step.name for step, other in zip(before, after, strict=True) if step.key != other.key]
    assert moved == ["rl1", "rl1.evaluate", "harvest", "distill", "distill.evaluate", "rl2", "rl2.evaluate"]
    assert [step.name for step in after if step.own_positions] == ["rl1", "rl2"]


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 2]]}, True),
        ({"model_type": "x", "text_config": {"model_type": "gemma3_text"}}, False),
        ({"model_type": "x", "text_config": {"model_type": "gpt2"}}, True),
        ({}, False),
        ({"model_type": "opt"}, False),
    ],
)
def test_the_plan_sees_in_config_json_whether_a_model_needs_positions(config, needs, tmp_path, settings):
    directory = tmp_path / "model"
    shutil.copytree(settings["model"]["path"], directory)
    (directory / "config.json").write_text(json.dumps(config))
    settings["model"]["path"] = str(directory)
    assert base_of(recipe.Recipe.model_validate(settings), Registry(tmp_path / "r")).own_positions == needs


def test_a_config_json_that_is_no_object_is_refused(tmp_path, settings):
    directory = tmp_path / "model"
    shutil.copytree(settings["model"]["path"], directory)
    settings["model"]["path"] = str(directory)
    for text in ("[]", "{", ""):
        (directory / "config.json").write_text(text)
        with pytest.raises(BadInput, match="is no JSON object"):
            keys(settings, tmp_path)


@pytest.mark.parametrize("part", ["system", "user"])
def test_one_changed_byte_of_the_prompt_moves_every_key(part, tmp_path, settings):
    prompt = tmp_path / "mine.md"
    prompt.write_text("---\npurpose: a test\n---\n# system\nbe brief\n# user\n{{ prompt }}\n")
    settings["format"]["prompt"] = str(prompt)
    before = keys(settings, tmp_path)
    prompt.write_text(prompt.read_text().replace("a test", "another"))
    assert keys(settings, tmp_path) == before, "the purpose is for people"
    text = prompt.read_text()
    prompt.write_text(
        text.replace("brief", "brieg") if part == "system" else text.replace("{{ prompt }}", "{{ prompt }}!")
    )
    assert not set(keys(settings, tmp_path)) & set(before)


def test_one_changed_byte_of_a_problem_file_moves_the_keys_of_what_uses_it(tmp_path, settings):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    settings["problem"] = {"file": str(file)}
    before = keys(settings, tmp_path)
    file.write_text("x = 2\n")
    assert not set(keys(settings, tmp_path)) & set(before)


def test_one_changed_byte_of_a_dataset_or_a_reward_file_moves_the_keys(tmp_path, settings):
    data, reward = tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    data.write_text("{}\n")
    reward.write_text("a = 1\n")
    settings["problem"] = {"dataset": str(data), "rewards": [f"{reward}:brevity"]}
    seen = [keys(settings, tmp_path)]
    data.write_text("{} \n")
    seen.append(keys(settings, tmp_path))
    reward.write_text("a = 2\n")
    seen.append(keys(settings, tmp_path))
    assert len({key for found in seen for key in found}) == 3 * len(seen[0])


def test_a_base_evaluation_is_shared_by_all_seeds(tmp_path, settings):
    before = keys(settings, tmp_path)
    settings["seed"] = 1
    after = keys(settings, tmp_path)
    assert after[0] == before[0]
    assert not set(after[1:]) & set(before[1:])


def test_a_step_does_not_depend_on_what_it_does_not_use(tmp_path, settings):
    """rl2's KL moves rl2 and its evaluation, and nothing else."""
    before = keys(settings, tmp_path)
    stage(settings, "rl2")["kl"] = {"beta": 0.1}
    moved = [a != b for a, b in zip(before, keys(settings, tmp_path), strict=True)]
    assert moved == [False] * 8 + [True] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a": {1, 2}}, b"x", object(), Path("x")])
def test_what_cannot_be_hashed_stably_is_refused(value):
    with pytest.raises(TypeError):
        canonical({"a": [value]})


def test_a_key_does_not_depend_on_the_order_of_a_dict():
    assert key_of({"a": 1, "b": [1.5, None, True, "x"]}) == key_of({"b": [1.5, None, True, "x"], "a": 1})
    assert key_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_changes_names_fields_by_their_path():
    assert changes({"a": [{"b": 1, "c": 2}, {"b": 3}]}, {"a": [{"b": 1, "c": 4}]}) == {
        "a.0.c": (2, 4),
        "a.1.b": (3, None),
    }
    assert changes({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": (1,), "e": None}) == {"a.c": (2, 3)}


def test_the_key_of_training_below_float32_says_that_nothing_autocasts(tmp_path):
    """What was trained before did; steps that train nothing, and float32, keep their keys."""
    model = {"hub": "org/name", "revision": "abc"}
    identities = {}
    for dtype in ("float32", "bfloat16"):
        planned = recipe.Recipe.model_validate({**TINY, "model": {**model, "dtype": dtype}})
        identities[dtype] = {step.name: step.identity["model"] for step in steps_of(planned, Registry(tmp_path / "r"))}
    assert not [one for one in identities["float32"].values() if "mixed_precision" in one]
    said = {name for name, one in identities["bfloat16"].items() if one.get("mixed_precision") == "no"}
    assert said == {"warmup", "rl1", "distill", "rl2"}


def test_a_float16_model_is_evaluated_and_not_trained():
    model = {"path": str(TINY_BASE), "dtype": "float16"}
    with pytest.raises(BadInput, match=r"model.dtype: warmup cannot be trained in float16 \(found float16, expected"):
        check(recipe.Recipe.model_validate({**TINY, "model": model}))
    sampled = {**stage(TINY, "harvest"), "policy": "base", "rows": "train[0:8]"}
    check(recipe.Recipe.model_validate({**TINY, "model": model, "stages": [sampled]}))
