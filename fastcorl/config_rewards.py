"""What a run is told about its rewards."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from fastcorl.config_base import NonNegative, Positive, Section

DRAWING_REWARDS = ("cycle", "perceptual", "caption", "tim", "clip")
ANSWER_REWARDS = ("accuracy", "format")
DEFAULT_WEIGHTS = {
    "cycle": 1.0,
    "perceptual": 0.0,
    "caption": 0.0,
    "tim": 1.0,
    "clip": 0.0,
    "accuracy": 1.0,
    "format": 1.0,
}
ImageSimilarity = Literal["vq", "lpips_vgg", "lpips_alex", "ssim", "psnr", "mse", "rmse"]
CaptionSimilarity = Literal["tuples", "spice", "spice_py", "bertscore", "sentence", "jaccard", "soft_jaccard"]
Scaling = Literal["unit", "none"]


class RewardsConfig(Section):
    """R = cycle + tim + answer_weight (accuracy + format) + extra, each with its weight (arXiv 2505.17534, 3.2)."""

    answer_weight: NonNegative = 0.8
    """Lambda of the unified reward: weight of accuracy and format."""
    weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Weights by reward: cycle, tim, accuracy, format are 1 unless set, perceptual, caption, clip are 0."""
    scaling: Scaling = "unit"
    """Map each reward's range to [0, 1], as in the paper's third version, or leave it as it is."""
    scaling_of: dict[str, Scaling] = Field(default_factory=dict)
    """Exceptions to `scaling` by reward."""
    image_similarity: ImageSimilarity = "vq"
    """Image half of cycle: LPIPS's distance on the policy's own VQ encoder, LPIPS itself, or pixels."""
    lpips_trunk: str | None = None
    """torchvision's vgg16 or alexnet weights, a .pth or .safetensors file."""
    lpips_heads: str | None = None
    """LPIPS's linear layers; null takes those that the packages torchmetrics or lpips bring."""
    captioner: str = "quickstart"
    """Who recaptions drawings: a BLIP (folder or hub name), "policy" for the model itself, "quickstart" for the shipped
    BLIP."""
    caption_instruction: str = "Describe this image in one sentence."
    """What the policy is asked when it recaptions its own drawings."""
    caption_similarity: list[CaptionSimilarity] = Field(default_factory=lambda: ["tuples"])
    """Text half of cycle; the mean of several."""
    caption_tuples: str = "fastcorl.quickstart.grammar:scene_tuples"
    """For caption_similarity tuples: `module:function` from a caption to its set of scene-graph tuples."""
    bert: str | None = None
    """For bertscore: a BERT, folder or hub name."""
    bert_layer: int | None = None
    """Its layer; null is the published best one, or the last."""
    sentence_encoder: str | None = None
    """For caption_similarity sentence: a sentence encoder, folder or hub name."""
    spice_folder: str | None = None
    """For spice: the folder of spice-1.0.jar and its lib; null is that of the package pycocoevalcap."""
    tim: Literal["live", "frozen"] = "live"
    """Whose token states the matching reward compares: the policy's as it is trained, or as it was at the start."""
    clip: str | None = None
    """For the clip reward: a CLIP, folder or hub name."""
    accuracy: Literal["strict", "soft_jaccard"] = "strict"
    """Right or wrong, or partial credit for shared words as in the public code."""
    extra: dict[str, float] = Field(default_factory=dict)
    """More rewards by `module:function`, with their weights; each runs in a process of its own."""
    pairwise: dict[str, float] = Field(default_factory=dict)
    """Judges of two rows of a group by `module:function`, with weights; a row's reward is how often it wins."""
    timeout: Positive = 60.0
    """Seconds that a reward of `extra` or `pairwise` may take per step."""
    extra_on_gpu: bool = False
    """Let the processes of `extra` and `pairwise` see their rank's GPU."""

    @field_validator("weights", "scaling_of")
    @classmethod
    def _names_are_rewards(cls, settings: dict) -> dict:
        for name in settings:
            if name not in DEFAULT_WEIGHTS:
                raise ValueError(f"{name!r} is no reward ({', '.join(DEFAULT_WEIGHTS)}); `extra` holds yours")
        return settings

    @field_validator("caption_similarity")
    @classmethod
    def _some_similarity(cls, names: list) -> list:
        if not names:
            raise ValueError("must name at least one")
        return names

    @model_validator(mode="after")
    def _parts_have_their_files(self) -> "RewardsConfig":
        measure, captions = self.image_measure, self.caption_measures
        needs = [
            (
                (measure or "").startswith("lpips"),
                "lpips_trunk",
                f"image_similarity {measure}",
                "torchvision's weights",
            ),
            ("bertscore" in captions, "bert", "caption_similarity bertscore", "a folder or hub name"),
            ("sentence" in captions, "sentence_encoder", "caption_similarity sentence", "a folder or hub name"),
            (self.weight("clip") > 0, "clip", "the reward clip", "a folder or hub name"),
        ]
        for needed, key, why, what in needs:
            if needed and getattr(self, key) is None:
                raise ValueError(f"rewards.{key} must be given for {why}: {what}")
        both = self.extra.keys() & self.pairwise.keys()
        if both:
            raise ValueError(f"rewards.extra and rewards.pairwise both name {min(both)}; give them two functions")
        return self

    def weight(self, name: str) -> float:
        """Weight of a reward of ours, without `answer_weight`."""
        return self.weights.get(name, DEFAULT_WEIGHTS[name])

    @property
    def image_measure(self) -> ImageSimilarity | None:
        """`image_similarity`, where a reward with a weight asks for it."""
        return self.image_similarity if self.weight("cycle") or self.weight("perceptual") else None

    @property
    def caption_measures(self) -> list[CaptionSimilarity]:
        """`caption_similarity`, where a reward with a weight asks for it."""
        return self.caption_similarity if self.weight("cycle") or self.weight("caption") else []
