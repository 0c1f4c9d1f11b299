import pytest

from fastcorl.config import Config
from fastcorl.errors import UserError
from fastcorl.tasks import expand


def make(stages):
    return Config.model_validate({"stages": stages})


def test_an_ordered_stage_is_a_chain():
    stages = expand(
        make(
            {
                "unified": {"task": "unified"},
                "refine": {"task": "ordered", "order": ["oe", "t2i"], "init": "unified", "steps": 7},
                "merge": {"task": "merge", "merge": ["unified", "refine"], "init": "unified"},
            }
        )
    )
    assert list(stages) == ["unified", "refine_1", "refine_2", "merge"]
    assert [(stages[name].task, stages[name].init) for name in ("refine_1", "refine_2")] == [
        ("oe", "unified"),
        ("t2i", "refine_1"),
    ]
    assert stages["refine_2"].steps == 7
    assert stages["merge"].merge == ["unified", "refine_2"]


def test_a_part_may_not_have_another_stages_name():
    config = make({"a": {"task": "ordered", "order": ["mc", "oe"]}, "a_2": {"task": "mc"}})
    with pytest.raises(UserError, match="a_2"):
        expand(config)
