"""A text head that answers, without training: some answers have the asked-for form and some are right.

With a random head none would ever be, and the stages that refine answers would have nothing to tell apart.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import JanusForConditionalGeneration, JanusProcessor

from fastcorl.model.prompts import PromptEncoder

UNSEEN = 1e-5  # probability of a pair of tokens that no solution has
RIDGE = 1e-2


@torch.no_grad()
def fit_text_head(
    janus: JanusForConditionalGeneration, processor: JanusProcessor, rows: Sequence[dict[str, Any]], num_states: int
) -> None:
    """Set `janus.lm_head` so that answers follow the pairs of tokens in the solutions of `rows`.

    It becomes the ridge regression from hidden states to the log-probability of each next token given the present one.
    States are those of `num_states` rows from all over, image and question included.
    """
    encoder = PromptEncoder(processor)
    answers = [
        encoder.tokenizer(row["qa_solution"], add_special_tokens=False)["input_ids"] + [encoder.eos_id] for row in rows
    ]
    begin = encoder.ask("")[-1]  # what every answer follows
    size = len(janus.lm_head.weight)
    counts = torch.zeros(size, size)
    for answer in answers:
        pairs = torch.tensor([begin, *answer]).unfold(0, 2, 1)
        counts.index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)), accumulate=True)
    log_probs = (counts / counts.sum(1, keepdim=True).clamp(min=1) + UNSEEN).log()
    states, targets = [], []
    for index in range(0, len(rows), len(rows) // num_states):
        row, answer = rows[index], answers[index]
        ids = encoder.ask(row["qa_problem"]) + answer[:-1]
        image = Image.open(io.BytesIO(row["real_image"]["bytes"]), formats=["JPEG"])
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        hidden = janus.model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).last_hidden_state[0]
        states.append(hidden[-len(answer) :])
        targets.append(log_probs[torch.tensor([begin, *answer[:-1]])])
    x, y = torch.cat(states).double(), torch.cat(targets).double()
    # There is no bias: what all tokens have in common does not change a softmax.
    y -= y.mean(1, keepdim=True)
    weight = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    janus.lm_head.weight.copy_(weight.T)
