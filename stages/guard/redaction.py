"""What user code prints or raises goes to terminals, logs and artifacts; the secrets that it was given in its
environment do not, and neither does a control character."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from stages.visible import visible

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables whose values are secrets."""
SHORTEST = 8
"""Characters of a value that is looked for; a shorter one would be found in ordinary words."""


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text`, visible, with [NAME] in the place of every value that an environment variable with a name like a secret's
    has."""
    if not text:  # as of nearly every reply
        return text
    secrets = {value: name for name, value in environment.items() if SECRET.search(name) and len(value) >= SHORTEST}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"[{secrets[value]}]")
    return visible(text)
