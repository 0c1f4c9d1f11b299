"""What the rewards of a run load, once for all its stages: networks, the scene-graph parser, the user's functions."""

import math
from collections.abc import Callable
from functools import partial

import torch

from fastcorl.config_rewards import RewardsConfig
from fastcorl.plugins import load_object
from fastcorl.rewards.background import Background
from fastcorl.rewards.captions.bertscore import BertScore, SentenceSimilarity
from fastcorl.rewards.captions.captioner import BlipCaptioner
from fastcorl.rewards.captions.jaccard import WordSimilarity, jaccard, soft_jaccard
from fastcorl.rewards.captions.scene_graph import TupleSimilarity
from fastcorl.rewards.captions.spice import Spice
from fastcorl.rewards.captions.spice_py import SpicePy
from fastcorl.rewards.cycle import CaptionSimilarity
from fastcorl.rewards.images.clip_score import ClipScore
from fastcorl.rewards.images.groups import ImageSimilarity
from fastcorl.rewards.images.perceptual import make_image_similarity
from fastcorl.rewards.users.rewards import UserRewards

POLICY = "policy"
ANY_CAPTION = ("jaccard", "spice_py", "bertscore")


class RewardModels:
    """Raises UserError for whatever the configuration names and is not there.

    `captioner` is None where the policy recaptions; `image_similarity` is None where it is the policy's own VQ encoder.
    """

    def __init__(self, config: RewardsConfig, device: torch.device | str = "cpu", *, draws: bool = True) -> None:
        """`draws`: whether any stage draws; the models that judge drawings are loaded only then."""
        self.captioner: BlipCaptioner | None = None
        self.image_similarity: ImageSimilarity | None = None
        self.names: list[str] = []
        self.caption_similarities: list[CaptionSimilarity] = []
        self.clip: ClipScore | None = None
        self.background = Background()
        if draws:
            if config.image_measure not in (None, "vq"):
                self.image_similarity = make_image_similarity(
                    config.image_measure,
                    vq_encoder=None,
                    trunk=config.lpips_trunk,
                    heads=config.lpips_heads,
                    device=device,
                )
            if config.caption_measures:
                self._load_captions(config, device)
            if config.weight("clip"):
                self.clip = ClipScore(config.clip, device)
        self.users = UserRewards(config.extra, config.pairwise, timeout=config.timeout, gpu=config.extra_on_gpu)

    def _load_captions(self, config: RewardsConfig, device: torch.device | str) -> None:
        if config.captioner != POLICY:
            self.captioner = BlipCaptioner.from_pretrained(config.captioner, device=device)
        makers: dict[str, Callable[[], CaptionSimilarity]] = {
            "tuples": lambda: TupleSimilarity(load_object(config.caption_tuples, "rewards.caption_tuples")),
            "spice": partial(Spice, config.spice_folder),
            "spice_py": SpicePy,
            "bertscore": lambda: BertScore(config.bert, config.bert_layer, device),
            "sentence": lambda: SentenceSimilarity(config.sentence_encoder, device),
            "jaccard": lambda: jaccard,
            "soft_jaccard": lambda: soft_jaccard,
        }
        self.names = list(config.caption_measures)
        self.caption_similarities = [makers[name]() for name in self.names]

    def caption_problem(self, caption: str) -> str | None:
        """Why a drawing of `caption` could never be scored: it says nothing that a similarity compares."""
        for name, similarity in zip(self.names, self.caption_similarities, strict=True):
            # Those that need a model can score any caption.
            by_rules = isinstance(similarity, TupleSimilarity | SpicePy | WordSimilarity)
            if by_rules and math.isnan(similarity([caption], [caption])[0]):
                key = "rewards.caption_tuples" if name == "tuples" else f"rewards.caption_similarity {name}"
                others = ", ".join(other for other in ANY_CAPTION if other != name)
                return (
                    f"{key} finds nothing in {caption[:60]!r}; for captions of another kind "
                    f"take another rewards.caption_similarity ({others})"
                )
        return None

    def close(self) -> None:
        """End what is being computed, and the processes of the user's rewards and of SPICE."""
        self.background.close()
        self.users.close()
        for similarity in self.caption_similarities:
            if isinstance(similarity, Spice):
                similarity.close()
