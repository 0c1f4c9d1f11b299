"""The report of `fastcorl doctor` on the system."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastcorl.system_checks.findings import Finding, guarded
from fastcorl.system_checks.machine import check_compiler, check_disk
from fastcorl.system_checks.packages import check_packages
from fastcorl.system_checks.runner import TrialRunner
from fastcorl.system_checks.shadows import check_module_names

MACHINE = ("GPU", "NVML", "CUDA", "Java", "hub")

Report = dict[str, list[Finding]]


def examine_system(output_dir: Path, seconds: float) -> Report:
    """Findings by section. Each trial may take `seconds`."""
    trials = TrialRunner(seconds).run()
    machine = [trials.pop(name) for name in MACHINE]
    return {
        "packages": guarded("packages", check_packages),
        "machine": [
            *machine,
            *guarded("C++ compiler", check_compiler),
            *guarded("disk", check_disk, output_dir),
            *guarded("module names", check_module_names),
        ],
        "tried": list(trials.values()),
    }


def is_fit(report: Report) -> bool:
    """Whether nothing that is needed is broken."""
    return not _broken(report, needed=True)


def as_json(report: Report) -> str:
    sections = {section: [vars(finding) for finding in findings] for section, findings in report.items()}
    return json.dumps({"ok": is_fit(report), **sections}, indent=2)


def as_text(report: Report) -> str:
    """A table, a line per finding, and a verdict."""
    width = max(len(finding.name) for findings in report.values() for finding in findings)
    lines = []
    for section, findings in report.items():
        lines += [section, *(_line(finding, width) for finding in findings), ""]
    needed, others = _broken(report, needed=True), _broken(report, needed=False)
    if others:
        lines.append(f"broken, but training goes without: {_names(others)}")
    lines.append(f"needed and broken: {_names(needed)}" if needed else "nothing that is needed is broken")
    return "\n".join(lines)


def _line(finding: Finding, width: int) -> str:
    remedy = f"; {finding.remedy}" if finding.status == "problem" and finding.remedy else ""
    return f"  {finding.name:{width}}  {finding.status:7}  {finding.detail}{remedy}"


def _broken(report: Report, *, needed: bool) -> list[Finding]:
    found = [finding for findings in report.values() for finding in findings if finding.status == "problem"]
    return [finding for finding in found if finding.needed == needed]


def _names(findings: Sequence[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.name for finding in findings))
