"""The numbers, the text and the paths of a recipe are read as a user means them, on every machine."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.recipe import recipe
from pipeline.registry.workdir import work_root
from stages.errors import BadInput
from tests.conftest import ROOT, TINY_BASE, printed_json, run_alone, run_cli, stage
from tests.pipeline.recipe.test_recipe import one_line, set_

READ_AS = {
    **{"0": 0, "-3": -3, "+4": 4, "12": 12, "0x1F": 31, "0o17": 15},
    **{
        "1.5": 1.5,
        ".5": 0.5,
        "1.": 1.0,
        "1e-4": 1e-4,
        "1E5": 1e5,
        "1.5e3": 1.5e3,
        "-.5e-3": -0.5e-3,
        "-.inf": -math.inf,
    },
    **{
        word: word
        for word in ("10:00", "190:20:30", "1:30.5", "010", "08", "010.5", "1_000", "0b11", "2026-12-01", "=")
    },
    **{"true": True, "no": False, "null": None},
}
"""A plain scalar -> what it is. YAML 1.1 reads 10:00 as 600, 010 as 8 and 1_000 as 1000."""


@pytest.mark.parametrize(("written", "value"), READ_AS.items(), ids=READ_AS)
def test_a_plain_scalar_is_what_yaml_1_2_says(written, value, settings, write):
    settings["stages"][0]["trl"] = {"x": "PLACE"}
    path = write(settings)
    path.write_text(path.read_text().replace("PLACE", written))
    if isinstance(value, float) and math.isinf(value):
        with pytest.raises(BadInput, match="found -inf"):  # read as a number, and refused as one
            recipe.load(path)
        return
    found = recipe.load(path).stages[0].trl["x"]
    assert (found, type(found)) == (value, type(value))


def test_what_a_recipe_is_recorded_as_is_read_as_the_same(settings, write):
    """Numbers, and texts that look like numbers."""
    rng = random.Random(0)
    numbers = [rng.choice((1, -1)) * 10 ** rng.uniform(-320, 300) for _ in range(300)]
    numbers += [rng.randrange(-(10**18), 10**18) for _ in range(300)]
    settings["stages"][0]["trl"] = {"numbers": numbers, "texts": [*READ_AS, *map(str, numbers)]}
    loaded = recipe.load(write(settings))
    assert recipe.parse(recipe.dump(loaded), "recorded") == loaded


def test_a_time_of_day_is_no_number_of_steps(settings, write):
    stage(settings, "warmup")["save_every"] = "TIME"
    path = write(settings)
    path.write_text(path.read_text().replace("TIME", "10:00"))
    assert "stages.warmup.save_every: found '10:00', expected a number of steps" in one_line(run_cli("plan", path))


# text


@pytest.fixture
def accents(settings, write, tmp_path):
    """A recipe whose prompt has letters beyond ASCII."""
    text = "---\npurpose: accents\n---\n# system\nRéponds: trie les chiffres — 数字\n# user\n{{ prompt }}\n"
    (tmp_path / "p.md").write_text(text, encoding="utf-8")
    settings["format"]["prompt"] = str(tmp_path / "p.md")
    return write(settings)


def keys(path: Path, **env: str) -> list[str]:
    done = run_alone("plan", path, "--json", cwd=path.parent, env=env)
    assert done.returncode == 0, done.stderr
    return [step["key"] for step in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory) -> dict[str, str]:
    """The variables of an 8-bit locale, in which Python reads text as Latin-1."""
    place = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no localedef")
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", place / "en_US.ISO-8859-1"], capture_output=True)
    if not (place / "en_US.ISO-8859-1").is_dir():
        pytest.skip("localedef has no en_US")
    return {"LOCPATH": str(place), "LC_ALL": "en_US.ISO-8859-1"}


ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
READS_A_FILE = """
from pathlib import Path
REWARDS = {"any": 1.0}
WORDS = Path("WORDS").read_text()
def rows(rng): return ({"prompt": f"{WORDS} {number}"} for number in range(2000))
def rewards(row, completion): return {"any": 1.0}
def score(row, completion): return 1.0
"""


def test_a_locale_without_utf_8_changes_no_key(accents, latin_1):
    assert keys(accents, **ASCII_ONLY) == keys(accents, **latin_1) == keys(accents, LC_ALL="C.UTF-8")


def test_user_code_reads_a_file_as_utf_8_in_every_locale(latin_1, settings, write, tmp_path):
    (tmp_path / "words.txt").write_text("trié — 数字", encoding="utf-8")
    (tmp_path / "mine.py").write_text(READS_A_FILE.replace('WORDS"', f'{tmp_path / "words.txt"}"'))
    settings["problem"] = {"file": str(tmp_path / "mine.py"), "files": [str(tmp_path / "words.txt")]}
    shown = run_alone("rows", write(settings), "--split", "train[0:1]", cwd=tmp_path, env=latin_1)
    assert shown.returncode == 0 and json.loads(shown.stdout)["prompt"].startswith("trié — 数字"), shown


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_byte_order_mark_and_crlf_change_no_key(change, accents, settings):
    plain = [step["key"] for step in printed_json("plan", accents, "--json")]
    for file in (accents, accents.parent / "p.md"):
        file.write_bytes(change(file.read_text(encoding="utf-8")).encode())
    assert [step["key"] for step in printed_json("plan", accents, "--json")] == plain


# paths


PATHS = {
    "model.path": "~/base",
    "registry": "~/r",
    "work.mirror": "~/m",
    "launch.accelerate": "~/a.yaml",
    "format.prompt": "~/p.md",
    "format.chat_template": "~/t.jinja",
    "problem.file": "~/p.py",
    "problem.files": ["~/f.txt"],
    "stages.warmup.data": "~/c.jsonl",
    "stages.rl1.mix": {"data": "~/c.jsonl", "share": 0.5},
    "stages.rl1.format": {"prompt": "~/p.md"},
}
"""Every field that holds a path."""


def test_a_tilde_is_the_home_in_every_path(settings, write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings["problem"] = {}
    del stage(settings, "warmup")["rows"]
    for path, value in PATHS.items():
        set_(settings, path, value)
    loaded = json.dumps(recipe.load(write(settings)).model_dump(mode="json"))
    assert "~" not in loaded and loaded.count(f'"{tmp_path}/') == len(PATHS)
    settings["problem"] = {"dataset": "~/d.jsonl", "rewards": ["~/r.py:good", {"name": "~/s.py:fine"}]}
    loaded = json.dumps(recipe.load(write(settings)).model_dump(mode="json"))
    assert "~" not in loaded and loaded.count(f'"{tmp_path}/') == len(PATHS) - 2 + 3


def test_a_tilde_is_the_home_on_the_command_line_and_in_the_environment(climbed, tmp_path, monkeypatch):
    home = climbed[1].parent
    found = printed_json("ls", "--registry", climbed[1], "--json")
    for arguments, env in ((["--registry=~/registry"], {}), ([], {"SWITCHBACK_REGISTRY": "~/registry"})):
        done = run_cli("ls", *arguments, "--json", cwd=tmp_path, env={"HOME": str(home), **env})
        assert json.loads(done.stdout) == found and not list(tmp_path.iterdir())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWITCHBACK_WORK", "~/work")
    assert work_root(None) == tmp_path / "work"  # pyright: ignore[reportArgumentType] - not asked for


@pytest.mark.parametrize("path", ["${HOME}/r", "$SCRATCH/r", "a/${USER}", "~no-such-user/r"])
def test_a_path_that_is_not_expanded_is_refused_and_makes_no_directory(path, settings, write, tmp_path):
    before = sorted(tmp_path.iterdir())
    for place in ("registry", "model.path", "work.mirror"):
        said = one_line(run_cli("plan", write(settings), "--set", f"{place}={path}", cwd=tmp_path))
        assert f"{place}: " in said and f"found {path!r}, expected a path" in said
    assert f"found {path!r}" in one_line(run_cli("ls", f"--registry={path}", cwd=tmp_path))
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "recipe.yaml"]


def test_a_price_in_a_file_name_is_no_variable(settings, write, tmp_path):
    (tmp_path / "5$.md").write_text((ROOT / "prompts" / "plain.md").read_text())
    settings["format"]["prompt"] = str(tmp_path / "5$.md")
    assert run_cli("plan", write(settings)).returncode == 0
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["model"]["path"] == str(TINY_BASE)
