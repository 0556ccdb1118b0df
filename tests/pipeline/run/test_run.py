"""A whole climb on the real trainers, in seconds: artifacts, reuse, what the commands say of it, and how stages
fail."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cli.show.progress import Progress
from pipeline.launch.local import Launcher
from pipeline.plan import plan
from pipeline.recipe import recipe
from pipeline.registry import Registry, runs
from pipeline.run.execute import execute
from pipeline.run.run import Run
from stages.tokens import token_rows
from tests.conftest import LEARNED, ROOT, SWITCHBACK, environment, run_alone, run_cli, stage

POLICIES = ("warmup", "rl1", "distill", "rl2")
NUMBER = r"\d+\.\d"


def json_of(*arguments):
    done = run_cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_box_made_what_it_says(climbed):
    _, registry = climbed
    shown = json_of("show", "--registry", registry)
    assert shown["recipe"] == "tiny"
    assert [(one["name"], one["kind"]) for one in shown["stages"]] == [
        ("base", "base"),
        ("warmup", "sft"),
        ("rl1", "grpo"),
        ("harvest", "rejection"),
        ("distill", "sft"),
        ("rl2", "grpo"),
    ]
    for one in shown["stages"]:
        assert Path(one["path"]).is_dir() and set(one) == {
            "name",
            "kind",
            "artifact",
            "path",
            "reused",
            "seconds",
            "evaluation",
        }
        if one["name"] == "harvest":
            assert one["evaluation"] is None
        else:
            assert set(one["evaluation"]) == {
                "greedy",
                "mean",
                "interval",
                "solved",
                "format",
                "pass_at_k",
                "rows",
                "samples",
                "unscored",
            }
            assert (one["evaluation"]["rows"], one["evaluation"]["samples"], set(one["evaluation"]["pass_at_k"])) == (
                8,
                2,
                {"1", "2"},
            )


def test_a_policy_loads_as_users_load_models_and_serves_with_the_prefix(climbed):
    _, registry = climbed
    for one in json_of("show", "--registry", registry)["stages"]:
        if one["name"] in POLICIES:
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(one["path"]),
                AutoTokenizer.from_pretrained(one["path"]),
            )
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "A"}], add_generation_prompt=True, tokenize=False
            )
            assert text == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n<think>\n"
            assert model.config.vocab_size == len(tokenizer)


def test_greedy_serving_equals_the_evaluation(climbed):
    """What a user gets from the published policy by the usual two calls is what was scored."""
    _, registry = climbed
    shown = {one["name"]: one for one in json_of("show", "--registry", registry)["stages"]}
    listed = {one["stage"]: one for one in json_of("ls", "--registry", registry)}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(shown["rl2"]["path"]),
        AutoTokenizer.from_pretrained(shown["rl2"]["path"]),
    )
    for line in Path(listed["rl2.evaluate"]["path"], "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        turn = [{"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, max_new_tokens=36, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert "<think>\n" + tokenizer.decode(ids, skip_special_tokens=True) == row["greedy"]["text"]


def test_what_rejection_kept_is_what_it_sampled_prefix_included(climbed):
    _, registry = climbed
    listed = {one["stage"]: one for one in json_of("ls", "--registry", registry)}
    tokenizer = AutoTokenizer.from_pretrained(listed["rl1"]["path"])
    rollouts = [
        json.loads(line)
        for line in Path(listed["harvest"]["path"], "rollouts", "rollouts.jsonl").read_text().splitlines()
    ]
    text_of = {(one["row"], one["sample"]): one["text"] for one in rollouts if one["kept"]}
    kept = token_rows.read(Path(listed["harvest"]["path"], "data"))
    assert len(kept) == len(text_of) > 0
    for row in kept:
        start = row.roles.index("p")
        prompt, answer = row.ids[:start], row.ids[start:]
        assert answer[:2] == tokenizer("<think>\n")["input_ids"] and row.roles[start:] == "pp" + "c" * (len(answer) - 2)
        assert tokenizer.decode(answer, skip_special_tokens=True) == text_of[row.row, row.provenance["sample"]]
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n") and set(row.roles[:start]) == {"t", "u"}


def test_ls_is_oldest_first_with_absolute_paths_and_kinds(climbed):
    _, registry = climbed
    listed = json_of("ls", "--registry", registry)
    assert [set(one) for one in listed] == [{"id", "stage", "kind", "path", "created", "size"}] * 10
    assert [one["created"] for one in listed] == sorted(one["created"] for one in listed)
    assert [one["kind"] for one in listed] == [
        "evaluate",
        "sft",
        "evaluate",
        "grpo",
        "evaluate",
        "rejection",
        "sft",
        "evaluate",
        "grpo",
        "evaluate",
    ]
    for one in listed:
        assert Path(one["path"]).is_absolute() and one["size"] > 0


def test_runs_lineage_verify_and_show_say_the_same_thing_to_people(climbed):
    _, registry = climbed
    listed = {one["stage"]: one["id"] for one in json_of("ls", "--registry", registry)}
    runs = json_of("runs", "--registry", registry)
    assert set(runs[0]) == {"run", "recipe", "state", "started", "resumes"} and runs[-1]["state"] == "done"
    assert runs[-1]["run"] in run_cli("runs", "--registry", registry).stdout
    assert "10 artifacts are whole" in run_cli("verify", "--registry", registry).stdout
    tree = run_cli("lineage", listed["rl2"], "--registry", registry).stdout
    assert all(listed[name] in tree for name in ("rl2", "distill", "harvest", "rl1", "warmup")) and "tiny-base" in tree
    assert listed["rl2"] in run_cli("show", "--registry", registry).stdout
    assert "reward" in run_cli("show", listed["rl1"], "--registry", registry).stdout
    for command in (["show", "rl1"], ["export", "rl1", registry.parent / "out"]):
        refused = run_cli(*command, "--registry", registry)
        assert refused.returncode == 2
        assert re.search(r"rl1 is a stage; give one of its artifacts, of which rl1-\w{8} is the newest", refused.stderr)


def test_again_reuses_everything_and_starts_no_server(climbed):
    recipe, registry = climbed
    done = run_cli("run", recipe, "--registry", registry)
    assert done.returncode == 0
    shown = json_of("show", "--registry", registry)
    assert all(one["reused"] for one in shown["stages"])
    assert not (registry / "work" / "prefect").exists()


def test_another_kl_runs_rl2_and_its_evaluation_alone(climbed):
    recipe, registry = climbed
    override = ["--set", "stages.rl2.kl.beta=0.1"]
    before = {one["id"] for one in json_of("ls", "--registry", registry)}
    assert "kl.beta: 0.001 -> 0.1" in run_cli("plan", recipe, "--registry", registry, *override).stdout
    assert run_cli("run", recipe, "--registry", registry, "--no-prefect", *override).returncode == 0
    new = [one for one in json_of("ls", "--registry", registry) if one["id"] not in before]
    assert [one["stage"] for one in new] == ["rl2", "rl2.evaluate"]


def test_only_and_fresh_make_one_stage_again(climbed, tmp_path):
    recipe, registry = climbed[0], Path(shutil.copytree(climbed[1], tmp_path / "r"))
    done = run_cli("run", recipe, "--registry", registry, "--no-prefect", "--only", "harvest", "--fresh", "harvest")
    assert done.returncode == 0, done.stderr
    assert "harvest: replicate 1" in done.stdout
    harvests = [one for one in json_of("ls", "--registry", registry) if one["stage"] == "harvest"]
    assert len(harvests) == 2
    texts = [Path(one["path"], "rollouts", "rollouts.jsonl").read_text() for one in harvests]
    assert texts[0] != texts[1]


def says_what_came_of_it(printed: str, registry: Path) -> None:
    """The score of each policy, beside the policy that its stage started from; what became of the rollouts."""
    mean = {}
    for one in json_of("ls", "--registry", registry):
        if one["kind"] == "evaluate":
            lines = map(json.loads, Path(one["path"], "held_out.jsonl").read_text().splitlines())
            mean[one["stage"]] = {
                line["row"]: sum(each["score"] for each in line["samples"]) / len(line["samples"]) for line in lines
            }
        if one["kind"] == "rejection":
            harvest = json_of("show", one["id"], "--registry", registry)["metrics"]
    assert re.search(
        rf"^harvest +done in .*kept {harvest['kept']:.0f} of {harvest['rollouts']:.0f} rollouts", printed, re.M
    )
    for of, start in (("base", None), ("warmup", "base"), ("rl1", "warmup")):
        ours, theirs = mean[f"{of}.evaluate"], mean.get(f"{start}.evaluate", {})
        said = re.search(rf"^{of}.evaluate +mean ({NUMBER}) \({NUMBER} to {NUMBER}\)(.*)$", printed, re.M)
        assert said and float(said[1]) == pytest.approx(100 * sum(ours.values()) / len(ours), abs=0.051)
        if start is None:
            assert said[2].strip() == ""
            continue
        gain = re.fullmatch(rf", ([+-]{NUMBER}) on {start} \(([+-]{NUMBER}) to ([+-]{NUMBER})\)", said[2].strip())
        paired = [ours[row] - theirs[row] for row in ours]
        assert gain and float(gain[1]) == pytest.approx(100 * sum(paired) / len(paired), abs=0.051)
        assert float(gain[2]) <= float(gain[1]) <= float(gain[3])


def test_the_same_recipe_in_another_registry_makes_the_same_weights(climbed, write, tmp_path):
    """Bit-identity for equal execution: the model's files have equal digests."""
    _, registry = climbed
    settings = {**LEARNED, "stages": LEARNED["stages"][:3]}
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect")
    assert done.returncode == 0
    says_what_came_of_it(done.stdout, tmp_path / "r")
    for name in ("warmup", "rl1"):
        digests = []
        for place in (registry, tmp_path / "r"):
            id = next(one["id"] for one in json_of("ls", "--registry", place) if one["stage"] == name)
            files = json_of("show", id, "--registry", place)["files"]
            digests.append({file["path"]: file["sha256"] for file in files if file["path"] == "model.safetensors"})
        assert digests[0] == digests[1]


def test_the_registry_comes_from_the_option_the_recipe_the_environment_the_directory(settings, write, tmp_path):
    def root(recipe, *option, **env):
        done = run_cli("plan", recipe, "--only", "rl2", *option, cwd=tmp_path, env=env)
        return done.stderr.partition("neither in ")[2].partition(" nor")[0]

    plain = write(settings)
    assert root(plain) == str(tmp_path / "registry")
    assert root(plain, SWITCHBACK_REGISTRY="from_env") == str(tmp_path / "from_env")
    settings["registry"] = "from_recipe"
    assert root(write(settings), SWITCHBACK_REGISTRY="from_env") == str(tmp_path / "from_recipe")
    assert root(write(settings), "--registry", "from_option", SWITCHBACK_REGISTRY="from_env") == str(
        tmp_path / "from_option"
    )


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"deadline": 0.05}, 1, "killed after its deadline of 0.05 s"),
        ({"trl": {"no_such_setting": 1}}, 2, "no such setting"),
        ({"trl": {"optim": "none"}}, 2, "refuses its settings"),
    ],
)
def test_a_stage_that_fails_is_one_line_and_publishes_nothing(change, code, said, settings, write, tmp_path):
    stage(settings, "warmup").update(change)
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup")
    assert done.returncode == code and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert json_of("ls", "--registry", tmp_path / "r") == []
    assert json_of("runs", "--registry", tmp_path / "r")[0]["state"] == "failed"


def test_a_harvest_that_kept_nothing_is_said_by_the_stage_that_reads_it(settings, write, tmp_path):
    stage(settings, "harvest")["keep"] = {"min_score": 1.0}
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--until", "distill")
    assert done.returncode == 2 and "its data has no rows" in done.stderr


def test_after_a_failure_the_same_command_goes_on_from_what_is_done(settings, write, tmp_path):
    stage(settings, "rl1")["deadline"] = 0.05
    assert (
        run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--until", "rl1").returncode == 1
    )
    del stage(settings, "rl1")["deadline"]
    assert (
        run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--until", "rl1").returncode == 0
    )
    shown = {one["name"]: one["reused"] for one in json_of("show", "--registry", tmp_path / "r")["stages"]}
    assert shown["warmup"] is True and shown["rl1"] is False


def test_a_reader_that_goes_away_does_not_stop_the_run(settings, write, tmp_path):
    command = f"{SWITCHBACK} run {write(settings)} --registry {tmp_path / 'r'} --no-prefect --until warmup | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert json_of("runs", "--registry", tmp_path / "r")[0]["state"] == "done"


def test_work_in_progress_can_lie_on_another_disk(settings, write, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        env = {"SWITCHBACK_WORK": elsewhere}
        done = run_cli(
            "run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup", env=env
        )
        assert done.returncode == 0, done.stderr
        assert list(Path(elsewhere).glob("*/job.json")) and not (tmp_path / "r" / "work").exists()


def test_a_module_of_the_working_directory_is_not_taken_for_ours(settings, write, tmp_path):
    (tmp_path / "stages.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "random.py").write_text("raise SystemExit('not ours')")
    done = run_alone("run", write(settings), "--registry", "r", "--no-prefect", "--only", "warmup", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("ending", "state"), [(KeyboardInterrupt, "stopped"), (OSError, "failed")])
def test_a_run_whose_end_is_interrupted_says_how_it_ended(ending, state, climbed, tmp_path):
    """A signal may come while the launcher ends its processes."""
    loaded = recipe.load(climbed[0])
    place = Registry(Path(shutil.copytree(climbed[1], tmp_path / "r")))

    class Interrupted(Run):
        def __enter__(self) -> Run:
            super().__enter__()
            self.launcher = Interrupting()
            return self

    class Interrupting(Launcher):
        def close(self) -> None:
            raise ending

    with pytest.raises(ending), Interrupted(loaded, plan.plan(loaded, place), place, Progress()) as run:
        pass
    assert runs.state(place, run.id) == state


def test_two_runs_at_once_share_what_both_need(settings, write, tmp_path):
    """The second waits for the step that the first is making, and reuses it."""
    settings["evaluate"]["rows"] = 600
    recipe = write(settings)
    command = [
        str(SWITCHBACK),
        "run",
        str(recipe),
        "--registry",
        str(tmp_path / "r"),
        "--no-prefect",
        "--until",
        "warmup",
    ]
    both = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [one["stage"] for one in json_of("ls", "--registry", tmp_path / "r")] == [
        "base.evaluate",
        "warmup",
        "warmup.evaluate",
    ]
    assert any("waits for process" in out for out, _ in said)


def test_every_step_tells_how_far_it_is(settings, write, tmp_path):
    """The shortest job too: its last line of metrics reaches the terminal."""
    heard: list[tuple[str, int, int]] = []

    class Ear(Progress):
        def logged(self, step, line):
            heard.append((step.name, line["step"], line["total"]))

    loaded = recipe.load(write(settings))
    place = Registry(tmp_path / "r")
    with Ear() as ear:
        execute(loaded, plan.plan(loaded, place), place, ear, use_prefect=False)
    last = {name: (step, total) for name, step, total in heard}
    assert last["warmup"] == (16, 16) and last["rl1"] == last["rl2"] == (2, 2)
    assert last["harvest"] == (16, 16) and last["base.evaluate"] == (24, 24)


def test_the_micro_batch_is_execution_and_changes_nothing_but_rounding(climbed, write, tmp_path):
    _, registry = climbed
    settings = {**LEARNED, "launch": {"threads": 1, "micro_batch": 4}}
    assert (
        run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--until", "rl1").returncode == 0
    )
    for name, metric in (("warmup", "completion_loss"), ("rl1", "entropy")):
        values = []
        for place in (registry, tmp_path / "r"):
            found = next(one for one in json_of("ls", "--registry", place) if one["stage"] == name)
            shown = json_of("show", found["id"], "--registry", place)
            values.append((shown["key"], shown["metrics"][metric]))
        assert values[0][0] == values[1][0] and values[0][1] == pytest.approx(values[1][1], rel=0.01)


def test_verify_exits_1_and_names_a_changed_file(settings, write, tmp_path):
    assert (
        run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--until", "warmup").returncode
        == 0
    )
    path = next(one["path"] for one in json_of("ls", "--registry", tmp_path / "r") if one["stage"] == "warmup")
    Path(path, "config.json").write_text("{}")
    done = run_cli("verify", "--registry", tmp_path / "r")
    assert done.returncode == 1 and "config.json" in done.stdout and "Traceback" not in done.stderr
    planned = json_of("plan", write(settings), "--registry", tmp_path / "r", "--until", "warmup")
    assert {one["step"]: one["action"] for one in planned}["warmup"] == "run", "what failed verification is made again"
