"""Log-probabilities from padded forwards with whole logits, and the loss of one modality."""

import torch
from transformers import BatchFeature, JanusForConditionalGeneration


def answer_log_probs(
    janus: JanusForConditionalGeneration,
    ask: BatchFeature,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probabilities (n, L) of answers `tokens` (n, L) to P prompts, n / P to each.

    `mask` (n, L) bool marks real tokens. The vision tower runs for every answer.
    """
    size = len(tokens) // len(ask["input_ids"])
    prompt, prompt_mask, pixels = (
        ask[name].repeat_interleave(size, 0) for name in ("input_ids", "attention_mask", "pixel_values")
    )
    embeds = janus.get_input_embeddings()(torch.cat([prompt, tokens], 1))
    features = janus.model.get_image_features(pixels, return_dict=True).pooler_output
    # Of the prompt alone: an answer may hold the placeholder's token.
    places = torch.cat([prompt == janus.config.image_token_id, torch.zeros_like(mask)], 1)
    logits = janus(
        inputs_embeds=embeds.masked_scatter(places[..., None], features),
        attention_mask=torch.cat([prompt_mask, mask.to(prompt_mask)], 1),
        use_cache=False,
        logits_to_keep=tokens.shape[1] + 1,
    ).logits[:, :-1]
    return _selected(logits / temperature, tokens)


def drawing_log_probs(
    janus: JanusForConditionalGeneration, draw: BatchFeature, codes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probabilities (n, T) of drawings `codes` (n, T) of P captions, n / P of each, without guidance.

    Code j is read at the position before its own; the public code reads it at its own, one too late.
    """
    size, count = len(codes) // len(draw["input_ids"]), codes.shape[1]
    ids, mask = (draw[name].repeat_interleave(size, 0) for name in ("input_ids", "attention_mask"))
    text, drawn = janus.get_input_embeddings()(ids), janus.prepare_embeddings_for_image_generation(codes)
    hidden = janus.model.language_model(
        inputs_embeds=torch.cat([text, drawn], 1),
        attention_mask=torch.cat([mask, torch.ones_like(codes)], 1),
        use_cache=False,
    ).last_hidden_state
    logits = janus.model.generation_head(hidden[:, -count - 1 : -1])
    return _selected(logits / temperature, codes)


def policy_loss(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    ref_log_probs: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    """Mean over n sequences of the mean over tokens of -(ratio * advantage - beta * k3), where the ratio is 1.

    Args: `log_probs`, `ref_log_probs` and bool `mask` (n, L), `advantages` (n,).
    """
    losses = -advantages[:, None] * (log_probs - log_probs.detach()).exp()
    if ref_log_probs is not None:
        log_ratio = ref_log_probs - log_probs
        losses = losses + beta * (log_ratio.exp() - log_ratio - 1)
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def _selected(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
