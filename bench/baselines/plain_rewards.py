"""How the public trainer runs its rewards: distances one drawing at a time, BLIP and matching a micro-batch at a time.

The rewards are fastcorl's: `RewardSuite` over these two parts.
"""

import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from fastcorl.config_rewards import RewardsConfig
from fastcorl.rewards import ImageSimilarity, RewardModels, RewardSuite, make_image_similarity


class OneAtATime:
    """An image similarity that is given one drawing and its real image at a time."""

    def __init__(self, similarity: ImageSimilarity):
        self.similarity, self.range = similarity, similarity.range

    def __call__(self, drawn: torch.Tensor, real: torch.Tensor, group_size: int) -> torch.Tensor:
        pairs = zip(drawn.split(1), real.repeat_interleave(group_size, 0).split(1), strict=True)
        return torch.cat([self.similarity(one, other, 1) for one, other in pairs])


class PlainMatcher:
    """Token states of drawings and captions from one padded forward of transformers' model."""

    def __init__(self, janus: JanusForConditionalGeneration, processor: JanusProcessor):
        self.janus, self.processor = janus, processor

    @torch.no_grad()
    def match_states(
        self, pixels: torch.Tensor, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `fastcorl.rewards.Matcher`; captions are padded on the left."""
        processor = self.processor
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )
        # Expanded by hand: the processor expands placeholders only together with images of its own preprocessing.
        image = processor.image_start_token + processor.image_token * processor.num_image_tokens
        texts = [image + processor.image_end_token + caption for caption in captions]
        inputs = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(pixels.device)
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        pixel_values = ((pixels - mean) / std).to(self.janus.dtype)
        states = self.janus.model(
            input_ids=ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).last_hidden_state
        places = ids == self.janus.config.image_token_id
        # Captions are what follows the last placeholder and the end of the image.
        starts = places.int().cumsum(1).argmax(1) + 2
        columns = torch.arange(places.shape[1], device=places.device)
        first = int(starts.min())
        mask = columns >= starts[:, None]
        return states[places].unflatten(0, (len(pixels), -1)), states[:, first:], mask[:, first:]


def plain_rewards(
    config: RewardsConfig, janus: JanusForConditionalGeneration, processor: JanusProcessor
) -> RewardSuite:
    """The rewards of `config`, run as the public trainer would run them."""
    models = RewardModels(config, janus.device)
    if config.image_similarity == "vq":
        models.image_similarity = make_image_similarity("vq", vq_encoder=janus.model.vqmodel.encoder)
    models.image_similarity = OneAtATime(models.image_similarity)
    return RewardSuite(config, models, None, PlainMatcher(janus, processor))
