import subprocess
import sys
from pathlib import Path

import fastcorl_kernels


def test_the_folder_does_not_shadow_hugging_face_kernels():
    assert not (Path(fastcorl_kernels.__file__).parents[1] / "__init__.py").exists()


def test_every_public_name_is_documented_and_callable():
    for name in fastcorl_kernels.__all__:
        public = getattr(fastcorl_kernels, name)
        assert callable(public) and len(public.__doc__) > 100


def test_importing_needs_torch_only():
    code = """
import sys, torch
before = set(sys.modules)
import fastcorl_kernels
outside = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert outside <= {"fastcorl_kernels", "torch"}, outside
"""
    folder = str(Path(fastcorl_kernels.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folder}, check=True, timeout=60)
