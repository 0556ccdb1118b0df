"""Export: what leaves the registry is whole, is what was published, needs no switchback, and says what it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from pipeline.errors import Failed
from pipeline.export import card, export
from pipeline.registry import Registry, Source
from pipeline.registry.aliases import set_to
from stages.errors import BadInput
from stages.job import Format
from stages.tokens import token_rows
from tests.conftest import ROOT, SWITCHBACK, environment, run_cli, tensors
from tests.pipeline.registry.test_registry import OWNER, draft, finished


def newest(registry: Registry, stage: str):
    return registry.artifacts(stage)[-1]


def exported(place: Path, stage: str, directory: Path) -> Path:
    done = run_cli("export", newest(Registry(place), stage).id, directory, "--registry", place)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def policy(climbed, tmp_path_factory):
    return exported(climbed[1], "rl2", tmp_path_factory.mktemp("export") / "rl2")


def test_an_exported_policy_loads_and_serves_as_the_registrys_own_copy(policy, climbed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    registry = Registry(climbed[1])
    own = registry.path(newest(registry, "rl2"))
    messages = [{"role": "user", "content": "A 9:00-10:00"}]
    texts = [
        AutoTokenizer.from_pretrained(place).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for place in (policy, own)
    ]
    assert texts[0] == texts[1] and texts[0].endswith("assistant\n<think>\n")
    a, b = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (policy, own))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_what_is_of_the_registry_stays_there(policy, climbed):
    registry = Registry(climbed[1])
    published = {file.path for file in newest(registry, "rl2").files}
    found = {path.relative_to(policy).as_posix() for path in policy.rglob("*") if path.is_file()}
    log = {"rollouts/rollouts.jsonl", "rollouts/card.json"}
    assert log < published and found == published - {"metrics.jsonl", *log} | {"README.md"}
    assert "additional_chat_templates/training.jinja" in found and "artifact.json" not in found


def test_a_loss_map_is_no_part_of_a_model(climbed, tmp_path):
    assert not (exported(climbed[1], "warmup", tmp_path / "warmup") / "loss_map.json").exists()


def test_the_hub_reads_the_front_matter(policy):
    from huggingface_hub import ModelCard

    found = ModelCard.load(policy / "README.md").data.to_dict()
    assert found == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["switchback", "trl", "grpo"]
    }  # fmt: skip


def test_the_card_tells_scores_with_their_interval_n_seeds_and_decoding(policy, climbed):
    registry = Registry(climbed[1])
    evaluation = json.loads(registry.path(newest(registry, "rl2.evaluate"), "held_out").read_text())
    low, high = (f"{100 * end:.1f}" for end in evaluation["interval"])
    lines = [line for line in (policy / "README.md").read_text().splitlines() if line.startswith("| rl2 | held_out")]
    assert len(lines) == 1
    cells = [cell.strip() for cell in lines[0].split("|")]
    assert cells[3:6] == [f"{100 * evaluation['greedy']:.1f}", f"{100 * evaluation['mean']:.1f}", f"{low} - {high}"]
    assert cells[-4:-1] == ["8 x 2", "0", "temperature 1.0, at most 36 tokens"]


def test_the_card_has_a_line_of_scores_for_the_base_and_each_policy_on_the_way(policy):
    rows = [line.split("|")[1:3] for line in (policy / "README.md").read_text().splitlines() if "held_out |" in line]
    assert [name.strip() for name, _ in rows] == ["base", "warmup", "rl1", "distill", "rl2"]


def test_the_card_tells_lineage_recipe_format_and_versions(policy, climbed):
    registry, text = Registry(climbed[1]), (policy / "README.md").read_text()
    for stage in ("warmup", "rl1", "harvest", "distill", "rl2"):
        assert f"`{newest(registry, stage).id}` (" in text
    base = newest(registry, "warmup").inputs["policy"]
    assert f"policy: `tiny-base`, digest `{base.key}`" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert [stage["name"] for stage in recipe["stages"]] == ["warmup", "rl1", "harvest", "distill", "rl2"]
    assert '`"<think>\\n"`' in text and "| trl | 1." in text and "| switchback that exported it |" in text


@pytest.mark.parametrize("stage", ["rl2", "harvest"])
def test_a_card_tells_nothing_of_the_machine(stage, climbed, tmp_path):
    text = (exported(climbed[1], stage, tmp_path / stage) / "README.md").read_text()
    for secret in (str(climbed[1]), str(ROOT), str(Path.home()) + "/", f" {socket.gethostname()} "):
        assert secret not in text
    assert not yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0]).keys() & {
        "registry",
        "launch",
        "track",
    }


def test_data_are_exported_as_a_data_set(climbed, tmp_path, monkeypatch):
    from datasets import load_dataset

    registry = Registry(climbed[1])
    directory = exported(climbed[1], "harvest", tmp_path / "harvest")
    assert {path.name for path in directory.iterdir()} == {"README.md", token_rows.FILE, "card.json"}
    published = registry.path(newest(registry, "harvest"), "data")
    assert (directory / token_rows.FILE).read_bytes() == (published / token_rows.FILE).read_bytes()
    rows = load_dataset(str(directory), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["ids"] == [row.ids for row in token_rows.read(published)]


def harvest(tmp_path):
    """(registry, artifact) of a rejection stage that kept one completion and drew another as its control."""
    registry, out = Registry(tmp_path / "registry"), tmp_path / "out"
    for output, answer in {"data": 7, "control": 8}.items():
        token_rows.write(out / output, [token_rows.TokenRow("r", [1, answer], "uc")], {"of": output})
    (out / "rollouts").mkdir()
    (out / "rollouts" / "rollouts.jsonl").write_text("{}\n")
    outputs = {"data": "data", "rollouts": "rollouts", "control": "control"}
    made = draft(stage="harvest").model_copy(update={"kind": "rejection", "outputs": outputs})
    return registry, registry.publish(out, made, OWNER).artifact


@pytest.fixture
def drawn(tmp_path):
    return harvest(tmp_path)


@pytest.mark.parametrize(("output", "answer"), [("", 7), (":data", 7), (":control", 8)])
def test_an_output_is_exported_by_its_name(output, answer, drawn, tmp_path):
    artifact, found = export.named(drawn[0], drawn[1].id + output)
    export.export(drawn[0], artifact, tmp_path / "x", found)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["README.md", "card.json", token_rows.FILE]
    assert [row.ids for row in token_rows.read(tmp_path / "x")] == [[1, answer]]
    text = (tmp_path / "x" / "README.md").read_text()
    assert ("# harvest:control\n" in text) == ("drew at random" in text) == (answer == 8)
    assert ("# harvest\n" in text) == ("sampled and kept" in text) == (answer == 7)


def test_a_control_is_exported_by_an_alias_too(drawn, tmp_path):
    registry, artifact = drawn
    set_to(registry, "best", artifact)
    done = run_cli("export", "best:control", tmp_path / "x", "--registry", registry.url)
    assert done.returncode == 0 and done.stdout.startswith(f"{artifact.id}:control is in ")


@pytest.mark.parametrize("output", ["rollouts", "policy", "nothing", ""])
def test_an_output_that_cannot_be_exported_is_refused_with_those_that_can(output, drawn):
    id = drawn[1].id
    with pytest.raises(BadInput) as refused:
        export.named(drawn[0], f"{id}:{output}")
    assert str(refused.value) == f"{id}:{output} cannot be exported; expected {id}:data or {id}:control"


def test_an_adapter_goes_with_its_policy_and_other_outputs_do_not(tmp_path):
    out = finished(tmp_path / "out")
    (out / "adapter").mkdir()
    (out / "adapter" / "adapter_model.safetensors").write_bytes(tensors("a"))
    registry = Registry(tmp_path / "registry")
    outputs = {"policy": ".", "adapter": "adapter", "data": "data"}
    artifact = registry.publish(out, draft().model_copy(update={"outputs": outputs}), OWNER).artifact
    done = export.export(registry, artifact, tmp_path / "x")
    assert [str(path) for path in done.files] == ["README.md", "adapter/adapter_model.safetensors", "model.safetensors"]
    text = (tmp_path / "x" / "README.md").read_text()
    assert "- lora\n" in text and "It was not evaluated" in text and "no longer in the registry" in text


@pytest.fixture
def small(tmp_path):
    """(registry, artifact) without a climb."""
    registry = Registry(tmp_path / "registry")
    return registry, registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact


def test_an_empty_directory_is_filled(small, tmp_path):
    (tmp_path / "x").mkdir()
    assert export.export(*small, tmp_path / "x").directory == tmp_path / "x"
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == tensors("weights")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("full", "not an empty directory"),
        ("file", "not an empty directory"),
        ("file/x", "file: File exists; nothing was exported"),
        ("registry/artifacts/x", "lies in the registry"),
    ],
)
def test_a_directory_that_cannot_be_had_is_refused_in_one_line(where, said, small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = run_cli("export", small[1].id, tmp_path / where, "--registry", small[0].url)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_working_directory_is_refused(small, tmp_path):
    (tmp_path / "here").mkdir()
    done = run_cli("export", small[1].id, ".", "--registry", small[0].url, cwd=tmp_path / "here")
    assert done.returncode == 2 and "is the working directory" in done.stderr


@pytest.mark.parametrize("damage", ["one byte", "gone"])
def test_a_damaged_artifact_is_not_exported_and_nothing_is_left(damage, small, tmp_path):
    registry, artifact = small
    path = registry.path(artifact) / "model.safetensors"
    path.write_text("weightz") if damage == "one byte" else path.unlink()
    before = sorted(tmp_path.iterdir())
    done = run_cli("export", artifact.id, tmp_path / "x", "--registry", registry.url)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{artifact.id}/model.safetensors" in done.stderr and "nothing was exported" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_scores_that_are_no_longer_what_was_published_are_not_told(climbed, tmp_path):
    registry = Registry(shutil.copytree(climbed[1], tmp_path / "registry"))
    path = registry.path(newest(registry, "rl2.evaluate"), "held_out")
    path.write_text(path.read_text().replace('"greedy": 0.', '"greedy": 1.'))
    with pytest.raises(Failed, match=r"held_out\.json: its bytes are not"):
        export.export(registry, newest(registry, "rl2"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_artifact_that_is_void_or_holds_no_model_is_refused(small, climbed, tmp_path):
    registry, artifact = small
    registry.void(artifact, "a test")
    with pytest.raises(BadInput, match="is void"):
        export.export(registry, artifact, tmp_path / "x")
    with pytest.raises(BadInput, match="neither a policy nor data"):
        export.export(Registry(climbed[1]), newest(Registry(climbed[1]), "rl2.evaluate"), tmp_path / "x")


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path):
    """SIGKILL in the middle of the copy; the next one works."""
    registry, out = Registry(tmp_path / "registry"), finished(tmp_path / "out")
    with (out / "zzz.parquet").open("wb") as file:
        file.truncate(256 * 2**20)
    artifact = registry.publish(out, draft(), OWNER).artifact
    arguments = ["export", artifact.id, str(tmp_path / "x"), "--registry", registry.url]
    process = subprocess.Popen([SWITCHBACK, *arguments], env=environment())
    while not list(tmp_path.glob(".x.*/zzz.parquet")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "x").exists() and len(list(tmp_path.glob(".x.*.partial"))) == 1
    assert run_cli(*arguments).returncode == 0
    assert (tmp_path / "x" / "zzz.parquet").stat().st_size == 256 * 2**20


def test_json_tells_what_was_written(small, tmp_path):
    done = run_cli("export", small[1].id, tmp_path / "x", "--registry", small[0].url, "--json")
    said = json.loads(done.stdout)
    assert (said["id"], said["path"]) == (small[1].id, str(tmp_path / "x"))
    assert said["files"] == ["README.md", "model.safetensors"]
    assert said["size"] == sum((tmp_path / "x" / name).stat().st_size for name in said["files"])


@pytest.mark.parametrize("text", ["plain", "```\nfence\n```", "`````"])
def test_a_block_of_code_holds_whatever_is_in_it(text):
    first, *inner, last = card.fenced(text).splitlines()
    assert "\n".join(inner) == text and first == last and first not in inner


def test_a_base_model_from_the_hub_is_named_as_the_hub_wants_it(tmp_path):
    registry = Registry(tmp_path / "registry")
    base = Source(id=None, output="policy", key="k", name="hf://org/model@abc")
    artifact = registry.publish(finished(tmp_path / "out"), draft(inputs={"policy": base}), OWNER).artifact
    text = card.card(registry, artifact, "policy")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/model"
    assert "`org/model@abc`" in text


EVIL = "`x` ``y`` | <img src=x onerror=alert(1)> [a](javascript:b) &lt; \u202e\n| a | b |\n# heading"


def rendered_html(text):
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])


@pytest.mark.parametrize(
    "provenance",
    [
        {"versions": ["trl"]},
        {"versions": 3},
        {"versions": {"trl": ["1"]}},
        {"versions": {EVIL: EVIL, "trl": "1.16"}},
        {"versions": {"trl": "x" * 5000}},
        {"run": ["a"], "device": {"a": 1}, "threads": [1], "seconds": None},
        {"run": "../../../etc/passwd", "device": EVIL},
        {"run": EVIL},
    ],
)
def test_a_card_of_a_foreign_manifest_is_text_and_no_markup(provenance, tmp_path):
    """Oracle: what a CommonMark renderer makes of it, with HTML let through."""
    plain = card.card(*hostile(tmp_path / "a", {}, "x"), "policy")
    text = card.card(*hostile(tmp_path / "b", provenance, EVIL), "policy")
    made, expected = rendered_html(text), rendered_html(plain)
    for tag in ("<img", "<a ", "<h1>", "<h2>", "<table>", "<pre>"):
        assert made.count(tag) == expected.count(tag), (tag, text)
    around = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert around.replace("\n", "").isprintable()


def hostile(directory, provenance, words):
    """(registry, artifact) as somebody else may have written it."""
    format = Format(
        prompt="p",
        prompt_digest="",
        system_prompt=words,
        user_template=words,
        response_prefix=words,
        training_template=words,
    )
    line = words.replace("\n", " ").replace("\u202e", "")
    source = Source(id=None, output="policy", key=line, name=line)
    made = draft(inputs={"policy": source}).model_copy(
        update={"kind": line, "format": format, "provenance": provenance, "metrics": {line: 1.0}, "identity": {
            "problem": words, "rows": words, "seed": words}, "config": {"a": words}}
    )  # fmt: skip
    registry = Registry(directory / "registry")
    return registry, registry.publish(finished(directory / "out"), made, OWNER).artifact


@pytest.mark.parametrize("content", ["[1]", "a: &a [*a]", "[" * 3000 + "]" * 3000, "!!int x", "\xff", "3", ""])
def test_a_recipe_of_a_foreign_run_that_is_none_is_left_out(content, tmp_path):
    registry, artifact = hostile(tmp_path, {"run": "demo-1"}, "x")
    registry.store.put_new("runs/demo-1/events/000001.json", {})
    (registry.store.root / "runs" / "demo-1" / "recipe.yaml").write_text(content, encoding="latin-1")
    text = card.card(registry, artifact, "policy")
    assert "no longer in the registry" in text


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`a", "a ", " ", "a\nb", "a|b"])
def test_inline_code_holds_whatever_is_in_it(text):
    from markdown_it import MarkdownIt

    (inline,) = [token for token in MarkdownIt().parse(f"x {card.coded(text)} y") if token.type == "inline"]
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    assert inline.children[1].content.strip() == text.replace("\n", "\\n").strip()
