"""Objects named as `module:name`."""

import sys

import pytest

from fastcorl.errors import UserError
from fastcorl.plugins import load_object


def test_loads_what_is_named():
    assert load_object("math:sqrt", "key")(9) == 3


@pytest.mark.parametrize("name", ["math", "math:", ":sqrt", "", "math:nothing", "no_such_module:f", "math.deep:f"])
def test_bad_name_is_one_line_that_names_the_key(name):
    with pytest.raises(UserError, match="rewards.extra") as caught:
        load_object(name, "rewards.extra")
    assert "\n" not in str(caught.value)


def test_an_error_inside_the_module_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="surely_not_installed"):
        load_object("broken_plugin:f", "rewards.extra")
    sys.modules.pop("broken_plugin", None)
