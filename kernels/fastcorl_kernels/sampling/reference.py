"""Plain torch sampling: counter-based noise, and the Gumbel-max trick over chunks of rows. The CPU rollout runs it."""

import torch

from fastcorl_kernels.log_softmax.reference import guided_reference

CHUNK_ELEMENTS = 1 << 17  # the temporaries of so many logits stay in the cache from one operation to the next


def _signed(value):
    """The int32 with the low 32 bits of ``value``."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _constant(value):
    """As a tensor, since a Python number adds a microsecond to operations of two."""
    return torch.tensor(_signed(value), dtype=torch.int32, device="cpu")


_FIRST, _SECOND, _OFFSET = _constant(0x7FEB352D), _constant(0x846CA68B), _constant(0x9E3779B9)
_NEGATIVE_HALF = torch.tensor(-0.5 * 2.0**-32, dtype=torch.float32, device="cpu")
_SHIFTS = {shift: (_constant(shift), _constant((1 << (32 - shift)) - 1)) for shift in (15, 16)}


def _fold(x, shift, scratch):
    """x ^= x >> shift, unsigned: torch shifts int32 with its sign, which the mask takes away."""
    places, mask = _SHIFTS[shift]
    torch.bitwise_right_shift(x, places, out=scratch).bitwise_and_(mask)
    return x.bitwise_xor_(scratch)


def _mix_but_last_fold(x, scratch):
    return _fold(_fold(x, 16, scratch).mul_(_FIRST), 15, scratch).mul_(_SECOND)


def _mix(x, scratch):
    """A bijection of 32-bit integers with good avalanche (Wellons' lowbias32), in place on int32, which wraps."""
    return _fold(_mix_but_last_fold(x, scratch), 16, scratch)


def row_keys(seeds, steps):
    """A row's key from its seed (n,) and step, an integer or (n,): (keys, the same folded by 16), (n, 1) int32."""
    steps = steps.to(torch.int32) if isinstance(steps, torch.Tensor) else _signed(int(steps))
    # `_mix` maps 0 to 0; the offset keeps the plainest key, seed 0 at step 0, away from it.
    keys = seeds.to(torch.int32) + _OFFSET
    scratch = torch.empty_like(keys)
    # A fold by 16 is its own inverse.
    folded = _mix_but_last_fold(_mix(keys, scratch).add_(steps), scratch)[:, None]
    return _fold(folded.clone(), 16, scratch[:, None]), folded


def write_exponentials(keys, folded_keys, tokens, bits, out):
    """Fill ``out`` (n, V) float32 with standard exponential noise; Gumbel noise is minus its logarithm.

    Keys as from ``row_keys``, ``tokens`` (V,) int32; ``bits`` (n, V) int32 is scratch.
    """
    scratch = out.view(torch.int32)
    # The bits are mix(mix(key + token) ^ key), where the inner mix's last fold and the outer's first meet and cancel.
    _mix_but_last_fold(torch.add(keys, tokens, out=bits), scratch).bitwise_xor_(folded_keys)
    _fold(_fold(bits.mul_(_FIRST), 15, scratch).mul_(_SECOND), 16, scratch)
    # High noise comes from a small uniform, where float32 is fine-grained; 1 would give infinite noise.
    negative = torch.sub(_NEGATIVE_HALF, out.copy_(bits.view(torch.uint32)), alpha=2.0**-32, out=out)
    return negative.clamp_(min=2.0**-24 - 1).log1p_().neg_()


def row_chunks(count, vocabulary):
    """Slices of rows."""
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def gumbel_noise_reference(seeds, steps, num_tokens):
    """See ``gumbel_noise``."""
    noise = torch.empty(seeds.shape[0], num_tokens, dtype=torch.float32, device=seeds.device)
    with torch.inference_mode():  # its operations start sooner
        keys, folded = row_keys(seeds, steps)
        ids = torch.arange(num_tokens, dtype=torch.int32, device=seeds.device)
        for rows in row_chunks(*noise.shape):
            part = noise[rows]
            bits = torch.empty_like(part, dtype=torch.int32)
            write_exponentials(keys[rows], folded[rows], ids, bits, part).log_().neg_()
    return noise


def lowest_kept(logits, temperature, top_k, top_p):
    """(n, 1): the smallest of a row's logits (n, V) that ``top_k`` and then ``top_p``, or one of them, keep."""
    lowest = None
    if top_k is not None:
        lowest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p is not None:
        ordered = logits.sort(descending=True).values
        reached = (ordered.double() / temperature).softmax(-1).cumsum(-1)
        last = (reached < top_p).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
        lowest = ordered.gather(-1, last)
    return lowest


def _guided(cond, uncond, guidance):
    """What ``guided_reference`` gives, for float32; without the masks where nothing is -inf, since they are slow."""
    if cond.amin() == -torch.inf:
        return guided_reference(cond, uncond, guidance)
    return torch.sub(cond, uncond).mul_(guidance).add_(uncond)


def _tempered(logits, temperature):
    return logits if temperature in (0, 1) else logits / temperature


def _log_probs_of(tokens, logits, out):
    """``out`` (n, V) is scratch."""
    return torch.log_softmax(logits, -1, out=out).gather(-1, tokens[:, None]).squeeze(-1)


def sample_tokens_reference(logits, seeds, steps, uncond, guidance, temperature, top_k, top_p):
    """(tokens, log_probs, cond_log_probs), each (n,); see ``sample_tokens``."""
    count, vocabulary = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(count, dtype=torch.float32, device=logits.device)
    cond_log_probs = log_probs if uncond is None else torch.empty_like(log_probs)
    with torch.inference_mode():  # its operations start sooner
        keys, folded = row_keys(seeds, steps)
        ids = torch.arange(vocabulary, dtype=torch.int32, device=logits.device)
        for rows in row_chunks(count, vocabulary):
            cond = logits[rows].float()
            plain = cond if uncond is None else _guided(cond, uncond[rows].float(), guidance)
            tempered = _tempered(plain, temperature)
            scores = tempered
            if top_k is not None or top_p is not None:
                scores = scores.masked_fill(plain < lowest_kept(plain, temperature, top_k, top_p), -torch.inf)
            bits, race = torch.empty_like(cond, dtype=torch.int32), torch.empty_like(cond)
            if temperature:
                write_exponentials(keys[rows], folded[rows], ids, bits, race).log_()
                scores = torch.sub(scores, race, out=race)
            tokens[rows] = scores.max(-1).indices  # the first of equals; faster than argmax
            log_probs[rows] = _log_probs_of(tokens[rows], tempered, out=race)
            if uncond is not None:
                cond_log_probs[rows] = _log_probs_of(tokens[rows], _tempered(cond, temperature), out=race)
    return tokens, log_probs, cond_log_probs
