"""The public data sets of CoRL (arXiv 2505.17534, appendix A.1), and the names their columns may bear.

Their cards give no schema. `prompt`, `real_image`, `qa_problem`, `qa_solution` and `qa_type` are what the paper's
public code, and a fork of it that trains the second stage, read from them. The other names are what sets of this kind
use, and are tried where those are absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("caption",),
    "real_image": ("image",),
    "qa_problem": ("problem", "question"),
    "qa_solution": ("solution", "answer"),
}


@dataclass(frozen=True)
class PublicData:
    """`question_type` is that of all its questions, or None where each row says it."""

    name: str
    question_type: str | None


PUBLIC_DATA = {
    data.name: data
    for data in (
        PublicData("mm-vl/x2x_rft_22k", None),
        PublicData("mm-vl/x2x_rft_16k", None),
        PublicData("mm-vl/mcot_r1_mcq_66k", "MC"),
        PublicData("mm-vl/mcot_r1_vqa_66k", "OE"),
    )
}


def public_data(source: str) -> PublicData | None:
    """The public data set that `source` names; a local copy in a folder of the same name counts."""
    last = source.rstrip("/").rpartition("/")[2].partition(":")[0]
    return next((data for name, data in PUBLIC_DATA.items() if last == name.partition("/")[2]), None)
