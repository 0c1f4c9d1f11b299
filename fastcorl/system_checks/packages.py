"""Versions: what fastcorl requires or can use, and what is installed."""

import platform
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from fastcorl.system_checks.findings import Finding

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
DEVELOPMENT = "dev"
# Required on Linux by its marker, yet never imported where one process trains.
DISPENSABLE = {"deepspeed": "plain python trains in one process without it"}


def check_packages() -> list[Finding]:
    """Python and each package that fastcorl's metadata names for this platform, those of development left out."""
    findings = [Finding("python", "ok", f"{platform.python_version()}, {platform.platform(terse=True)}")]
    seen = set()
    for requirement, extra in requirements():
        if requirement.name not in seen:
            seen.add(requirement.name)
            findings.append(_check(requirement, extra))
    return findings


def requirements() -> list[tuple[Requirement, str]]:
    """What applies to this platform, each with the extra that asks for it, "" for what is always required."""
    try:
        texts = metadata.requires("fastcorl") or []
        extras = metadata.metadata("fastcorl").get_all("Provides-Extra") or []
        parsed = [Requirement(text) for text in texts]
        named = [(each, extra) for extra in ("", *extras) for each in parsed if _names(each, extra)]
    except metadata.PackageNotFoundError:  # a clone that is not installed
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        named = [(Requirement(text), extra) for extra, texts in groups.items() for text in texts]
    return [
        (each, extra)
        for each, extra in named
        if extra != DEVELOPMENT and (each.marker is None or each.marker.evaluate({"extra": extra}))
    ]


def _names(requirement: Requirement, extra: str) -> bool:
    """Whether the requirement is one of this extra, and not one of all."""
    always = requirement.marker is None or "extra" not in str(requirement.marker)
    return always if not extra else not always


def _check(requirement: Requirement, extra: str) -> Finding:
    name = requirement.name
    remedy = f"pip install '{name}{requirement.specifier}'"
    needed = not extra
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name in DISPENSABLE:
            return Finding(name, "n/a", f"not installed; {DISPENSABLE[name]}")
        if extra:
            return Finding(name, "n/a", f"not installed; extra [{extra}]")
        return Finding(name, "problem", "not installed", remedy, needed)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "problem", f"{version}, where {requirement.specifier} is needed", remedy, needed)
    return Finding(name, "ok", version, needed=needed)
