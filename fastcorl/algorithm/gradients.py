"""Do drawing and answering pull the shared weights the same way?"""

from collections.abc import Callable, Sequence

import torch

from fastcorl.algorithm.objective import MODALITIES, CoRLObjective, StepTotals
from fastcorl.records import PackedBatch


def gradient_cosine(
    objective: CoRLObjective,
    batches: Sequence[PackedBatch],
    totals: StepTotals,
    average: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Cosine between the gradients of the drawings' and the answers' loss over a step, and both norms.

    Nothing is written to `.grad`. `average` gives the mean of a tensor over ranks. A collective call: every rank must
    have as many batches. The cosine is NaN where a gradient is zero.
    """
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    sums = {modality: [torch.zeros_like(weight, dtype=torch.float32) for weight in weights] for modality in MODALITIES}
    for batch in batches:
        _, losses = objective(batch, totals)
        for modality, result in losses.items():
            gradients = torch.autograd.grad(result.loss, weights, retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums[modality], gradients, strict=True):
                if gradient is not None:
                    total += gradient
    dot, squares = 0.0, dict.fromkeys(MODALITIES, 0.0)
    for image, text in zip(sums["image"], sums["text"], strict=True):
        image, text = average(image), average(text)
        dot += float((image * text).sum(dtype=torch.float64))
        squares["image"] += float(image.square().sum(dtype=torch.float64))
        squares["text"] += float(text.square().sum(dtype=torch.float64))
    norms = {f"{modality}_gradient_norm": squares[modality] ** 0.5 for modality in MODALITIES}
    product = norms["image_gradient_norm"] * norms["text_gradient_norm"]
    return {"gradient_cosine": dot / product if product else float("nan"), **norms}
