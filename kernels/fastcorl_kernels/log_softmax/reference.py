"""Plain torch selective log-softmax; holds an (N, V) tensor, and differentiates by autograd."""

import torch

from fastcorl_kernels.checks import accumulator_dtype


def guided_reference(logits, uncond=None, guidance=1.0):
    """Classifier-free guidance, u + guidance * (c - u), in the accumulation dtype; -inf where both are."""
    dtype = accumulator_dtype(logits, uncond)
    logits = logits.to(dtype)
    if uncond is None:
        return logits
    uncond = uncond.to(dtype)
    both = logits.isneginf() & uncond.isneginf()
    logits, uncond = (operand.masked_fill(both, 0.0) for operand in (logits, uncond))
    return (uncond + guidance * (logits - uncond)).masked_fill(both, -torch.inf)


def log_softmax_reference(logits, temperature):
    """(N, V) log-probabilities in the accumulation dtype; temperature a number or (N,)."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None]
    return torch.log_softmax(logits.to(accumulator_dtype(logits)) / temperature, dim=-1)


def entropy_reference(log_p):
    """Entropy (N,) of ``log_p`` (N, V), where p = 0 adds nothing."""
    finite = log_p.masked_fill(log_p.isneginf(), 0.0)
    return -(log_p.exp() * finite).sum(dim=-1)


def selective_log_softmax_reference(logits, index, temperature=1.0, return_entropy=False):
    """See ``selective_log_softmax``."""
    log_p = log_softmax_reference(logits, temperature)
    log_probs = log_p.gather(1, index.long()[:, None]).squeeze(1)
    return (log_probs, entropy_reference(log_p)) if return_entropy else log_probs
