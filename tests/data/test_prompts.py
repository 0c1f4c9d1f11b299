import pytest
from PIL import Image

from fastcorl.data import PromptData, PromptSampler, Rows
from fastcorl.errors import UserError


def prompts(types=("MC", "OE", "MC", "OE", "OE"), caption="a three"):
    rows = [
        {
            "prompt": f"{caption} {index}",
            "real_image": Image.new("L", (4, 4)),
            "qa_problem": "Which digit?",
            "qa_solution": "<answer>3</answer>",
            "qa_type": kind,
        }
        for index, kind in enumerate(types)
    ]
    return PromptData(Rows(rows, "data.train x:y", {}))


def test_prompts():
    data = prompts()
    assert len(data) == 5
    prompt = data[2]
    assert (prompt.id, prompt.caption, prompt.question_type, prompt.image.mode) == ("2", "a three 2", "MC", "RGB")
    assert [each.id for each in data] == ["0", "1", "2", "3", "4"]


def test_only_keeps_ids():
    data = prompts()
    assert [prompt.id for prompt in data.only({"MC"})] == ["0", "2"]
    assert [prompt.id for prompt in data.only({"MC", "OE"}).only({"OE"})] == ["1", "3", "4"]
    with pytest.raises(UserError, match=r"data\.train x:y: no row has a question of type MC"):
        data.only({"OE"}).only({"MC"})


def test_check_lengths():
    data = prompts()
    data.check_lengths(lambda prompt: (10, 3), limit=10)
    with pytest.raises(UserError, match="row 2: caption has 11 tokens, data.max_prompt_tokens is 10"):
        data.check_lengths(lambda prompt: (11 if prompt.id == "2" else 1, 1), limit=10)
    with pytest.raises(UserError, match="row 0: question has 12 tokens"):
        data.check_lengths(lambda prompt: (1, 12), limit=10)


def test_sampler_is_a_function_of_seed_stage_and_step():
    sampler = PromptSampler(20, 3, 6, stage="mc")
    steps = [sampler.indices(step) for step in range(1, 30)]
    again = PromptSampler(20, 3, 6, stage="mc")
    assert again.indices(17) == steps[16]
    assert PromptSampler(20, 4, 6, stage="mc").indices(1) != steps[0]
    assert PromptSampler(20, 3, 6, stage="oe").indices(1) != steps[0]


def test_sampler_never_changes():
    """A run resumed with a later version meets the same prompts."""
    assert PromptSampler(10, 0, 4, stage="unified").indices(1) == [3, 4, 0, 2]


def test_every_epoch_has_every_prompt_once():
    sampler = PromptSampler(20, 0, 6)
    flat = [index for step in range(1, 31) for index in sampler.indices(step)]
    epochs = [flat[start : start + 20] for start in range(0, 180, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_a_step(world):
    sampler = PromptSampler(20, 0, 6)
    parts = [sampler.for_rank(5, rank, world) for rank in range(world)]
    assert sorted(index for part in parts for index in part) == sorted(sampler.indices(5))
    assert len({len(part) for part in parts}) == 1


def test_mistakes():
    with pytest.raises(UserError, match=r"^stages.unified.prompts_per_step 7 does not divide by 2 ranks$"):
        PromptSampler(20, 0, 7, stage="unified").for_rank(1, 0, 2)
    with pytest.raises(UserError, match="stages.mc.prompts_per_step 8 exceeds the 5 prompts"):
        PromptSampler(5, 0, 8, stage="mc")
    with pytest.raises(ValueError, match="count from 1"):
        PromptSampler(5, 0, 2).indices(0)
