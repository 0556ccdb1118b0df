"""General conversations beside an sft stage's own rows: how many, which, and that everything that looks at rows sees
them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from safetensors.torch import load_file

from pipeline.registry import Registry
from stages.data import mix, sources
from stages.data.mix import Mix
from stages.errors import BadInput
from stages.inspections.preflight import look_at
from stages.job import Job, parse_rows
from stages.sft import row_metrics
from tests.conftest import ROOT, TINY, TINY_BASE, environment, run_cli, stage
from tests.models import make_tokenizer
from tests.pipeline.plan.test_identity import keys
from tests.stages.data.test_sources import FORMAT
from tests.stages.inspections.test_preflight import job, rules
from tests.stages.trl.test_resume import MIDDLE

SETTINGS = {"kind": "sft", "mix": {"data": "general.jsonl", "share": 0.2}}


def general(path, count=40, start="<think>\n"):
    """A file of questions that differ in every line."""
    lines = [
        {"prompt": f"{n} + {n}?", "completion": f"{start}{2 * n}{' and so on' * (n % 3)}"} for n in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return path


def mixed(path, tmp_path, share=0.2, seed=0, rows="train[0:50]", format=FORMAT):
    """What a stage on demonstrations loads."""
    settings = {**SETTINGS, "mix": {"data": str(path), "share": share}}
    one = job(TINY_BASE, settings, tmp_path)
    one = one.model_copy(
        update={"inputs": {**one.inputs, "mix": str(path)}, "seed": seed, "rows": parse_rows(rows, 0), "format": format}
    )
    return sources.load(one, format, make_tokenizer(), Mix(data=str(path), share=share))


@pytest.mark.parametrize("share", [0.001, 0.07, 0.2, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("own", [1, 7, 50, 1000, 99_999])
def test_the_count_makes_up_the_share(own, share):
    """Exactly: the whole number that is nearest to the one with which n / (n + own) is the share."""
    exact = Fraction(share) * own / (1 - Fraction(share))
    assert abs(mix.count(own, share) - exact) <= Fraction(1, 2) + Fraction(1, 10**6)
    assert mix.count(93, 0.07) == 7 and mix.count(50, 0.5) == 50 and mix.count(10, 0.001) == 0


def test_every_line_is_as_likely_as_another_and_none_is_drawn_twice():
    seen = Counter()
    for seed in range(2000):
        drawn = mix.drawn("s", list(range(20)), 15, 0.25, seed)
        assert len(drawn) == len(set(drawn)) == 5
        seen.update(drawn)
    assert len(seen) == 20 and all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in seen.values())


def test_a_larger_share_draws_the_same_lines_and_more():
    small, large = (set(mix.drawn("s", list(range(100)), 100, share, 3)) for share in (0.1, 0.3))
    assert small < large
    assert small != set(mix.drawn("s", list(range(100)), 100, 0.1, 4))


def test_every_pass_of_a_grpo_stage_has_an_order_of_its_own():
    """The first is that in which the rows were drawn; steps of 3 rows of 9 are passes of 3 steps."""
    passes = [[row for step in range(3) for row in mix.of_step(range(9), 3, 3 * n + step, 0)] for n in range(6)]
    assert passes[0] == [*range(9)] and all(sorted(rows) == [*range(9)] for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 6


def test_a_step_may_take_all_there_is_and_no_more():
    assert sorted(mix.drawn_by_steps("rl1", range(4), 4, 9, 0)) == [0, 1, 2, 3]
    with pytest.raises(BadInput, match="every step takes 5 rows, but its data have 4"):
        mix.drawn_by_steps("rl1", range(4), 5, 9, 0)


def test_the_rows_are_those_of_the_file_after_the_own_ones(tmp_path):
    path = general(tmp_path / "general.jsonl")
    alone = {row.row: row for row in sources.conversations(path, FORMAT, make_tokenizer())}
    loaded = mixed(path, tmp_path)
    assert len(loaded.own) == 50 and len(loaded.general) == 12  # 0.2 / 0.8 * 50 = 12.5, and halves go to the even
    assert loaded.all == loaded.own + loaded.general
    lines = [row.row.removeprefix("mix:") for row in loaded.general]
    assert lines == sorted(set(lines), key=int) and all(int(line) % 2 for line in lines), "every other line is empty"
    for line, row in zip(lines, loaded.general, strict=True):
        assert (row.ids, row.roles) == (alone[line].ids, alone[line].roles) and row.provenance == {"rule": "mix"}
    assert not any(row.provenance for row in loaded.own)
    again, other, elsewhere = (
        mixed(path, tmp_path, seed=0), mixed(path, tmp_path, seed=1), mixed(path, tmp_path, rows="train[50:100]")
    )  # fmt: skip
    assert again == loaded
    assert other.own == loaded.own and other.general != loaded.general
    assert elsewhere.own != loaded.own and elsewhere.general == loaded.general


def test_what_the_mix_weighs_is_told(tmp_path):
    loaded = mixed(general(tmp_path / "general.jsonl"), tmp_path)
    weights = dict.fromkeys(("system", "user", "template"), 0.0) | {"prefix": 1.0, "completion": 1.0}
    own, others = (
        sum(row.roles.count("p") + row.roles.count("c") for row in rows) for rows in (loaded.own, loaded.general)
    )
    found = row_metrics(loaded, weights)
    assert found["rows"] == 62 and found["mix_rows"] == 12
    assert found["mix_weight_share"] == pytest.approx(others / (own + others))
    assert "mix_rows" not in row_metrics(sources.Rows(loaded.own, []), weights)


def test_only_lines_that_are_drawn_are_read(tmp_path):
    """So a large general file costs what its share costs."""
    path = general(tmp_path / "general.jsonl")
    drawn = {int(row.row.removeprefix("mix:")) for row in mixed(path, tmp_path).general}
    lines = path.read_text().split("\n")
    lines = [line if n in drawn or not line else "{not json" for n, line in enumerate(lines, start=1)]
    path.write_text("\n".join(lines))
    assert len(mixed(path, tmp_path).general) == 12


@pytest.mark.parametrize(
    ("count", "share", "start", "said"),
    [
        (40, 0.6, "<think>\n", "takes 0.6 / (1 - 0.6) * 50 = 75 rows, but its data have 40, and no row is repeated; "
                               "add rows, or lower the share to 0.444"),
        (40, 0.005, "<think>\n", "a share of 0.005 with 50 own rows is 0.25 rows, which rounds to 0; raise the share, "
                                 "or remove mix"),
        (0, 0.2, "<think>\n", "but its data have 0, and no row is repeated; add rows"),
        (40, 0.2, "", "the response prefix is '<think>"),
    ],
)  # fmt: skip
def test_a_mix_that_cannot_be_had_is_one_line_with_the_arithmetic(count, share, start, said, tmp_path):
    path = general(tmp_path / "general.jsonl", count, start)
    with pytest.raises(BadInput) as refused:
        mixed(path, tmp_path, share)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("own", "lines"), [(32, 200), (50, 40), (1000, 1), (99_999, 40), (1, 50), (7, 3)])
def test_the_share_that_is_advised_can_be_had(own, lines):
    with pytest.raises(BadInput) as refused:
        mix.drawn("s", range(lines), own, 0.9999, 0)
    advised = float(str(refused.value).rpartition(" ")[2])
    assert 0.98 * lines <= len(mix.drawn("s", range(lines), own, advised, 0)) <= lines


def with_mix(one: Job, path) -> Job:
    return one.model_copy(update={"inputs": {**one.inputs, "mix": str(path)}})


def test_a_preflight_sees_own_and_general_rows(tmp_path):
    one = with_mix(job(TINY_BASE, SETTINGS, tmp_path), general(tmp_path / "general.jsonl"))
    assert look_at(one) == []
    other = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{n}?" * 200},
                {"role": "assistant", "content": "<think>\nYes."},
            ]
        }
        for n in range(20)
    ]
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(map(json.dumps, other)))
    heavy = look_at(one.model_copy(update={"config": {**one.config, "prompt_loss_weight": 0.5}}))
    assert rules(heavy) == ["prompt_weight_share", "row_longer_than_positions"], (
        "they weigh and they are long, but a system prompt of their own is no mistake"
    )


def test_a_preflight_tells_a_bad_mix_before_the_own_rows_are_made(tmp_path):
    """The own rows' number is not known then, but the row that every share draws is."""
    path = general(tmp_path / "general.jsonl")
    waiting = job(TINY_BASE, SETTINGS, tmp_path).model_copy(update={"problem": None, "rows": None})
    assert look_at(with_mix(waiting, path)) == []
    with pytest.raises(BadInput, match=r"general.jsonl, line \d+: the response prefix is '<think>"):
        look_at(with_mix(waiting, general(path, start="")))
    with pytest.raises(BadInput, match=r"stages.sft.mix: .*general.jsonl has no rows"):
        look_at(with_mix(waiting, general(path, 0)))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """(recipe, registry) of a warm-up with a mix and of a second one on conversations with a mix, packed."""
    directory = tmp_path_factory.mktemp("mix")
    path = general(directory / "general.jsonl")
    small = {
        **stage(TINY, "warmup"),
        "rows": "train[0:60]",
        "rows_per_step": 16,
        "mix": {"data": str(path), "share": 0.25},
    }
    packed = {
        **small,
        "name": "packed",
        "rows": None,
        "data": str(path),
        "packing": {"max_length": 256},
        "rows_per_step": 4,
    }
    settings = {**TINY, "evaluate": {"rows": 2, "samples": 1, "max_completion_length": 4}, "stages": [small, packed]}
    file = directory / "recipe.yaml"
    file.write_text(json.dumps(settings))
    done = run_cli("run", file, "--registry", directory / "registry", "--no-prefect")
    assert done.returncode == 0, done.stderr
    return file, directory / "registry"


def made(registry):
    return {artifact.stage: artifact for artifact in Registry(registry).artifacts()}


def test_a_recipe_trains_on_the_mix_and_says_so(recipe):
    """60 own rows and 0.25 / 0.75 * 60 = 20 general ones are 5 steps of 16; 40 conversations and 13 are packed."""
    artifacts = made(recipe[1])
    metrics = artifacts["warmup"].metrics
    assert (metrics["rows"], metrics["mix_rows"], metrics["sequences"], metrics["steps"]) == (80, 20, 80, 5)
    assert 0 < metrics["mix_weight_share"] < 0.25, "general answers are shorter here"
    metrics = artifacts["packed"].metrics
    assert (metrics["rows"], metrics["mix_rows"]) == (53, 13) and metrics["sequences"] < 20
    lines = (Registry(recipe[1]).path(artifacts["warmup"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_inspect_shows_general_rows_after_the_own_ones(recipe):
    own, first = (
        run_cli("inspect", recipe[0], "--stage", "warmup", "--row", row, "--registry", recipe[1]).stdout
        for row in (59, 60)
    )
    assert "warmup, row 59 of 80; over" in own and "of the weight, the last 20 rows, of the mix, " in own
    (number,) = re.findall(r"warmup, row 60 of 80 \(line (\d+) of its mix\)", first)
    line = (recipe[0].parent / "general.jsonl").read_text().split("\n")[int(number) - 1]
    shown = "".join(ast.literal_eval(text) for text in re.findall(r"completion  ('.*')", first))
    assert shown.startswith(json.loads(line)["completion"].removeprefix("<think>\n"))


def test_share_and_bytes_are_identity_and_a_name_is_not(settings, tmp_path):
    file, elsewhere = general(tmp_path / "a.jsonl"), general(tmp_path / "b.jsonl")

    def first(mixed):
        return keys({**settings, "stages": [{**stage(settings, "warmup"), "mix": mixed}]}, tmp_path)[1]

    before = first({"data": str(file), "share": 0.2})
    assert first({"data": str(elsewhere), "share": 0.2}) == before
    assert len({before, first({"data": str(file), "share": 0.3}), first(None)}) == 3
    general(elsewhere, 41)
    assert first({"data": str(elsewhere), "share": 0.2}) != before


@pytest.mark.slow
def test_a_stage_with_a_mix_that_is_killed_ends_bit_for_bit_where_it_would_have_ended(recipe, tmp_path):
    (path,) = [
        path
        for path in (recipe[1] / "work").glob("*/job.json")
        if Job.model_validate_json(path.read_text()).name == "warmup"
    ]
    scenario = {
        "name": "mix",
        "stage": "warmup",
        "job": str(path),
        "config": {"epochs": 2.0, "save_every": 2},
        "kill": MIDDLE,
    }
    command = [sys.executable, "-m", "tests.stage_crashes", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps([scenario]), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    one = json.loads(done.stdout)
    assert one["killed"] and one["differs"] == [] and one["log"] and one["kept"]


@pytest.mark.slow
def test_two_processes_train_on_the_same_mix(recipe, tmp_path):
    done = run_cli(
        "run",
        recipe[0],
        "--registry",
        tmp_path / "r",
        "--no-prefect",
        "--only",
        "warmup",
        "--set",
        "launch.processes=2",
    )
    assert done.returncode == 0, done.stderr
    one, two = made(recipe[1])["warmup"], made(tmp_path / "r")["warmup"]
    assert one.key == two.key and two.provenance["processes"] == 2 and two.metrics["mix_rows"] == 20
    a, b = (
        load_file(Registry(registry).path(artifact) / "model.safetensors")
        for registry, artifact in ((recipe[1], one), (tmp_path / "r", two))
    )
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4
