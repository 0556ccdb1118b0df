"""The environment of a job: which variables of the shell reach the libraries that compute.

os.environ -> `cleaned` -> the environment of a serving worker or a guard worker, and the names that were left out.
torch, accelerate, transformers and their launchers read settings from variables that no recipe and no key holds. A
family of such variables is a row of FAMILIES: only its named members pass. Every variable outside the families passes,
such as proxies, credentials and CUDA_VISIBLE_DEVICES.

The invariant: an environment is cleaned once, where a launcher starts a process, and never inside a rank. torchrun and
accelerate give a rank its RANK and ACCELERATE_*, and those are the job's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

FAMILIES: dict[str, tuple[str, ...]] = {
    # how accelerate computes: precision, FSDP, DeepSpeed, accumulation
    "ACCELERATE_*": (),
    "FSDP_*": (),
    "PARALLELISM_CONFIG_*": (),
    # another launcher's processes: torchrun, MPI, Slurm
    "RANK": (),
    "WORLD_SIZE": (),
    "LOCAL_*": (),
    "NODE_RANK": (),
    "NPROC": (),
    "MASTER_*": (),
    "TORCHELASTIC_*": (),
    "PET_*": (),  # defaults of torchrun's own options
    "OMPI_*": (),
    "PMI_*": (),
    "PMIX_*": (),
    "MV2_*": (),
    "SLURM_*": (),
    # compilers and coarser arithmetic
    "TORCHDYNAMO_*": (),
    "TORCHINDUCTOR_*": ("TORCHINDUCTOR_CACHE_DIR",),
    "TORCH_ALLOW_TF32*": (),
    "NVIDIA_TF32_OVERRIDE": (),
    "ONEDNN_DEFAULT_FPMATH_MODE": (),
    "DNNL_DEFAULT_FPMATH_MODE": (),
    "PJRT_DEVICE": (),
    "USE_TORCH_XLA": (),
    "XLA_*": (),
    # libraries of the hub
    "HF_*": ("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HF_HUB_*", "HF_DATASETS_*"),
    "TOKENIZERS_*": (),
    # Python itself: PYTHONOPTIMIZE takes the asserts out of user code
    "PYTHON*": (
        "PYTHONCOERCECLOCALE",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONFAULTHANDLER",
        "PYTHONHOME",
        "PYTHONIOENCODING",
        "PYTHONNOUSERSITE",
        "PYTHONPYCACHEPREFIX",
        "PYTHONUNBUFFERED",
        "PYTHONUSERBASE",
    ),
}
"""Family -> its members that pass. `*` stands for any end of a name."""
OURS = {
    "PYTHONUTF8": "1",  # the same bytes are the same text in every locale
    "PYTHONHASHSEED": "0",  # a set is walked in the same order in every process
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Variables that every job has, in the place of those that were left out."""


class Cleaned(NamedTuple):
    """The environment of a process to start."""

    variables: dict[str, str]
    dropped: tuple[str, ...]
    """Names of the variables that were left out, sorted. Their values are recorded nowhere."""


def cleaned(environment: Mapping[str, str]) -> Cleaned:
    """`environment` without the members of FAMILIES that do not pass, and with OURS."""
    dropped = tuple(sorted(name for name in environment if not passes(name)))
    kept = {name: value for name, value in environment.items() if name not in dropped}
    return Cleaned({**kept, **OURS}, dropped)


def passes(name: str) -> bool:
    """Whether a job may see the variable."""
    families = [members for family, members in FAMILIES.items() if fnmatchcase(name, family)]
    return all(any(fnmatchcase(name, member) for member in members) for members in families)
