"""`fastcorl evaluate`."""

import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastcorl.commands.shared import load
from fastcorl.errors import UserError

if TYPE_CHECKING:
    from fastcorl.records import Prompt


@dataclass
class Evaluate:
    """Score models' drawings and answers on held-out rows; several models make a table of before and after."""

    model: list[str] = field(default_factory=lambda: ["quickstart"])
    """Folders or hub names of Janus models in the transformers format."""
    data: str = "fastcorl.quickstart.data:held_out"
    """Rows, in any form that data.train takes."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, in pairs: our column and the data set's."""
    split: str = "train"
    """Split of a data set of the hub."""
    questions: Literal["MC", "OE"] | None = None
    """Type of all questions, for rows that do not say it."""
    templates: dict[str, str] = field(default_factory=dict)
    """Text put around questions, in pairs of type (MC, OE) and text with {question}, as in training."""
    scorer: str | None = "fastcorl.quickstart.scorer:Scorer"
    """Judge of drawings, `module:class`; None scores answers only."""
    num_prompts: int = 256
    seed: str = "evaluation"
    """What the samples are drawn with; a run's own evaluations use "evaluation"."""
    temperature: float = 1.0
    """0 is greedy."""
    guidance: float = 1.0
    max_new_tokens: int = 56
    out: Path | None = None
    """Also write the scores as JSON, and as a Markdown table beside it."""
    device: str = "auto"

    def run(self) -> None:
        from fastcorl.evaluation import evaluate
        from fastcorl.plugins import load_object
        from fastcorl.rollout import RolloutEngine, SamplingParams
        from fastcorl.runtime.distributed import Distributed
        from fastcorl.runtime.report import score_table

        if self.num_prompts < 1:
            raise UserError(f"--num-prompts {self.num_prompts}: must be at least 1")
        if len(set(self.model)) < len(self.model) or not self.model:
            raise UserError("--model: give at least one model, and each once")
        try:
            params = SamplingParams(self.temperature, self.guidance, self.max_new_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error
        prompts = self._prompts()
        scorer = load_object(self.scorer, "--scorer")() if self.scorer else None
        entries = []
        for model in self.model:
            policy = load(model, self.device, templates=self.templates)
            ranks = Distributed(0, 1, policy.device)
            engine = RolloutEngine(policy, weight_version=0)
            scores = evaluate(engine, prompts, params, scorer, ranks=ranks, seed=self.seed)
            entries.append({"stage": model, "scores": scores})
        if len(entries) == 1:
            for name, value in entries[0]["scores"].items():
                print(f"{name:<10}{100 * value:6.1f} %")
        else:
            print(score_table(entries))
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            models = [{"model": entry["stage"], "scores": entry["scores"]} for entry in entries]
            self.out.write_text(json.dumps({"data": self.data, "prompts": len(prompts), "models": models}, indent=1))
            self.out.with_suffix(".md").write_text(score_table(entries))

    def _prompts(self) -> "list[Prompt]":
        from fastcorl.data import BadRow, Needs, examine, load_rows

        needs = Needs(draw=self.scorer is not None, answer=True)
        rows = load_rows(self.data, self.columns, "--data", needs=needs, question_type=self.questions, split=self.split)
        read = list(examine(islice(rows.numbered(), self.num_prompts), rows.schema))
        bad = [row for row in read if isinstance(row, BadRow)]
        if len(bad) == len(read):
            raise UserError(f"{bad[0]} (all {len(bad)} rows looked at are bad)")
        if bad:
            print(f"{len(bad)} of {len(read)} rows are bad and left out, the first: {bad[0]}", file=sys.stderr)
        return [row for row in read if not isinstance(row, BadRow)]
