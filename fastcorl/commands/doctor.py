"""`fastcorl doctor`."""

import re
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastcorl.commands.shared import check_flag
from fastcorl.config_data import check_columns
from fastcorl.errors import UserError
from fastcorl.first_checks import check_data

if TYPE_CHECKING:
    from fastcorl.data import BadRow, PromptLengths, Rows, RowStream

SHOWN_BAD_ROWS = 10
SYSTEM_FLAGS = ("data", "system", "json", "output_dir", "timeout")


@dataclass
class Doctor:
    """Look at the system without training: versions, GPUs, compilers, and which backends really work. With --data, look
    at a data set instead: its rows, questions, images, lengths, and what is wrong with it.

    Exit code 1 means that something needed is broken, or too many bad rows; 2 a source that cannot be read.
    """

    system: bool = False
    """Look at the system, with --data too."""
    json: bool = False
    """Print the report on the system as JSON."""
    output_dir: Path = Path("runs")
    """Where runs are to be written."""
    timeout: float = 120.0
    """Seconds until a library that is tried is taken to hang."""
    data: str | None = None
    """Data to look at, in any form that data.train takes."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, in pairs: our column (prompt, real_image, qa_problem, qa_solution, qa_type, pair_similarity) and the
    data set's."""
    split: str = "train"
    """Split of a data set of the hub, of a saved one, or of a folder of files."""
    revision: str | None = None
    """Commit or tag of a data set of the hub."""
    subset: str | None = None
    """Subset (configuration) of a data set of the hub."""
    streaming: bool = False
    """Read rows one after another, without downloading all."""
    task: Literal["unified", "alternate", "t2i", "mm2t", "mc", "oe"] = "unified"
    """What the data is for, which decides the columns it needs."""
    model: str | None = None
    """Folder or hub name of a Janus, whose tokenizer counts tokens; "quickstart" is the shipped one."""
    max_prompt_tokens: int = 1024
    """With a model: longest caption or question, image features included."""
    max_rows: int | None = None
    """Look at the first rows only."""
    max_bad_fraction: float = 0.01
    """Bad rows that are allowed, as data.max_bad_fraction."""

    def run(self) -> None:
        if not self.timeout > 0:
            raise UserError(f"--timeout {self.timeout:g}: must be above 0")
        if self.data is None:
            self._refuse_flags_of_data()
        elif self.json:
            raise UserError("--json: is the report on the system alone; leave --data out")
        fit = self._look_at_system() if self.system or self.data is None else True
        if self.data is not None:
            self._look_at_data(self.data)
        if not fit:
            raise SystemExit(1)

    def _refuse_flags_of_data(self) -> None:
        for each in fields(self):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name not in SYSTEM_FLAGS and getattr(self, each.name) != default:
                raise UserError(f"--{each.name.replace('_', '-')}: is about a data set; give --data")

    def _look_at_system(self) -> bool:
        from fastcorl.commands.doctor_system import as_json, as_text, examine_system, is_fit

        report = examine_system(self.output_dir, self.timeout)
        print(as_json(report) if self.json else as_text(report))
        return is_fit(report)

    def _look_at_data(self, source: str) -> None:
        check_flag("--columns", check_columns, self.columns)
        check_data(source, "--data")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"--max-rows {self.max_rows}: must be at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction}: must be from 0 to 1")
        try:
            passed = self._look(source)
        except UserError as error:
            text = str(error).replace("in data.columns, as in --data.columns", "as in --columns")
            raise UserError(text.replace("set data.streaming to true", "give --streaming")) from error
        if not passed:
            raise SystemExit(1)

    def _look(self, source: str) -> bool:
        from fastcorl.data import BadRow, Needs, PromptLengths, examine, load_rows, open_stream
        from fastcorl.tasks import TASKS

        draw, answer, types = TASKS[self.task]
        needs = Needs(draw, answer)
        lengths = None
        if self.model is not None:
            lengths = PromptLengths(_encoder(self.model), self.max_prompt_tokens, needs, "--max-prompt-tokens")
        rows = (open_stream if self.streaming else load_rows)(
            source,
            self.columns,
            "--data",
            needs=needs,
            question_type=types[0] if len(types) == 1 else None,
            split=self.split,
            revision=self.revision,
            subset=self.subset,
        )
        looked_at, kinds, sizes, bad = 0, Counter(), [], []
        for found in examine(islice(rows.numbered(), self.max_rows), rows.schema, lengths):
            looked_at += 1
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                kinds[found.question_type] += 1
                sizes.append(found.image.size)
        _print_rows(rows, looked_at, kinds if needs.answer else None, sizes, lengths)
        usable = not needs.answer or any(kinds[kind] for kind in types)
        if not usable:
            print(f"questions  no good row has one of type {' or '.join(types)}, which task {self.task} needs")
        return self._print_bad(bad, looked_at) and usable

    def _print_bad(self, bad: list["BadRow"], looked_at: int) -> bool:
        """Whether there are few enough bad rows."""
        passed = len(bad) <= self.max_bad_fraction * looked_at
        share = f"{100 * len(bad) / looked_at:.2f} %, allowed {100 * self.max_bad_fraction:g} %"
        print(f"bad rows   {len(bad)} of {looked_at} ({share}): {'fine' if passed else 'too many'}")
        for row in bad[:SHOWN_BAD_ROWS]:
            print(f"  row {row.row}: {row.column}: {row.reason}")
        reasons = Counter(f"{row.column}: {_kind_of(row.reason)}" for row in bad)
        if len(bad) > SHOWN_BAD_ROWS or len(reasons) < len(bad):
            print("  by reason:")
            for reason, count in reasons.most_common():
                print(f"  {count:7}  {reason}")
        return passed


def _print_rows(
    rows: "Rows | RowStream",
    looked_at: int,
    kinds: Counter | None,
    sizes: list[tuple[int, int]],
    lengths: "PromptLengths | None",
) -> None:
    total = f"{len(rows)}" if hasattr(rows, "__len__") else f"a stream of {len(rows.shards)} shards"
    print(f"rows       {total}, looked at {looked_at}")
    names = (ours if ours == their else f"{ours} = {their}" for ours, their in rows.schema.names.items())
    print(f"columns    {', '.join(names)}")
    if kinds is not None:
        print(f"questions  {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items())) or 'none'}")
    if sizes:
        by_area = sorted(sizes, key=lambda size: size[0] * size[1])
        low, middle, high = ("{}x{}".format(*by_area[place]) for place in (0, len(sizes) // 2, -1))
        print(f"images     {low} to {high}, median {middle}")
    if lengths is not None:
        for part, counts in (("captions", lengths.captions), ("questions", lengths.questions)):
            if counts:
                ordered = sorted(counts.elements())
                middle, most = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
                print(f"tokens     {part}: median {middle}, 95 % up to {most}, longest {ordered[-1]}")


def _kind_of(reason: str) -> str:
    """The reason without what differs from row to row."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "..", reason))[:100]


def _encoder(model: str):
    from transformers import AutoProcessor

    from fastcorl.model import PromptEncoder
    from fastcorl.model.loading import QUICKSTART_WEIGHTS

    try:
        processor = AutoProcessor.from_pretrained(QUICKSTART_WEIGHTS / "janus" if model == "quickstart" else model)
        return PromptEncoder(processor)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {model}: no processor of a Janus there: {' '.join(str(error).split())}") from error
