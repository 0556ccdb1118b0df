"""YAML that somebody else may have written, read within bounds.

text -> values, after one pass over its events: no deeper than DEEPEST, no number longer than LONGEST_NUMBER, and with
all aliases written out at most MOST_NODES values. A few hundred bytes of nested aliases stand for billions of values
otherwise. A scalar that is not what its tag says (a month 13) is an error of YAML with a line, too. Raises
yaml.YAMLError only."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 50
"""Levels of mappings and lists."""
MOST_NODES = 100_000
"""Values that a text with aliases may stand for."""
LONGEST_NUMBER = 100
"""Characters of a number; Python reads at most 4,300 digits and would take long to print them."""
MAPPINGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:set")
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that raises nothing but YAMLError."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node."""
        if node.tag in MAPPINGS and not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # each is raised for some tag
            what = f"found {_shown(node.value)}, which is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None


def load(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The value of a text. Raises yaml.YAMLError, with a mark where there is a place to blame."""
    refuse_unbounded(text, loader)
    return yaml.load(text, loader)  # noqa: S506 - a SafeLoader


def refuse_unbounded(text: str, loader: type[BoundedLoader] = BoundedLoader) -> None:
    """Raise yaml.MarkedYAMLError for a text that is too deep, stands for too many values or holds a number too long."""
    reader = loader("")
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    sizes, aliased = dict[str, int](), False
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes |= {anchor: size} if anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) > DEEPEST:
                raise _at(event, f"found more than {DEEPEST} levels of mappings and lists")
            open_nodes.append((event.anchor, 1))
            continue
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                raise _at(event, f"the alias {event.anchor} stands for what it is part of; write out what is meant")
            size, aliased = sizes.get(event.anchor, 1), True
        elif isinstance(event, yaml.ScalarEvent):
            _refuse_long_number(event, reader)
            size = 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        else:
            continue
        above, before = open_nodes[-1]
        open_nodes[-1] = (above, before + size)
        if aliased and before + size > MOST_NODES:
            raise _at(event, f"its aliases stand for more than {MOST_NODES} values; write out what is meant")


def _refuse_long_number(event: yaml.ScalarEvent, reader: BoundedLoader) -> None:
    if len(event.value) <= LONGEST_NUMBER:
        return
    tag = event.tag or reader.resolve(yaml.ScalarNode, event.value, event.implicit)
    if tag in NUMBERS:
        raise _at(event, f"found a number of {len(event.value)} characters, expected at most {LONGEST_NUMBER}")


def _at(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str) else "a collection"
