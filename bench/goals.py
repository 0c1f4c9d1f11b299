"""What kernels, rollout and step are to reach, checked against the entries of one run."""

from dataclasses import dataclass

from bench.shapes import TALL

OURS = "fastcorl"


@dataclass(frozen=True)
class Goal:
    """``measure`` of our entry and the rival's is to be at most, or at least, ``bound``."""

    op: str
    shape: str
    rival: str  # a provider, "floor", or another shape of our own
    measure: str
    bound: float

    def value(self, entries):
        """The measured number, or None if the run lacks it."""
        ours = entries.get((self.op, self.shape, OURS))
        rival = entries.get((self.op, self.shape, self.rival)) or entries.get((self.op, self.rival, OURS))
        if ours is None or (rival is None and self.rival != "floor"):
            return None
        return MEASURES[self.measure][1](ours, rival)

    def reached(self, value):
        return value >= self.bound if MEASURES[self.measure][0] == "≥" else value <= self.bound


MEASURES = {
    "time / floor": ("≤", lambda ours, _: ours["ratio_to_floor"]),
    "TB/s": ("≥", lambda ours, _: ours["rate"] / 1e12),
    "times as fast as": ("≥", lambda ours, rival: rival["ratio_to_ours"]),
    "extra memory /": ("≤", lambda ours, rival: ours["extra_mib"] / rival["extra_mib"]),
    "time per sample /": ("≤", lambda ours, rival: rival["rate"] / ours["rate"]),
    "MFU": ("≥", lambda ours, _: ours.get("mfu")),
    "peak GiB": ("≤", lambda ours, _: ours["peak_mib"] / 1024),
    "efficiency": ("≥", lambda ours, _: ours["efficiency"]),
    "share of the floor": ("≥", lambda ours, _: 1 / ours["ratio_to_floor"]),
    "images/s": ("≥", lambda ours, _: ours["rate"]),
    "tokens/s": ("≥", lambda ours, _: ours["rate"]),
}

BASELINE = "plain trainer on transformers"
WHOLE, SINGLE = "transformers, whole batch", "transformers, prompt by prompt"

GOALS = (
    *(
        Goal(op, "small", rival, measure, bound)
        for op in ("selective_log_softmax", "grpo_loss")
        for rival in ("torch", "TRL")
        for measure, bound in (("times as fast as", 1.0), ("extra memory /", 0.2))
    ),
    Goal("linear_grpo_loss", "small, trained", "torch", "times as fast as", 1.0),
    Goal("linear_grpo_loss", "small, frozen", "torch", "times as fast as", 1.0),
    Goal("linear_grpo_loss", "small, trained, half masked", "torch", "times as fast as", 1.0),
    Goal("linear_grpo_loss", TALL, "small, trained", "extra memory /", 1.1),
    Goal("linear_grpo_loss", "Janus-Pro-1B text", "floor", "time / floor", 1.2),
    Goal("linear_grpo_loss", "Janus-Pro-1B text", "Liger, scaled cross-entropy", "times as fast as", 1.3),
    Goal("linear_grpo_loss", "Janus-Pro-1B text", "Liger, chunked", "times as fast as", 8.0),
    Goal("linear_grpo_loss", "Janus-Pro-1B image", "floor", "time / floor", 1.25),
    Goal("grpo_loss", "Janus-Pro text", "floor", "time / floor", 1.2),
    Goal("grpo_loss", "Janus-Pro text", "Liger", "times as fast as", 1.4),
    Goal("selective_log_softmax, forward", "Janus-Pro text", "floor", "TB/s", 3.5),
    Goal("rollout", "quickstart images", WHOLE, "times as fast as", 1.5),
    Goal("rollout", "91M images", WHOLE, "times as fast as", 2.0),
    *(
        goal
        for model in ("quickstart", "91M")
        for goal in (
            Goal("rollout", f"{model} answers", WHOLE, "times as fast as", 3.0),
            Goal("rollout", f"{model} images", SINGLE, "times as fast as", 4.0),
            Goal("rollout", f"{model} answers", SINGLE, "times as fast as", 4.0),
            Goal("rollout", f"{model} images", "floor", "share of the floor", 0.7),
            Goal("rollout", f"{model} answers", "floor", "share of the floor", 0.7),
        )
    ),
    *(
        Goal("rollout", shape, "fastcorl, two calls", "times as fast as", 1.2)
        for shape in ("quickstart mixed", "quickstart mixed, one prompt", "91M mixed, one prompt")
    ),
    Goal("rollout", "Janus-Pro-1B, 64 images", WHOLE, "times as fast as", 15.0),
    Goal("rollout", "Janus-Pro-1B, 128 images", "floor", "images/s", 33.0),
    Goal("rollout", "Janus-Pro-1B, 128 images", "floor", "share of the floor", 0.7),
    Goal("rollout", "Janus-Pro-1B, 128 answers", "floor", "tokens/s", 45_000.0),
    Goal("rollout", "Janus-Pro-1B, 128 answers", "floor", "share of the floor", 0.7),
    Goal("rollout", "Janus-Pro-1B, mixed", "fastcorl, two calls", "times as fast as", 1.2),
    *(
        Goal("step", model, BASELINE, measure, bound)
        for model in ("quickstart", "91M")
        for measure, bound in (("times as fast as", 4.0), ("extra memory /", 0.5))
    ),
    *(
        Goal("step", f"quickstart, {count} samples", "quickstart, 16 samples", "time per sample /", 1.05)
        for count in (64, 256)
    ),
    Goal("step", "Janus-Pro-1B", BASELINE, "times as fast as", 10.0),
    Goal("step", "Janus-Pro-1B", "floor", "MFU", 0.45),
    Goal("step", "Janus-Pro-1B", "floor", "peak GiB", 60.0),
    Goal("scaling", "quickstart, 2 ranks", "1 rank", "efficiency", 0.85),
)


def goal_rows(entries):
    """A markdown row for each goal that the entries can judge; ``entries`` by (op, shape, provider)."""
    for goal in GOALS:
        value = goal.value(entries)
        if value is not None:
            comparison = "" if goal.rival == "floor" else f" {goal.rival}"
            wanted = f"{goal.measure}{comparison} {MEASURES[goal.measure][0]} {goal.bound:g}"
            verdict = "reached" if goal.reached(value) else "**missed**"
            yield f"| {goal.op} | {goal.shape} | {wanted} | {value:.2f} | {verdict} |"
