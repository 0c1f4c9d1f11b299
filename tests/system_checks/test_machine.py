"""Disk and compiler."""

import shutil
import stat
import sys
from collections import namedtuple

import pytest

from fastcorl.system_checks.findings import first_line, guarded
from fastcorl.system_checks.machine import check_compiler, check_disk


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_disk_with_room(tmp_path):
    (finding,) = check_disk(tmp_path / "not" / "yet")
    assert finding.status == "ok" and "GiB free" in finding.detail
    assert not (tmp_path / "not").exists() and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (finding,) = check_disk(tmp_path / "file" / "runs")
    assert (finding.status, finding.needed) == ("problem", True)
    assert "cannot be written: Not a directory" in finding.detail


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**20))
    (finding,) = check_disk(tmp_path)
    assert (finding.status, finding.needed) == ("problem", True)
    assert finding.remedy.startswith("make room")


@pytest.mark.skipif(sys.platform == "win32", reason="compilers are not looked for there")
def test_compilers(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    (finding,) = check_compiler()
    assert finding.status == "problem" and "which is not there" in finding.detail
    compiler = write_program(tmp_path / "g++", "echo 'probe.cpp:1:10: fatal error: Python.h: no such file' >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    (finding,) = check_compiler()
    assert (finding.status, finding.needed) == ("problem", False)
    assert finding.detail.endswith("fails: probe.cpp:1:10: fatal error: Python.h: no such file")
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "good", "exit 0")))
    assert check_compiler()[0].status == "ok"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert check_compiler()[0].status == "n/a"


def test_a_check_that_raises_is_a_line():
    def check(number):
        return [1 / number]

    (finding,) = guarded("this", check, 0)
    assert (finding.name, finding.status, finding.needed) == ("this", "problem", False)
    assert finding.detail == "ZeroDivisionError: division by zero"


def test_an_exception_is_told_with_its_origin():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\n one \n two")) == "ValueError: one"
    try:
        try:
            raise KeyError("mine")
        except KeyError as error:
            raise ImportError("hollow words") from error
    except ImportError as error:
        assert first_line(error) == "ImportError: hollow words, from KeyError: 'mine'"
