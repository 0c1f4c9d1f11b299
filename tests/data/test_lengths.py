"""What a model cannot take of a prompt."""

from PIL import Image

from fastcorl.data import Needs, PromptLengths
from fastcorl.model import PromptEncoder, load_policy
from fastcorl.records import Prompt


def prompt(caption="a red three", question="how many digits are there?"):
    return Prompt("0", caption, Image.new("RGB", (4, 4)), question, "<answer>one</answer>", "OE")


def test_with_a_real_tokenizer():
    policy = load_policy("quickstart")
    lengths = PromptLengths(policy.encoder, 100, Needs())
    assert isinstance(policy.encoder, PromptEncoder)
    assert lengths(prompt()) is None
    assert lengths.longest_caption == len(policy.encoder.draw("a red three"))
    assert lengths.longest_question == len(policy.encoder.ask("how many digits are there?", "OE"))
    assert lengths(prompt(caption="a red three " * 60))[0] == "prompt"
    column, reason = lengths(prompt(question="how many? " * 60))
    assert column == "qa_problem"
    assert reason.endswith("tokens, data.max_prompt_tokens is 100")
    token = policy.processor.image_token
    assert lengths(prompt(caption=token)) == ("prompt", f"caption contains {token!r}, which stands for an image")
    assert lengths(prompt(question=f"{token} what?"))[0] == "qa_problem"
    assert sum(lengths.captions.values()) == 3  # bad captions are not counted
    assert sum(lengths.questions.values()) == 1


def test_only_what_is_needed_is_counted():
    encoder = load_policy("quickstart").encoder
    lengths = PromptLengths(encoder, 100, Needs(answer=False))
    assert lengths(prompt(question="how many? " * 60)) is None
    assert (lengths.longest_question, len(lengths.captions)) == (0, 1)
    lengths = PromptLengths(encoder, 100, Needs(draw=False))
    assert lengths(prompt(caption="a red three " * 60)) is None
    assert (lengths.longest_caption, len(lengths.questions)) == (0, 1)
