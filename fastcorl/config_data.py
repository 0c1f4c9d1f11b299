"""What a run is told about its data."""

from typing import Literal

from pydantic import Field, field_validator

from fastcorl.config_base import Fraction, PositiveInt, Section

COLUMNS = ("prompt", "real_image", "qa_problem", "qa_solution", "qa_type")
OPTIONAL_COLUMNS = ("pair_similarity",)
QUESTION_TYPES = ("MC", "OE")


def check_columns(columns: dict[str, str]) -> dict[str, str]:
    """`columns` if its keys are names of ours."""
    for name in columns:
        if name not in (*COLUMNS, *OPTIONAL_COLUMNS):
            raise ValueError(f"{name!r} is none of our columns ({', '.join((*COLUMNS, *OPTIONAL_COLUMNS))})")
    return columns


def check_templates(templates: dict[str, str]) -> dict[str, str]:
    """`templates` if each is of a question type and has a place for the question."""
    for kind, template in templates.items():
        if kind not in QUESTION_TYPES:
            raise ValueError(f"{kind!r} is no question type ({', '.join(QUESTION_TYPES)})")
        try:
            filled = template.format(question="\0")
        except (LookupError, ValueError):
            raise ValueError(f"{kind}: must have no braces but those of {{question}}") from None
        if "\0" not in filled:
            raise ValueError(f"{kind}: must contain {{question}}")
    return templates


class DataConfig(Section):
    train: str = "fastcorl.quickstart.data:train"
    """Training rows: `module:function`, a data set of the hub (owner/name), or local parquet, jsonl, a saved data set
    or a folder of images."""
    held_out: str | None = "fastcorl.quickstart.data:held_out"
    """Rows for evaluation, in the same forms; null keeps `held_out_rows` of the training rows for it."""
    held_out_rows: PositiveInt = 256
    """With held_out null: rows that no stage trains on."""
    subset: str | None = None
    """Subset (configuration) of a data set of the hub; null is its default one."""
    split: str = "train"
    """Split of a data set of the hub, of a saved one, or of a folder of files."""
    revision: str | None = None
    """Commit or tag of a data set of the hub."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: our column (prompt, real_image, qa_problem, qa_solution, qa_type, pair_similarity) to the data set's."""
    templates: dict[str, str] = Field(default_factory=dict)
    """Text put around a question, by its type (MC, OE); must contain {question}."""
    streaming: bool = False
    """Read training rows as they are needed instead of before the run."""
    shuffle_buffer: PositiveInt = 1000
    """Rows in the buffer from which streaming picks the next one at random."""
    check_rows: Literal["all", "used"] = "all"
    """Look at every row before the run, or at each when it is taken, as streaming always does."""
    max_bad_fraction: Fraction = 0.01
    """Bad rows are left out and listed in bad_rows.jsonl; more of them than this fraction stop the run."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest caption or question, image features included, in tokens."""

    _columns_are_ours = field_validator("columns")(check_columns)

    _templates_have_a_place = field_validator("templates")(check_templates)

    @property
    def of_hub(self) -> dict[str, str | None]:
        """What of a data set of the hub is meant."""
        return {"subset": self.subset, "split": self.split, "revision": self.revision}
