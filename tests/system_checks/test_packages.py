"""Versions against fastcorl's own metadata."""

from importlib import metadata

from packaging.requirements import Requirement

from fastcorl.system_checks import packages
from fastcorl.system_checks.packages import check_packages, requirements


def test_this_environment_has_what_is_required():
    findings = {finding.name: finding for finding in check_packages()}
    assert findings["torch"].detail == metadata.version("torch")
    assert not [finding for finding in findings.values() if finding.status == "problem"]
    assert "pytest" not in findings


def test_a_clone_asks_for_the_same_as_an_installation(monkeypatch):
    def named():
        return {(each.name, str(each.specifier), extra) for each, extra in requirements()}

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    installed = named()
    monkeypatch.setattr(metadata, "requires", absent)
    assert named() == installed


def test_what_is_missing_or_too_old(monkeypatch):
    def finding(text, extra):
        monkeypatch.setattr(packages, "requirements", lambda: [(Requirement(text), extra)])
        return check_packages()[1]

    missing, old = "no-such-package>=1", "pytest>=1000"
    assert finding(missing, "").status == "problem" and finding(missing, "").needed
    assert finding(missing, "").remedy == "pip install 'no-such-package>=1'"
    assert (finding(missing, "gpu").status, finding(missing, "gpu").detail) == ("n/a", "not installed; extra [gpu]")
    assert finding(old, "").status == "problem" and finding(old, "").needed
    assert finding(old, "gpu").status == "problem" and not finding(old, "gpu").needed
    assert finding(old, "gpu").detail.endswith("where >=1000 is needed")
    assert finding("pytest>=1", "").status == "ok"


def test_deepspeed_may_be_absent(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "requirements", lambda: [(Requirement("deepspeed>=0.19"), "")])
    monkeypatch.setattr(metadata, "version", absent)
    assert check_packages()[1].status == "n/a"
