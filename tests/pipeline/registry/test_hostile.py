"""A registry that somebody else wrote into: what is not what switchback writes is refused, in one line that names it,
before anything of it is used."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
from safetensors import SafetensorError, safe_open

from pipeline.cli import exit_code
from pipeline.registry import Artifact, Registry, UnsafeFile
from pipeline.registry.keys import key_of
from pipeline.registry.verify import verify
from stages.errors import BadInput
from tests.conftest import environment, tensors

DIGEST = "0" * 64


def finished(directory):
    (directory / "data").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(tensors("weights"))
    (directory / "data" / "rows.jsonl").write_text("{}\n")
    return directory


def draft(name="k", stage="warmup"):
    return Artifact(
        id="",
        key=key_of({"name": name}),
        kind="sft",
        stage=stage,
        created="",
        outputs={"policy": ".", "data": "data"},
        files=(),
        inputs={},
        format=None,
        config={},
        identity={"name": name},
        metrics={"loss": 1.0},
        provenance={},
    )


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture
def artifact(registry, tmp_path):
    return registry.publish(finished(tmp_path / "out"), draft(), "user").artifact


def one_line(error, *named):
    """What a user would read."""
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000 and all(name in line for name in named), line


def rewrite(registry, artifact, content):
    """The manifest, as somebody else would have it."""
    path = registry.path(artifact) / "artifact.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


OUTSIDE = [
    "",
    "/",
    "/etc/passwd",
    "//etc/passwd",
    "..",
    "../x.json",
    "../../etc/x.json",
    "a/../x.json",
    "a/../../x.json",
    "a/..",
    "./a.json",
    "a/./b.json",
    "a//b.json",
    "a/",
    "/a.json",
    "a\\b.json",
    "..\\x.json",
    "C:\\x.json",
    "a\0.json",
    "\0",
    "a\n.json",
    "a.json\n",
    "a\r.json",
    "a\t.json",
    "\x1b[2Ja.json",
    "a\x7f.json",
    "a\x85.json",
    "a\u2028b.json",
    "a\u202egnp.json",
    "a\u200b.json",
    "\ufeffa.json",
    "x" * 1100 + ".json",
    "a/" * 600 + "b.json",
]
"""Paths that leave an artifact, or that mean something else elsewhere."""
NO_KIND = [
    ".",
    "a",
    "a.py",
    "a.pkl",
    "a.pt",
    "a.bin",
    "a.json.exe",
    ".json",
    "d/.jsonl",
    "a.JSON",
    "a.json ",
    "a.so",
    "json",
]
"""Names of no kind of file that an artifact holds."""
CLASHES = [
    ["model.safetensors"],
    ["Model.safetensors"],
    ["artifact.json"],
    ["a.json", "A.json"],
    ["é.json", "e\u0301.json"],
    ["straße.json", "STRASSE.json"],
    ["ﬁ.json", "fi.json"],
    ["data/Rows.jsonl"],
    ["Data/x.json"],
    ["x.json", "x.json/y.json"],
    ["X.json", "x.json/y.json"],
    ["artifact.json/x.json"],
    ["Artifact.json"],
    ["d/e/a.json", "d/E/b.json"],
    ["Σ.json", "ς.json"],
]
"""Files beside model.safetensors and data/rows.jsonl that are one with another where case or accents do not count."""


def ids(values):
    return [ascii(value)[:40] for value in values]


@pytest.mark.parametrize("path", OUTSIDE + NO_KIND, ids=ids(OUTSIDE + NO_KIND))
def test_a_file_under_a_path_that_is_not_safe_is_refused(path, registry, artifact):
    manifest = json.loads(artifact.model_dump_json())
    manifest["files"].append({"path": path, "size": 1, "sha256": DIGEST})
    rewrite(registry, artifact, manifest)
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


@pytest.mark.parametrize(
    "path", [*OUTSIDE, "nosuch", "dat", "data/rows"], ids=ids([*OUTSIDE, "nosuch", "dat", "data/rows"])
)
def test_an_output_that_is_not_in_the_artifact_is_refused(path, registry, artifact):
    manifest = json.loads(artifact.model_dump_json())
    rewrite(registry, artifact, {**manifest, "outputs": {"policy": path}})
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


@pytest.mark.parametrize("paths", CLASHES, ids=ids(CLASHES))
def test_names_that_are_one_on_another_file_system_are_refused(paths, registry, artifact):
    manifest = json.loads(artifact.model_dump_json())
    manifest["files"] += [{"path": path, "size": 1, "sha256": DIGEST} for path in paths]
    rewrite(registry, artifact, manifest)
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id, "case and accents do not count")


CHANGED = [
    {"id": "warmup-00000000"},
    {"id": ""},
    {"id": "../x"},
    {"id": 3},
    {"id": None},
    {"id": "warmup-1234567\n"},
    {"stage": "rl1"},
    {"stage": ""},
    {"stage": "a\x1b[31m"},
    {"key": ""},
    {"key": "0" * 63},
    {"key": "G" * 64},
    {"key": "A" * 64},
    {"key": DIGEST + "\n"},
    {"key": 1},
    {"key": None},
    {"kind": "a\nb"},
    {"kind": ["sft"]},
    {"created": "\x00"},
    {"created": 1},
    {"created": "x" * 5000},
    {"outputs": []},
    {"outputs": {"a\n": "."}},
    {"outputs": {"policy": 1}},
    {"files": {}},
    {"files": [1]},
    {"files": [[]]},
    {"files": None},
    {"inputs": {"policy": {}}},
    {"inputs": []},
    {"metrics": {"loss": "NaN"}},
    {"metrics": {"loss": None}},
    {"metrics": {"\x1b]0;": 1.0}},
    {"metrics": []},
    {"identity": []},
    {"identity": None},
    {"config": 1},
    {"format": {}},
    {"format": 1},
    {"provenance": []},
    {"unknown": 1},
    {"unkn\x1b[2Jown": 1},
]
FILES = [
    {"size": -1},
    {"size": 1.5},
    {"size": "1"},
    {"size": True},
    {"size": None},
    {"size": 2**63},
    {"size": 10**400},
    {"sha256": ""},
    {"sha256": "0" * 65},
    {"sha256": "z" * 64},
    {"sha256": None},
    {"sha256": DIGEST.replace("0", "A")},
    {"mode": 0o777},
    {"path": None},
    {"path": ["a.json"]},
]
SOURCES = [
    {"id": "../../etc"},
    {"id": "/etc"},
    {"id": "x"},
    {"id": ""},
    {"id": 1},
    {"name": "\x1b[2J"},
    {"name": None},
    {"digest": "x"},
    {"output": "a\n"},
    {"key": None},
    {"more": 1},
]


@pytest.mark.parametrize("change", CHANGED, ids=ids(CHANGED))
def test_a_manifest_with_a_field_that_is_none_is_refused(change, registry, artifact):
    rewrite(registry, artifact, {**json.loads(artifact.model_dump_json()), **change})
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


@pytest.mark.parametrize("change", FILES, ids=ids(FILES))
def test_a_manifest_with_a_file_that_is_none_is_refused(change, registry, artifact):
    manifest = json.loads(artifact.model_dump_json())
    manifest["files"][0] |= change
    rewrite(registry, artifact, manifest)
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


@pytest.mark.parametrize("change", SOURCES, ids=ids(SOURCES))
def test_a_manifest_with_an_input_that_is_none_is_refused(change, registry, artifact):
    source = {"id": artifact.id, "output": "policy", "key": "k", "name": "warmup", "digest": None, **change}
    rewrite(registry, artifact, {**json.loads(artifact.model_dump_json()), "inputs": {"policy": source}})
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


NO_MANIFEST = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "text": b'"x"',
    "not UTF-8": b'{"id": "\xff"}',
    "a torn one": b'{"id": "warmup',
    "deep": b'{"config": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"config": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "a long number": b'{"config": {"a": ' + b"9" * 5_000 + b"}}",
    "bytes behind it": b"{} {}",
    "a pickle": b"\x80\x04K\x01.",
    "a BOM": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("content", NO_MANIFEST.values(), ids=list(NO_MANIFEST))
def test_what_is_no_manifest_at_all_is_refused(content, registry, artifact):
    rewrite(registry, artifact, content)
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"9" * 5_000, b"1e999"])
def test_a_manifest_with_a_number_that_is_none_is_refused(number, registry, artifact):
    rewrite(registry, artifact, artifact.model_dump_json().encode().replace(b'"loss":1.0', b'"loss":' + number))
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


def test_nan_hidden_where_anything_may_be_is_refused_and_the_word_in_a_text_is_not(registry, artifact):
    manifest = json.loads(artifact.model_dump_json())
    rewrite(registry, artifact, {**manifest, "config": {"note": "NaN and Infinity"}})
    assert registry.open(artifact.id).config == {"note": "NaN and Infinity"}
    rewrite(registry, artifact, {**manifest, "config": {"a": float("nan")}})
    with pytest.raises(BadInput, match="NaN is no number"):
        registry.open(artifact.id)


def test_a_manifest_of_a_size_that_no_manifest_has_is_not_parsed(registry, artifact):
    with (registry.path(artifact) / "artifact.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(BadInput, match="more than 67108864 bytes") as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


def put_link(path):
    path.symlink_to("/etc/passwd")


def put_directory_link(path):
    path.symlink_to("/etc")


def put_pipe(path):
    os.mkfifo(path)


def put_loop(path):
    path.symlink_to(path)


ODD = [put_link, put_directory_link, put_pipe, put_loop]


@pytest.mark.parametrize("put", [*ODD, os.mkdir])
def test_a_manifest_that_is_no_plain_file_is_not_opened(put, registry, artifact):
    path = registry.path(artifact) / "artifact.json"
    path.unlink()
    put(path)
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id)


def test_a_manifest_that_is_a_link_to_a_good_one_is_refused_too(registry, artifact, tmp_path):
    path = registry.path(artifact) / "artifact.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BadInput) as error:
        registry.open(artifact.id)
    one_line(error, artifact.id, "no link")


@pytest.mark.parametrize("put", ODD)
@pytest.mark.parametrize("name", ["extra.json", "model.safetensors", "data"])
def test_what_is_no_plain_file_is_named_by_verify_and_not_opened(name, put, registry, artifact):
    path = registry.path(artifact) / name
    if path.is_dir():
        (path / "rows.jsonl").unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    put(path)
    assert f"{artifact.id}/{name}: is a link, or no plain file" in verify(registry, artifact)


def test_an_artifact_that_is_a_link_to_another_place_is_named(registry, artifact, tmp_path):
    directory = registry.path(artifact)
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    assert f"{artifact.id}/.: is a link, or no plain file" in verify(registry, artifact)


@pytest.mark.parametrize("put", ODD)
@pytest.mark.parametrize("name", ["extra.json", "data/extra.jsonl", "deep"])
def test_what_is_no_plain_file_is_not_published(name, put, registry, tmp_path):
    out = finished(tmp_path / "out")
    put(out / name)
    with pytest.raises(UnsafeFile) as error:
        registry.publish(out, draft(), "user")
    one_line(error, name)
    assert registry.artifacts() == [] and out.exists()


NAMES = [
    name
    for name in OUTSIDE + NO_KIND
    if name and len(name) < 255 and "/" not in name and "\0" not in name and name not in (".", "..")
]
TWICE = [paths for paths in CLASHES if len(paths) == 2 and not any("x.json/" in path for path in paths)]


@pytest.mark.parametrize("name", NAMES, ids=ids(NAMES))
def test_a_file_with_a_name_that_is_not_safe_is_not_published(name, registry, tmp_path):
    out = finished(tmp_path / "out")
    (out / name).write_text("")
    with pytest.raises(UnsafeFile) as error:
        registry.publish(out, draft(), "user")
    one_line(error)


@pytest.mark.parametrize("paths", TWICE, ids=ids(TWICE))
def test_files_that_are_one_on_another_file_system_are_not_published(paths, registry, tmp_path):
    out = finished(tmp_path / "out")
    for path in paths:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("")
    with pytest.raises(UnsafeFile) as error:
        registry.publish(out, draft(), "user")
    one_line(error)


def file_of(header, body=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + body


def tensor(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


FOUR, EIGHT = bytes(4), bytes(8)
GOOD = {
    "no tensor": file_of({}),
    "one": file_of({"a": tensor([2], 0, 8)}, EIGHT),
    "a number": file_of({"a": tensor([], 0, 4)}, FOUR),
    "padded": file_of(b"{}   "),
    "an empty tensor": file_of({"a": tensor([0, 3], 0, 0), "b": tensor([1], 0, 4)}, FOUR),
    "another order": file_of({"b": tensor([1], 4, 8), "a": tensor([1], 0, 4)}, EIGHT),
    "text beside": file_of({"__metadata__": {"format": "pt"}, "a": tensor([1], 0, 4)}, FOUR),
    "4 bits": file_of({"a": tensor([8], 0, 4, "F4")}, FOUR),
    "bfloat16": file_of({"a": tensor([2, 2], 0, 8, "BF16")}, EIGHT),
}
BAD = {
    "nothing": b"",
    "too short for a length": b"abc",
    "a length and no header": struct.pack("<Q", 2),
    "longer than the file": file_of(b"{}", length=100),
    "the longest length": file_of(b"{}", length=2**64 - 1),
    "over 100 MB": file_of(b"{}", length=100_000_001),
    "length 0": file_of(b"", EIGHT),
    "no JSON": file_of(b"{a"),
    "a list": file_of(b"[]"),
    "a number": file_of(b"1"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "behind it": file_of(b"{}x"),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "past the end": file_of({"a": tensor([2], 0, 8)}, FOUR),
    "bytes left over": file_of({"a": tensor([1], 0, 4)}, EIGHT),
    "overlap": file_of({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "same place": file_of({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, FOUR),
    "a hole": file_of({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "a hole in front": file_of({"a": tensor([1], 4, 8)}, EIGHT),
    "shape too big": file_of({"a": tensor([3], 0, 8)}, EIGHT),
    "shape too small": file_of({"a": tensor([1], 0, 8)}, EIGHT),
    "type unknown": file_of({"a": tensor([2], 0, 8, "X")}, EIGHT),
    "type no text": file_of({"a": tensor([2], 0, 8, 1)}, EIGHT),
    "negative shape": file_of({"a": tensor([-2], 0, 8)}, EIGHT),
    "two negatives": file_of({"a": tensor([-1, -2], 0, 8)}, EIGHT),
    "a shape that overflows": file_of({"a": tensor([2**40, 2**40], 0, 8)}, EIGHT),
    "backwards": file_of({"a": tensor([2], 8, 0)}, EIGHT),
    "negative offset": file_of({"a": tensor([2], -8, 0)}, EIGHT),
    "offset no number": file_of({"a": tensor([2], "0", "8")}, EIGHT),
    "three offsets": file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, EIGHT),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "tensor no object": file_of({"a": 1}, EIGHT),
    "half a number": file_of({"a": tensor([2.0], 0, 8)}, EIGHT),
    "a long number": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,4]}}', FOUR),
    "metadata no text": file_of({"__metadata__": {"a": 1}}),
    "metadata a list": file_of({"__metadata__": []}),
    "a name twice": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        EIGHT,
    ),
    "half a byte": file_of({"a": tensor([3], 0, 2, "F4")}, bytes(2)),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=list(GOOD))
def test_what_the_format_allows_is_published(content, registry, tmp_path):
    out = finished(tmp_path / "out")
    (out / "model.safetensors").write_bytes(content)
    with safe_open(out / "model.safetensors", framework="np"):
        pass
    assert verify(registry, registry.publish(out, draft(), "user").artifact) == []


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_tensors_that_their_header_does_not_describe_are_not_published(content, registry, tmp_path):
    """Nor does the format's own reader take them."""
    out = finished(tmp_path / "out")
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(SafetensorError):
        safe_open(out / "model.safetensors", framework="np")
    with pytest.raises(UnsafeFile) as error:
        registry.publish(out, draft(), "user")
    one_line(error, "model.safetensors", "header")


@pytest.mark.parametrize("content", [BAD["overlap"], BAD["over 100 MB"], BAD["deep"], BAD["past the end"]])
def test_verify_judges_headers_that_somebody_else_has_published(content, registry, artifact):
    """With sizes and digests in order."""
    (registry.path(artifact) / "model.safetensors").write_bytes(content)
    manifest = json.loads(artifact.model_dump_json())
    manifest["files"][1] |= {
        "size": len(content),
        "sha256": registry.store.digest(f"artifacts/{artifact.id}/model.safetensors"),
    }
    rewrite(registry, artifact, manifest)
    (registry.store.root / "keys" / artifact.key / "000001.json").write_text(json.dumps({"artifact": artifact.id}))
    (said,) = verify(registry, registry.open(artifact.id))
    assert said.startswith(f"{artifact.id}/model.safetensors: its safetensors header")


ENTRIES = [
    [],
    1,
    "x",
    None,
    {},
    {"artifact": 3},
    {"artifact": None},
    {"artifact": "../../etc/passwd"},
    {"artifact": "/etc"},
    {"artifact": ""},
    {"artifact": ["a"]},
    {"void": 1},
    {"void": "../x"},
    {"artifact": "a-00000000", "void": "a-00000000"},
    {"artifact": {"artifact": 1}},
    b"",
    b"{",
    b"9" * 5_000,
    b"[" * 100_000,
    b"\xff",
]


@pytest.mark.parametrize("entry", ENTRIES, ids=ids(ENTRIES))
def test_an_entry_of_a_keys_log_that_is_none_is_refused(entry, registry, artifact):
    path = registry.store.root / "keys" / artifact.key / "000002.json"
    path.write_bytes(entry if isinstance(entry, bytes) else json.dumps(entry).encode())
    for meet in (lambda: registry.find(artifact.key), lambda: registry.usable(artifact)):
        with pytest.raises(BadInput) as error:
            meet()
        one_line(error, f"keys/{artifact.key}/000002.json")


NUMBERS = [
    "9999999999.json",
    "000003.json",
    "abc.json",
    "000000.json",
    "0000002.json",
    "2.json",
    "-00002.json",
    "000002",
    "000002.json.json",
    "٠٠٠٠٠٢.json",
    "1e5.json",
    "000002.jso\n",
    "9" * 30 + ".json",
]


@pytest.mark.parametrize("name", NUMBERS, ids=ids(NUMBERS))
def test_a_name_in_a_log_that_is_not_the_next_number_is_refused(name, registry, artifact):
    log = registry.store.root / "keys" / artifact.key
    (log / name).write_text(json.dumps({"artifact": "a-00000000"}))
    for meet in (registry.store.last, registry.store.entries, lambda log: registry.store.append(log, {})):
        with pytest.raises(BadInput) as error:
            meet(f"keys/{artifact.key}")
        one_line(error, ascii(name)[1:-1] if name.isprintable() and name.isascii() else "keys")


def test_a_key_that_is_recorded_for_somebody_elses_artifact_is_refused(registry, artifact):
    other = key_of({"name": "other"})
    registry.store.append(f"keys/{other}", {"artifact": artifact.id})
    with pytest.raises(BadInput, match="but is recorded for") as error:
        registry.find(other)
    one_line(error, artifact.id)


IDS = [
    "../../etc",
    "..",
    ".",
    "/etc/passwd",
    "",
    " ",
    "a/b",
    "a//b",
    "a\0b",
    "\x1b[2J",
    "a\nb",
    "x" * 5_000,
    "~",
    "*",
    "warmup-0000000g",
    "-",
    "runs/x/../../y",
    "é",
]


@pytest.mark.parametrize("command", ["show", "lineage", "verify", "diff"])
@pytest.mark.parametrize("id", IDS, ids=ids(IDS))
def test_an_id_that_is_none_is_one_line_on_every_command(id, command, registry, artifact, capsys):
    arguments = [command, "--registry", registry.url, "--", *([artifact.id] if command == "diff" else []), id]
    assert exit_code(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and said.err[:-1].isprintable(), said.err


@pytest.fixture
def beside(registry, artifact, tmp_path):
    """A good artifact, and one that somebody else wrote beside it."""
    bad = registry.store.root / "artifacts" / "warmup-0badbad0"
    bad.mkdir()
    (bad / "artifact.json").write_text(artifact.model_dump_json().replace("data/rows.jsonl", "../../rows.jsonl"))
    return artifact, bad.name


def command(registry, *arguments):
    """In a process, for stderr as it is."""
    code = "import sys; from pipeline.cli import exit_code; sys.exit(exit_code(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments, "--registry", registry.url],
        capture_output=True,
        text=True,
        env=environment(),
    )


def test_a_bad_artifact_is_named_by_a_list_and_does_not_hide_the_others(registry, beside):
    good, bad = beside
    done = command(registry, "ls", "--json")
    assert [one["id"] for one in json.loads(done.stdout)] == [good.id] and done.returncode == 0
    assert len(done.stderr.splitlines()) == 1 and f"left out: {bad}/artifact.json" in done.stderr


@pytest.mark.parametrize("ask", [["show"], ["lineage"], ["lineage", "--mermaid"], ["diff", "GOOD"]], ids=" ".join)
def test_a_bad_artifact_is_refused_by_whatever_opens_it(ask, registry, beside, capsys):
    good, bad = beside
    assert exit_code([*(good.id if word == "GOOD" else word for word in ask), bad, "--registry", registry.url]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and f"{bad}/artifact.json is no manifest" in said.err


def test_a_bad_artifact_does_not_keep_its_stage_from_being_made_or_recovered(registry, beside, tmp_path, caplog):
    good, _ = beside
    (registry.store.root / "keys" / good.key / "000001.json").unlink()
    assert registry.recover(good.key, good.stage, "user") == good
    again = registry.publish(finished(tmp_path / "again"), draft("another"), "user").artifact
    assert registry.find(again.key) == again


def test_verify_names_a_bad_artifact_and_the_good_ones_stay_whole(registry, beside, capsys):
    good, bad = beside
    assert exit_code(["verify", "--json", "--registry", registry.url]) == 1
    found = {one["id"]: one for one in json.loads(capsys.readouterr().out)}
    assert (
        found[good.id]["ok"]
        and not found[bad]["ok"]
        and f"{bad}/artifact.json is no manifest" in found[bad]["problems"][0]
    )
    assert registry.find(good.key) == good


EVENTS = [
    [],
    1,
    {},
    {"event": "started"},
    {"event": 1, "at": "x"},
    {"event": "started", "at": "x", "pid": "../1", "process": "", "host": ""},
]


@pytest.mark.parametrize("event", EVENTS, ids=ids(EVENTS))
def test_a_run_whose_log_is_none_is_refused(event, registry, artifact, capsys):
    registry.store.put_new("runs/demo-1/events/000001.json", event)
    for arguments in (["show", "demo-1"], ["runs"]):
        assert exit_code([*arguments, "--registry", registry.url]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
