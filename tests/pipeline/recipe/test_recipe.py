"""Recipes: what parses, what is refused in one line, and what the schema says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.recipe import checks, recipe
from pipeline.recipe.recipe import Recipe, dump, is_text_of
from stages.errors import BadInput
from tests.conftest import ROOT, run_cli, stage


def set_(settings, path, value):
    """a.b.c = value; stages by name."""
    here = settings
    *way, last = path.split(".")
    for name in way:
        here = stage(settings, name) if isinstance(here, list) else here.setdefault(name, {})
    here[last] = value


BAD = {
    "unknown key": ({"stages.rl1.kl": {"betta": 1}}, "unknown key 'betta'; did you mean beta?"),
    "unknown key at the top": ({"modle": 1}, "did you mean model?"),
    "wrong type": ({"stages.rl1.steps": "many"}, "stages.rl1.steps: found 'many'"),
    "true is no number": ({"stages.rl1.steps": True}, "stages.rl1.steps: found True"),
    "later stage": ({"stages.rl1.policy": "rl2"}, "rl2 does not come before it"),
    "unknown stage": ({"stages.rl1.policy": "warmap"}, "did you mean warmup?"),
    "itself": ({"stages.rl1.policy": "rl1"}, "rl1 does not come before it"),
    "no policy": ({"stages.distill.policy": "harvest"}, "harvest makes no policy"),
    "no data": ({"stages.distill.data": "rl1"}, "rl1 makes no data"),
    "two of one name": ({"stages.rl2.name": "rl1"}, "two stages are named rl1"),
    "reserved name": ({"stages.rl2.name": "base"}, "the name base is reserved"),
    "negative weight": ({"stages.warmup.prompt_loss_weight": -0.1}, "prompt_loss_weight: found -0.1"),
    "both weights 0": (
        {"stages.warmup.prompt_loss_weight": 0.0, "stages.warmup.completion_loss_weight": 0.0},
        "are both 0",
    ),
    "a batch that does not divide": (
        {"launch.micro_batch": 3},
        "rows_per_step=32 does not divide by processes=1 x micro_batch=3 (=3)",
    ),
    "no prompt file": ({"format.prompt": "planes"}, "no prompt named 'planes'"),
    "no prompt path": ({"format.prompt": "nowhere/p.md"}, "nowhere/p.md is not there"),
    "no model": ({"model.path": "nowhere"}, "model.path: nowhere holds no config.json"),
    "two models": ({"model.hub": "org/name"}, "expected exactly one"),
    "too few rows": (
        {"stages.rl1.rows": "train[0:1]"},
        "has 1 rows, fewer than one generation batch of prompts_per_step=2",
    ),
    "rows that are no range": ({"stages.rl1.rows": "train"}, "expected a range such as train[0:1000]"),
    "rows of another split": ({"stages.rl1.rows": "held_out[0:100]"}, "held_out rows are for evaluation only"),
    "unknown kind": ({"stages.rl1.kind": "gropo"}, "did you mean grpo?"),
    "unknown problem": ({"problem": {"nmae": "scheduling"}}, "expected one of {name: scheduling}"),
    "a TRL name that is ours": ({"stages.rl1.trl": {"learning_rate": 1.0}}, "set the stage's own learning_rate"),
    "rows without demonstrations": ({"stages.distill.rows": "train[0:5]"}, "remove rows"),
    "a setting that would be overruled": ({"stages.rl1.trl": {"reward_weights": [1.0]}}, "trl.reward_weights"),
    "packing": ({"stages.warmup.trl": {"packing": True}}, "trl.packing"),
    "a setting that is no JSON": ({"stages.rl1.trl": {"x": float("nan")}}, "trl.x: found nan"),
    "a seed that numpy refuses": ({"seed": 2**32}, "seed: found 4294967296"),
    "an unknown key of one of two shapes": (
        {"problem": {"dataset": "a.jsonl", "rewards": [{"name": "accuracy", "wieght": 3}]}},
        "problem.rewards.0: unknown key 'wieght'; did you mean weight?",
    ),
    "neither shape": ({"problem": {"dataset": "a.jsonl", "rewards": [3]}}, "problem.rewards.0: found 3, expected text"),
    "a dataset that is no file and not on the hub": (
        {"problem": {"dataset": "nope", "rewards": ["accuracy"]}},
        "problem.dataset: found 'nope', expected a file whose name ends in .jsonl, or a dataset on the hub",
    ),
    "a dataset that is another file": (
        {"problem": {"dataset": "configs/demo.yaml", "rewards": ["accuracy"]}},
        "found 'configs/demo.yaml', expected a file whose name ends in .jsonl",
    ),
    "no reward": ({"problem": {"dataset": "a.jsonl", "rewards": []}}, "problem.rewards: found [], expected at least 1"),
    "a word of a mapping": (
        {"stages.rl1.rewards": {"normalise": {"score": "runing"}}},
        "rewards.normalise.score: found 'runing', expected 'none', 'group'",
    ),
    "a word": (
        {"stages.rl1.rewards": {"normalise": "runing"}},
        "rewards.normalise: found 'runing', expected 'none', 'group'",
    ),
    "a name that is no text": ({"model.lora": {"targets": [5]}}, "model.lora.targets.0: found 5, expected text"),
    "no settings": (
        {"stages.rl1.mix": "general.jsonl"},
        "stages.rl1.mix: found 'general.jsonl', expected settings, such as {data: ..., share: ...}",
    ),
    "no settings that are needed": (
        {"stages.rl1.kl": 0.1},
        "stages.rl1.kl: found 0.1, expected settings, such as {beta: ...}",
    ),
    "no mapping": ({"stages.rl1.trl": 5}, "stages.rl1.trl: found 5, expected a mapping"),
    "no list": ({"stages.rl1.rewards": {"clip": 5}}, "rewards.clip: found 5, expected a list"),
    "no duration": ({"deadline": "banana"}, "deadline: found 'banana', expected seconds, or a duration such as 90s"),
    "no stage": ({"stages": ["warmup"]}, "stages.0: found 'warmup', expected a mapping"),
    "a hub name that is none": ({"model": {"hub": "a b/c"}}, "model.hub: found 'a b/c', expected owner/name"),
    "a hub name that leads away": ({"model": {"hub": "../../x"}}, "model.hub: found '../../x', expected owner/name"),
    "more threads than any machine has": ({"launch.threads": 10**30}, "launch.threads: found 1000000"),
    "a path with NUL": ({"registry": "a\0b"}, "registry: a path holds no NUL"),
    "a pass-rate band": ({"stages.harvest.keep": {"pass_rate": [0.9, 0.1]}}, "expected two shares"),
}


@pytest.mark.parametrize("changes, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_one_line_that_says_what_was_found(changes, said, settings, write):
    for path, value in changes.items():
        set_(settings, path, value)
    with pytest.raises(BadInput) as refused:
        checks.check(recipe.load(write(settings)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value) and "more)" not in str(refused.value), "one mistake is one complaint"


def one_line(done):
    """Exit 2, nothing on stdout, one line on stderr, no traceback."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["run", "plan", "check"])
def test_a_bad_recipe_exits_2_with_one_line_from_every_command(command, settings, write):
    stage(settings, "rl1")["kl"] = {"betta": 1}
    assert "did you mean beta?" in one_line(run_cli(command, write(settings)))


def test_a_missing_recipe_is_one_line(tmp_path):
    assert "there is no such recipe file" in one_line(run_cli("run", tmp_path / "none.yaml"))


def test_broken_yaml_gives_line_and_column(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nstages: [1, 2\n")
    assert "line 3, column 1" in one_line(run_cli("run", tmp_path / "bad.yaml"))


def test_a_key_given_twice_is_an_error(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nname: y\n")
    assert "line 2, column 1: the key 'name' is given twice" in one_line(run_cli("run", tmp_path / "bad.yaml"))


def test_what_is_no_text_or_no_mapping_of_words_is_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    assert "cannot be read as text" in one_line(run_cli("plan", tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("? [1, 2]\n: 3\n")
    assert "a key must be a word" in one_line(run_cli("plan", tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no front matter", "needs front matter"),
        ("---\n- a\n---\n# system\n# user\nx", "expected a mapping"),
        ("---\na: [\n---\n# system\n# user\nx", "front matter"),
        ("---\npurpose: b\n---\n# system\n# user\n{{ prompt", "user template"),
    ],
)
def test_a_prompt_file_of_another_shape_is_one_line(text, said, settings, write, tmp_path):
    (tmp_path / "p.md").write_text(text)
    settings["format"]["prompt"] = str(tmp_path / "p.md")
    assert said in one_line(run_cli("plan", write(settings)))


def test_a_registry_that_cannot_be_written_is_one_line(settings, write):
    assert "cannot be written" in one_line(run_cli("run", write(settings), "--registry", "/proc/nowhere/r"))


@pytest.mark.parametrize(
    "arguments",
    [["--only", "rl1", "--from", "rl1"], ["--only", "rl1", "--fresh", "rl2"], ["--until", "rl1", "--fresh", "rl2"]],
)
def test_choices_that_contradict_each_other_are_one_line(arguments, settings, write, tmp_path):
    for command in ("plan", "run"):
        one_line(run_cli(command, write(settings), "--registry", tmp_path / "r", *arguments))


def test_the_bare_command_shows_help():
    done = run_cli()
    assert done.returncode == 0 and "Commands:" in done.stdout


def test_a_registry_under_a_file_is_one_line(tmp_path, settings, write):
    (tmp_path / "file").write_text("")
    assert "is a file" in one_line(run_cli("run", write(settings), "--registry", tmp_path / "file" / "registry"))


def test_an_id_cannot_leave_the_registry(tmp_path):
    assert "there is no run ../../etc" in one_line(run_cli("show", "../../etc", "--registry", tmp_path))
    assert "there is no run" in one_line(run_cli("show", "nosuch", "--registry", tmp_path))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.rl9.steps=3", "no stage is named rl9; did you mean rl"),
        ("seed", "expected a path, = and a value"),
        ("name.x=1", "has nothing inside"),
        ("stages.rl1.stepz=3", "did you mean steps?"),
        ("seed=[1", "line 1, column 3"),
    ],
)
def test_a_bad_override_is_one_line(override, said, settings, write):
    assert said in one_line(run_cli("plan", write(settings), "--set", override))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "nosuch"),
        (["plan"], "Missing argument 'recipe'"),
        (["run", "--nosuch"], "--nosuch"),
        (["plan", "configs/demo.yaml", "--only", "nosuch"], "no stage is named nosuch"),
        (["score", "arithmetic", "--rows", "x"], "Missing option '--completions'"),
        (["inspect", "configs/demo.yaml", "--stage", "warmup", "--row", "x"], "Invalid value for '--row'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, tmp_path):
    assert said in one_line(run_cli(*arguments, env={"SWITCHBACK_REGISTRY": str(tmp_path)}))


@pytest.mark.parametrize("value", [0, "", [], {"wandb": "off"}])
def test_anything_else_in_it_is_refused(value, settings, write, tmp_path):
    settings["track"] = value
    assert "track comes in a later version" in one_line(run_cli("plan", write(settings), "--registry", tmp_path / "r"))


def test_a_setting_that_is_switched_off_does_not_make_another_recipe_of_it(settings):
    """`dump` leaves out what is null, `save_every` with its default of 10m too."""
    stage(settings, "rl1")["save_every"] = None
    recipe = Recipe.model_validate(settings)
    assert is_text_of(dump(recipe), recipe)


LATER = {
    "track": ({"wandb": "offline"}, "recipe.yaml: track comes in a later version of switchback"),
    "stages.rl1.gate": ({"pass_rate": 0.2}, "stages.rl1: gate comes in a later version of switchback"),
    "stages.rl1.kl": ({"reference": "base"}, "stages.rl1.kl.reference: found 'base', expected 'policy'"),
}


@pytest.mark.parametrize("path", LATER)
def test_a_field_of_a_later_version_is_refused_in_one_line(path, settings, write, tmp_path):
    value, message = LATER[path]
    set_(settings, path, value)
    file = write(settings)
    for command in ("plan", "check", "run"):
        assert message in one_line(run_cli(command, file, "--registry", tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_an_empty_field_of_a_later_version_is_dropped(settings):
    """Recipes that earlier versions recorded hold `track: {}` and, in artifacts, `gate: null`."""
    plain = Recipe.model_validate(settings)
    settings["track"] = {}
    stage(settings, "rl1")["gate"] = None
    assert Recipe.model_validate(settings) == plain
    settings["track"] = {"wandb": None}
    assert Recipe.model_validate(settings) == plain
    assert is_text_of(f"{dump(plain)}track: {{}}\n", plain) and not is_text_of("name: x\n", plain)


def test_a_problem_of_ones_own_that_cannot_be_used_plans_and_is_refused_in_one_line(settings, write, tmp_path):
    """What user code is good for is only seen where it is run."""
    (tmp_path / "mine.py").write_text("rows = []\n")
    settings["problem"] = {"file": str(tmp_path / "mine.py")}
    file = write(settings)
    assert run_cli("plan", file, "--registry", tmp_path / "r").returncode == 0
    assert "mine.py: REWARDS is None, expected component: weight" in one_line(
        run_cli("run", file, "--registry", tmp_path / "r", "--no-prefect")
    )


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_plans_offline(config: Path, tmp_path):
    done = run_cli("plan", config, "--registry", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert {"base.evaluate", "warmup", "rl1", "harvest", "distill", "rl2", "rl2.evaluate"} <= {
        step["step"] for step in json.loads(done.stdout)
    }


def test_the_recipe_of_the_design_parses(tmp_path):
    """Every field that the documentation's example shows is known."""
    (tmp_path / "r.yaml").write_text("""
name: scheduling
seed: 0
registry: registry
model: {hub: Qwen/Qwen2.5-0.5B-Instruct, dtype: bfloat16, lora: {r: 32, alpha: 32, targets: all-linear}}
problem: {name: scheduling}
format: {prompt: scheduler, response_prefix: "<think>\\n"}
evaluate: {rows: 1000, samples: 8, temperature: 1.0}
validation: {rows: 200}
stages:
  - {name: warmup,  kind: sft,       policy: base,   data: demonstrations, prompt_loss_weight: 0.1, epochs: 3,
     rows_per_step: 32, learning_rate: 2.0e-5}
  - {name: rl1,     kind: grpo,      policy: warmup, rows: "train[0:1000]", steps: 200, prompts_per_step: 16,
     group_size: 8, max_completion_length: 512,
     learning_rate: 1.0e-6, kl: {beta: 0.001, reference: policy}}
  - {name: harvest, kind: rejection, policy: rl1,    samples: 16, keep: {min_score: 0.99, per_prompt: 2,
     pass_rate: [0.05, 0.9]}}
  - {name: distill, kind: sft,       policy: base,   data: harvest}
  - {name: rl2,     kind: grpo,      policy: distill, rows: "train[1000:2000]", steps: 200}
launch: {processes: 1}
""")
    loaded = recipe.load(tmp_path / "r.yaml")
    checks.check(loaded)
    assert loaded.stages[0].epochs == 3.0


def test_numbers_are_read_as_people_write_them(settings, write):
    loaded = recipe.load(
        write(settings), ["stages.rl1.learning_rate=5e-4", "deadline=1.5h", "stages.warmup.trl={adam_beta2: 1e-1}"]
    )
    assert (loaded.stages[1].learning_rate, loaded.deadline, loaded.stages[0].trl) == (
        5e-4,
        5400.0,
        {"adam_beta2": 0.1},
    )


def test_a_dumped_recipe_reads_back_equal(settings, write, tmp_path):
    loaded = recipe.load(write(settings))
    (tmp_path / "again.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "again.yaml") == loaded


def test_the_schema_says_of_every_field_whether_it_is_identity():
    schema = json.loads(run_cli("schema").stdout)
    assert schema["$defs"]["Kl"]["properties"]["beta"]["part"] == "identity"
    assert "Coefficient of the KL term" in schema["$defs"]["Kl"]["properties"]["beta"]["description"]
    assert schema["properties"]["launch"]["part"] == "execution"
