"""The data of a run: what is held out, what each stage trains on, and what is wrong with rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastcorl.config import Config, StageConfig
from fastcorl.data import (
    BadRow,
    MapPrompts,
    Needs,
    PromptCheck,
    PromptLengths,
    PromptSource,
    Quarantine,
    Rows,
    RowStream,
    StreamPrompts,
    check_rows,
    evaluation_order,
    examine,
    hold_out,
    hold_out_of_stream,
    load_rows,
    open_stream,
)
from fastcorl.errors import UserError
from fastcorl.model import Policy
from fastcorl.records import Prompt
from fastcorl.runtime.distributed import Distributed
from fastcorl.tasks import TASKS, uses

Source = tuple[str, tuple[tuple[str, str], ...]]
"""A data set as the user names it, and its columns."""


class RunData:
    """Raises UserError for data that cannot be read, or too much of which is bad; collective calls throughout.

    Rows are looked at once per source. Bad ones are left out; `write_bad_rows` says where they are listed.
    """

    def __init__(
        self,
        config: Config,
        stages: dict[str, StageConfig],
        policy: Policy,
        caption_problem: Callable[[str], str | None],
        ranks: Distributed,
    ):
        """`caption_problem` tells what the rewards cannot do with a caption."""
        self.config, self.ranks = config, ranks
        # Not the policy itself, which would stay in memory for the whole run.
        self.encoder, self.num_image_tokens = policy.encoder, policy.num_image_tokens
        self.context: int = policy.janus.config.text_config.max_position_embeddings
        self.caption_problem = caption_problem
        self.trained = {name: stage for name, stage in stages.items() if stage.task != "merge"}
        self.quarantines: dict[str, Quarantine] = {}
        self.lengths: list[PromptLengths] = []
        self._sources: dict[Source, tuple[Rows | RowStream, Quarantine, PromptCheck]] = {}
        self._held: dict[Source, tuple[Sequence[Prompt], frozenset[str]]] = {}
        for name, stage in self.trained.items():
            self.prompts(name, stage)  # to find what is wrong with any of them
        self.held_out = self._held_out()
        self._check_longest()

    def prompts(self, name: str, stage: StageConfig) -> PromptSource:
        """What `stage` trains on, in the order of its steps."""
        config, types = self.config, TASKS[stage.task].question_types
        key = source_of(config, stage)
        rows, quarantine, check = self._open(key)
        excluded = self._reserved(key)[1] if config.data.held_out is None and key == self._first() else frozenset()
        common = {"seed": config.seed, "stage": name, "prompts_per_step": stage.prompts_per_step, "types": types}
        common |= {"quarantine": quarantine, "exclude": excluded | quarantine.left_out}
        if isinstance(rows, Rows):
            looked_at = config.data.check_rows == "all"
            return MapPrompts(rows, **common, check_prompt=None if looked_at else check)
        return StreamPrompts(rows, **common, check_prompt=check, shuffle_buffer=config.data.shuffle_buffer)

    def held_out_prompts(self) -> list[Prompt]:
        """Those of an evaluation, or as many as there are."""
        most = self.config.evaluation.num_prompts
        return [self.held_out[index] for index in range(min(most, len(self.held_out)))]

    def sizes(self) -> dict[str, int]:
        """Rows of each source that is no stream, and held-out ones."""
        opened = {key[0]: rows for key, (rows, *_) in self._sources.items() if isinstance(rows, Rows)}
        return {f"rows of {name}": len(rows) for name, rows in opened.items()} | {"held-out rows": len(self.held_out)}

    def notes(self) -> list[str]:
        """What a user should hear about the rows."""
        counts = [len(quarantine.bad) for quarantine in self.quarantines.values()]
        return [f"{sum(counts)} bad rows are left out, see bad_rows.jsonl"] if any(counts) else []

    def write_bad_rows(self, path: Path) -> None:
        """List bad rows in `path`, those found so far and those still to be met by this rank."""
        for quarantine in self.quarantines.values():
            quarantine.write_to(path)

    def _needs(self, key: Source) -> Needs:
        """What any stage that reads this source needs of it; of one that none reads, what evaluation does."""
        used = uses(self._readers(key))
        return Needs(used.draws, used.answers) if self._readers(key) else evaluation_needs(self.config)

    def _readers(self, key: Source) -> list[StageConfig]:
        return [stage for stage in self.trained.values() if source_of(self.config, stage) == key]

    def _open(self, key: Source) -> tuple[Rows | RowStream, Quarantine, PromptCheck]:
        data = self.config.data
        if key not in self._sources:
            source, columns = key[0], dict(key[1])
            needs, question_type = self._needs(key), uses(self._readers(key)).only_type
            open_rows = open_stream if data.streaming else load_rows
            rows = open_rows(source, columns, "data.train", needs=needs, question_type=question_type, **data.of_hub)
            check_pair_column(self.config, rows)
            quarantine, problem = self._checks(str(key), needs)
            # Rows that are only held out are looked at when they are taken.
            if isinstance(rows, Rows) and data.check_rows == "all" and self._readers(key):
                mine = range(self.ranks.rank, len(rows), self.ranks.world_size)
                found: list[list[BadRow]] = self.ranks.gather(check_rows(rows, mine, problem))
                bad = sorted((bad for part in found for bad in part), key=lambda bad: int(bad.row))
                quarantine.record(bad, len(rows))
            self._sources[key] = rows, quarantine, problem
        return self._sources[key]

    def _checks(self, name: str, needs: Needs) -> tuple[Quarantine, PromptCheck]:
        """Where bad rows of a source go, and what else makes a row bad."""
        quarantine = self.quarantines.setdefault(name, Quarantine(self.config.data.max_bad_fraction))
        lengths = PromptLengths(self.encoder, self.config.data.max_prompt_tokens, needs)
        self.lengths.append(lengths)

        def problem(prompt: Prompt) -> tuple[str, str] | None:
            found = lengths(prompt)
            reason = self.caption_problem(prompt.caption) if needs.draw and found is None else None
            return ("prompt", reason) if reason else found

        return quarantine, problem

    def _first(self) -> Source:
        """The source that held-out rows are taken from: the first stage's."""
        return source_of(self.config, next(iter(self.trained.values()), None))

    def _reserved(self, key: Source) -> tuple[Sequence[Prompt], frozenset[str]]:
        if key not in self._held:
            data = self.config.data
            rows, quarantine, check = self._open(key)
            if isinstance(rows, Rows):
                unseen = quarantine if data.check_rows == "used" or not self._readers(key) else None
                self._held[key] = hold_out(
                    rows, data.held_out_rows, quarantine.left_out, quarantine=unseen, check_prompt=check
                )
            else:
                self._held[key] = hold_out_of_stream(rows, data.held_out_rows, data.shuffle_buffer, quarantine, check)
        return self._held[key]

    def _held_out(self) -> Sequence[Prompt]:
        """As many prompts as an evaluation takes."""
        data, most = self.config.data, self.config.evaluation.num_prompts
        if data.held_out is None:
            return self._reserved(self._first())[0]
        needs = evaluation_needs(self.config)
        question_type = uses(self.trained.values()).only_type
        rows = load_rows(
            data.held_out, data.columns, "data.held_out", needs=needs, question_type=question_type, **data.of_hub
        )
        quarantine, problem = self._checks("data.held_out", needs)
        good: list[Prompt] = []
        bad: list[BadRow] = []
        for read in examine(rows.numbered(evaluation_order(rows)), rows.schema, problem):
            (bad if isinstance(read, BadRow) else good).append(read)
            if len(good) == most:
                break
        quarantine.record(bad, len(good) + len(bad))
        return good

    def _check_longest(self) -> None:
        """No sequence over the model's context or a pack; of rows that are not looked at yet, the limit counts."""
        config = self.config
        limit = config.data.max_prompt_tokens
        seen = config.data.check_rows == "all" and not config.data.streaming
        caption = max(lengths.longest_caption for lengths in self.lengths) if seen else limit
        question = max(lengths.longest_question for lengths in self.lengths) if seen else limit
        caption, question = self.ranks.reduce([float(caption), float(question)], "max")
        drawing = int(caption) + self.num_image_tokens
        answer = int(question) + config.rollout.max_new_tokens
        if max(drawing, answer) > self.context:
            raise UserError(
                f"the longest prompts with {self.num_image_tokens} image tokens or rollout.max_new_tokens "
                f"{config.rollout.max_new_tokens} make {max(drawing, answer)} tokens; "
                f"the model's context is {self.context}; lower rollout.max_new_tokens, or data.max_prompt_tokens"
            )
        guided = config.algorithm.policy_logits != "cond" and config.rollout.guidance != 1
        needed = max(2 * drawing if guided else drawing, answer)
        if needed > config.packing.tokens:
            raise UserError(f"packing.tokens {config.packing.tokens} must hold the longest sequence, {needed} tokens")


def source_of(config: Config, stage: StageConfig | None = None) -> Source:
    """What a stage trains on: its own data and columns, or those of the section data."""
    data = config.data
    columns = data.columns if stage is None or stage.columns is None else stage.columns
    return (stage and stage.data) or data.train, tuple(sorted(columns.items()))


def evaluation_needs(config: Config) -> Needs:
    """What held-out rows are for."""
    return Needs(draw=config.evaluation.scorer is not None, answer=True)


def check_pair_column(config: Config, rows: Rows | RowStream) -> None:
    """Raise UserError where advantages are to be multiplied by a column that the rows do not have."""
    if config.algorithm.pair_similarity and "pair_similarity" not in rows.schema.names:
        raise UserError(f"{rows.source}: algorithm.pair_similarity needs a column pair_similarity")
