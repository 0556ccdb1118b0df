"""probe: how a policy answers under several prompts and response prefixes, before anything is trained."""

from __future__ import annotations

import codecs
from typing import Annotated, Any

import typer

from pipeline.cli.options import JsonOption, RecipeArgument, RegistryOption, SetOption, open_plan, print_json
from pipeline.cli.show.progress import Progress
from pipeline.cli.show.tables import probe_table, show
from pipeline.cli.show.terminal import write
from pipeline.launch.local import Launcher
from pipeline.recipe import formats
from pipeline.recipe.recipe import Recipe
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import resolve
from pipeline.run import inspections
from stages.config import FormatSettings
from stages.errors import BadInput
from stages.job import Format

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="A prompt by name, or the path of an .md file. May be given again. Default: the recipe's.",
        show_default=False,
    ),
]


Prefixes = Annotated[
    list[str] | None,
    typer.Option(
        "--prefix",
        help=r"A response prefix; \n and other escapes are decoded. May be given again. Default: the recipe's.",
        show_default=False,
    ),
]


Policy = Annotated[
    str | None,
    typer.Option("--policy", metavar="ID", help="Probe this artifact in place of the base.", show_default=False),
]


After = Annotated[
    str | None, typer.Option("--after", metavar="ID", help="Show the same with this artifact, too.", show_default=False)
]


Rows = Annotated[int, typer.Option("--rows", min=2, help="Validation rows.")]


Samples = Annotated[int, typer.Option("--samples", min=1, help="Completions per row.")]


def probe(
    recipe: RecipeArgument,
    prompts: Prompts = None,
    prefixes: Prefixes = None,
    policy: Policy = None,
    after: After = None,
    rows: Rows = 64,
    samples: Samples = 4,
    overrides: SetOption = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Try prompts and response prefixes on a policy, before any training, and on another one after it. What is not
    given is as the recipe, or the policy's own artifact, says."""
    loaded, place, planned = open_plan(recipe, overrides, registry)
    base = planned[0]
    artifacts = {role: _policy(place, id) for role, id in (("policy", policy), ("after", after)) if id}
    format = artifacts["policy"].format if policy else None
    where = {"policy": base.step.inputs["policy"].source}
    where |= {role: str(place.path(artifact, "policy")) for role, artifact in artifacts.items()}
    config = {
        "variants": [
            _variant(loaded, format or base.step.format, prompt, prefix)
            for prompt in prompts or [None]
            for prefix in prefixes or [None]
        ],
        "rows": rows,
        "samples": samples,
        "temperature": loaded.evaluate.temperature,
        "max_completion_length": loaded.evaluate.max_completion_length,
    }
    with Progress() as progress, Launcher(loaded.launch.threads) as launcher:
        lines = inspections.probe(config, base, where, place, launcher, loaded.launch, progress.asked("probe"))
    names = {"policy": policy or "base", "after": after}
    lines = [{**line, "policy": names[line["policy"]]} for line in lines]
    if json:
        print_json({"lines": lines})
    else:
        _print_probe(lines)


def _policy(registry: Registry, id: str) -> Artifact:
    artifact = resolve(registry, id)
    if "policy" not in artifact.outputs:
        raise BadInput(f"{id} is of kind {artifact.kind} and holds no policy")
    return artifact


def _variant(recipe: Recipe, format: Format, prompt: str | None, prefix: str | None) -> dict[str, Any]:
    """A Format of the probe, with its prompt's rule."""
    start = None if prefix is None else _unescaped(prefix)
    try:
        format_of_variant = formats.over(format, FormatSettings(prompt=prompt, response_prefix=start))
        follow = formats.rule(format_of_variant, prompt or recipe.format.prompt)
    except ValueError as error:
        raise BadInput(f"--prompt: {error}") from None
    return {"format": format_of_variant.model_dump(mode="json"), "follow": follow}


def _unescaped(text: str) -> str:
    r"""`\n` as a newline; every other character stays what it is."""
    try:
        decoded = codecs.decode(text.encode("latin-1", "backslashreplace"), "unicode_escape")
        decoded.encode()
    except UnicodeDecodeError as error:
        raise BadInput(f"--prefix: {text!r} ends in the middle of an escape ({error.reason})") from None
    except UnicodeEncodeError as error:
        raise BadInput(f"--prefix: {text!r} is no text ({error.reason})") from None
    return decoded


def _print_probe(lines: list[dict[str, Any]]) -> None:
    show(probe_table(lines))
    write(
        "shares x 100 of all samples on validation rows, with 95 % intervals over rows; what a model was given, "
        "first row:"
    )
    seen = dict.fromkeys((line["format_digest"], line["prompt"], line["given"]) for line in lines)
    for digest, prompt, given in seen:
        write(f"  {prompt}, format {digest[:12]}: {given!r}")
