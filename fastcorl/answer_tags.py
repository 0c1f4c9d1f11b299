"""Where an answer stands in a text. Read by validation of data and by the rewards, so that both see the same."""

import re

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """What stands in the last complete `<answer>` pair, trimmed; None when there is none or it is blank."""
    found = _ANSWER.findall(text)
    return (found[-1].strip() or None) if found else None
