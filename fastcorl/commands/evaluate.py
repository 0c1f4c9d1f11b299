"""`fastcorl evaluate`."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastcorl.commands.shared import check_counts, check_flag, load, make_params, writable_file
from fastcorl.config_data import check_columns, check_templates
from fastcorl.errors import UserError
from fastcorl.first_checks import check_data
from fastcorl.places import check_janus
from fastcorl.plugins import check_module

if TYPE_CHECKING:
    from fastcorl.records import Prompt

QUICKSTART_ROWS = "fastcorl.quickstart.data:held_out"
QUICKSTART_SCORER = "fastcorl.quickstart.scorer:Scorer"


@dataclass
class Evaluate:
    """Score models' drawings and answers on held-out rows; several models make a table of before and after."""

    model: list[str] = field(default_factory=lambda: ["quickstart"])
    """Folders or hub names of Janus models in the transformers format."""
    data: str = QUICKSTART_ROWS
    """Rows, in any form that data.train takes."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, in pairs: our column and the data set's."""
    subset: str | None = None
    """Subset (configuration) of a data set of the hub."""
    split: str = "train"
    """Split of a data set of the hub, of a saved one, or of a folder of files."""
    revision: str | None = None
    """Commit or tag of a data set of the hub."""
    streaming: bool = False
    """Read rows one after another, without downloading all; the first good ones then count."""
    questions: Literal["MC", "OE"] | None = None
    """Type of all questions, for rows that do not say it."""
    templates: dict[str, str] = field(default_factory=dict)
    """Text put around questions, in pairs of type (MC, OE) and text with {question}, as in training."""
    scorer: str | None = "auto"
    """Judge of drawings, `module:class`; None scores answers only, and so does auto but on the quickstart's rows."""
    num_prompts: int = 256
    """Held-out rows to score."""
    seed: str = "evaluation"
    """What the samples are drawn with; a run's own evaluations use "evaluation"."""
    temperature: float = 1.0
    """0 is greedy."""
    guidance: float = 1.0
    """Classifier-free guidance of drawings: 1 as the quickstart trains; Janus-Pro is published with 5."""
    max_new_tokens: int = 56
    """Longest answer in tokens: for Janus-Pro give 512, or its answers are cut off and count as wrong."""
    out: Path | None = None
    """Also write the scores to this .json file, and as a Markdown table beside it."""
    device: str = "auto"

    def run(self) -> None:
        check_counts(self, "num_prompts")
        if len(set(self.model)) < len(self.model) or not self.model:
            raise UserError("--model: give at least one model, and each once")
        for model in self.model:
            check_janus(model, "--model")
        check_flag("--columns", check_columns, self.columns)
        check_flag("--templates", check_templates, self.templates)
        check_data(self.data, "--data")
        spec = self.scorer
        if spec == "auto":
            spec = QUICKSTART_SCORER if self.data == QUICKSTART_ROWS else None
        if spec:
            check_module(spec, "--scorer")
        if self.out:
            writable_file("--out", self.out, ".json")

        from fastcorl.evaluation import load_scorer
        from fastcorl.runtime.report import score_table

        params = make_params(self.temperature, guidance=self.guidance, max_new_tokens=self.max_new_tokens)
        scorer = load_scorer(spec, "--scorer")
        rows = self._rows(draw=scorer is not None)
        entries = [{"stage": model, "scores": self._score(model, rows, params, scorer)} for model in self.model]
        if len(entries) == 1:
            for name, value in entries[0]["scores"].items():
                print(f"{name:<10}{100 * value:6.1f} %")
        else:
            print(score_table(entries))
        if self.out:
            models = [{"model": entry["stage"], "scores": entry["scores"]} for entry in entries]
            self.out.write_text(
                json.dumps({"data": self.data, "prompts": self.num_prompts, "models": models}, indent=1)
            )
            self.out.with_suffix(".md").write_text(score_table(entries))

    def _rows(self, *, draw: bool):
        from fastcorl.data import Needs, load_rows, open_stream

        return (open_stream if self.streaming else load_rows)(
            self.data,
            self.columns,
            "--data",
            needs=Needs(draw=draw, answer=True),
            question_type=self.questions,
            split=self.split,
            revision=self.revision,
            subset=self.subset,
        )

    def _score(self, model: str, rows, params, scorer) -> dict[str, float]:
        """Of one model, which is gone from memory afterwards."""
        from fastcorl.evaluation import evaluate
        from fastcorl.rollout import RolloutEngine
        from fastcorl.runtime.distributed import Distributed

        policy = load(model, self.device, templates=self.templates)
        prompts = self._prompts(rows, policy)
        ranks = Distributed(0, 1, policy.device)
        engine = RolloutEngine(policy, weight_version=0)
        return evaluate(engine, prompts, params, scorer, ranks=ranks, seed=self.seed)

    def _prompts(self, rows, policy) -> "list[Prompt]":
        """Those that this model can take."""
        from fastcorl.data import BadRow, PromptLengths, evaluation_order, examine

        room = policy.janus.config.text_config.max_position_embeddings - self.max_new_tokens
        lengths = PromptLengths(policy.encoder, room, rows.schema.needs, "the room that --max-new-tokens leaves")
        numbered = rows.numbered() if self.streaming else rows.numbered(evaluation_order(rows))
        good, bad = [], []
        for read in examine(numbered, rows.schema, lengths):
            (bad if isinstance(read, BadRow) else good).append(read)
            if len(good) == self.num_prompts or (not good and len(bad) >= self.num_prompts):
                break
        if not good:
            raise UserError(f"{bad[0]} (all {len(bad)} rows looked at are bad)")
        if bad:
            print(f"{len(bad)} bad rows are left out, the first: {bad[0]}", file=sys.stderr)
        return good
