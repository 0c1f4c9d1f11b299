"""The reference of the configuration is what its models are."""

import subprocess
import sys
from pathlib import Path

from fastcorl.config import Config
from fastcorl.config_loading import _options
from fastcorl.config_reference import reference

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_page_is_what_the_models_say():
    assert PAGE.read_text() == reference(), "python -m fastcorl.config_reference > docs/configuration.md"


def test_every_option_of_the_command_line_has_a_row():
    rows = [line.split("`")[1] for line in reference().splitlines() if line.startswith("| `") and " | " in line]
    keys = [key for key in rows if not key.startswith("--")]
    assert keys.count("stages") == 1
    assert set(keys) - {"stages"} == set(_options(Config, {"stages": {"NAME": {}}}))
    assert len(keys) == len(set(keys))


def test_it_imports_no_torch():
    code = "import sys, fastcorl.config_reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
