"""Small JSON files of the registry, read as what they should be."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from pipeline.registry.store import Store
from stages.config import Frozen
from stages.errors import BadInput

Record = TypeVar("Record", bound=Frozen)


def read_as(store: Store, name: str, record: type[Record]) -> Record | None:
    """What lies under a name; None when nothing does. Raises BadInput when it is something else."""
    if (content := store.read(name)) is None:
        return None
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise BadInput(
            f"{store.url}/{name}: {where}: {first['msg']}; it was not written by switchback, so remove it"
        ) from None
