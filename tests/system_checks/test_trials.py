"""Single trials, in this process: what each kind of machine would tell."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.utils.cpp_extension

from fastcorl.system_checks import machine_trials
from fastcorl.system_checks.library_trials import attention_trial
from fastcorl.system_checks.trials import TRIALS, attempt
from tests.system_checks.test_machine import write_program

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="programs are shell scripts")


@pytest.mark.parametrize("name", ["torch", "kernels torch", "attention sdpa", "attention auto"])
def test_what_training_needs_works(name):
    finding = attempt(name)
    assert (finding.name, finding.status) == (name, "ok"), finding.detail
    if name.startswith("attention"):
        assert "sdpa" in finding.detail or torch.cuda.is_available()


@CPU_ONLY
@pytest.mark.parametrize("name", ["GPU", "kernels triton", "attention flex", "attention torch", "CUDA"])
def test_what_a_cpu_has_not(name):
    assert attempt(name).status == "n/a"


@CPU_ONLY
def test_a_gpu_that_torch_does_not_reach(monkeypatch):
    monkeypatch.setattr(machine_trials, "has_nvidia_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert attempt("GPU").detail.startswith("hidden by CUDA_VISIBLE_DEVICES=''")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    finding = attempt("GPU")
    assert (finding.status, finding.needed, finding.remedy) == ("problem", True, TRIALS["GPU"].remedy)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert attempt("GPU").status == "problem"


@POSIX
@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "status", "words"),
    [
        (None, "12.8", "n/a", "torch is built without CUDA"),
        ("12.9", "12.1", "ok", "the same major version"),
        ("13.0", "12.8", "problem", "another major version"),
        ("13.0", None, "n/a", "no nvcc"),
        ("13.0", "?", "problem", "tells no version"),
    ],
)
def test_majors_of_cuda(monkeypatch, tmp_path, torch_cuda, nvcc, status, words):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    if nvcc:
        write_program(tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    finding = attempt("CUDA")
    assert (finding.status, finding.needed) == (status, False)
    assert words in finding.detail
    if words == "another major version":
        assert finding.remedy.startswith("set CUDA_HOME to a toolkit of CUDA 13;")


def test_a_cuda_home_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert "which has no bin/nvcc" in attempt("CUDA").detail


@POSIX
@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ('openjdk version "17.0.15" 2025-04-15', "n/a", "17.0.15, but not all that SPICE needs: "),
        ('java version "1.8.0_401"', "n/a", "1.8.0_401, but not all that SPICE needs: "),
        ('java version "1.7.0_80"', "problem", "1.7.0_80 is too old for SPICE"),
        ("what?", "problem", "tells no version"),
    ],
)
def test_versions_of_java(monkeypatch, tmp_path, said, status, words):
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "java", f"echo '{said}' >&2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    finding = attempt("Java")
    assert (finding.status, finding.needed) == (status, False)
    assert words in finding.detail


def test_no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert attempt("Java").remedy == "set JAVA_HOME to a JDK, or unset it"
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = attempt("Java")
    assert finding.status == "n/a" and finding.detail.startswith("no java in PATH")


def test_nvml(monkeypatch):
    class NVMLError(Exception):
        pass

    def init():
        raise NVMLError("NVML Shared Library Not Found")

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=init, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(machine_trials, "has_nvidia_driver", lambda: False)
    assert attempt("NVML").status == "n/a"
    monkeypatch.setattr(machine_trials, "has_nvidia_driver", lambda: True)
    finding = attempt("NVML")
    assert (finding.status, finding.needed) == ("problem", False)
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlSystemGetDriverVersion, nvml.nvmlDeviceGetCount = lambda: "580.65", lambda: 2
    assert attempt("NVML").detail == "driver 580.65, 2 GPUs"


def test_the_driver_of_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_trials, "DRIVER", tmp_path / "version")
    assert machine_trials.driver_version() == []
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "version").write_text(said)
    assert machine_trials.driver_version() == ["driver 580.65.06"]
    assert machine_trials.has_nvidia_driver()


def test_the_hub(monkeypatch):
    import huggingface_hub.utils
    from huggingface_hub import constants

    def session(answer):
        monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: SimpleNamespace(head=answer))

    def unreachable(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    session(lambda url, timeout: None)
    assert attempt("hub").status == "ok"
    session(unreachable)
    assert attempt("hub").status == "n/a" and "OSError: no route" in attempt("hub").detail
    monkeypatch.setattr(machine_trials, "HUB_SECONDS", 0.1)
    session(lambda url, timeout: time.sleep(60))
    assert attempt("hub").detail.endswith("does not answer within 0.1 s; local files alone")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert attempt("hub").detail.startswith("HF_HUB_OFFLINE is set")


def test_a_package_that_does_not_import(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    finding = attempt("attention flash_attn")
    assert (finding.status, finding.needed) == ("problem", False)
    assert finding.detail == "ImportError: undefined symbol: _ZN3c10"
    assert "--no-build-isolation" in finding.remedy


def test_every_backend_of_attention_has_a_trial():
    from fastcorl.model import backends

    assert {name.removeprefix("attention ") for name in TRIALS if name.startswith("attention ")} == {*backends.NAMES}
    assert callable(attention_trial("flex"))
