"""What a call asks for, row by row, and whether it can fit."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fastcorl.errors import UserError
from fastcorl.records import Prompt
from fastcorl.rollout.room import Room
from fastcorl.rollout.sampling import row_seed


@dataclass(frozen=True)
class Request:
    """One row to sample: its place in the outputs, its seed, and its prompt, an index that rows of a group have in
    common. `prefix` is the prompt's length without its last token. A guided drawing decodes in two rows."""

    place: int
    seed: int
    prompt: int
    prefix: int
    modality: str
    guided: bool = False

    def prefixes(self) -> list[tuple[Hashable, int]]:
        """What each row of the request shares with others: identity and tokens, as `Room` counts them."""
        own = [((self.modality, self.prompt), self.prefix)]
        return [*own, (("unconditional", self.prefix), self.prefix)] if self.guided else own


def image_requests(
    prompts: Sequence[Prompt], draw_ids: Sequence[Sequence[int]], group_size: int, seed: object, *, guided: bool
) -> list[Request]:
    """By prompt. Captions of the same tokens are one prompt."""
    return _requests(prompts, draw_ids, [tuple(ids) for ids in draw_ids], group_size, seed, "image", guided)


def text_requests(
    prompts: Sequence[Prompt], ask_ids: Sequence[Sequence[int]], group_size: int, seed: object
) -> list[Request]:
    """By prompt. The same question about the same image object is one prompt."""
    keys = [(tuple(ids), id(prompts[index].image)) for index, ids in enumerate(ask_ids)]
    return _requests(prompts, ask_ids, keys, group_size, seed, "text", False)


def _requests(prompts, ids, keys, group_size: int, seed: object, modality: str, guided: bool) -> list[Request]:
    first: dict[Hashable, int] = {}
    requests = [
        Request(
            place=index * group_size + k,
            seed=row_seed(seed, prompts[index].id, k, modality),
            prompt=first.setdefault(key, index),
            prefix=len(ids[index]) - 1,
            modality=modality,
            guided=guided,
        )
        for index, key in enumerate(keys)
        for k in range(group_size)
    ]
    return sorted(requests, key=lambda request: request.prompt)  # rows of one prompt behind one another


def check_fits(requests: Sequence[Request], tokens: int, what: str, *, room: Room, context: int) -> None:
    """Refuse requests that could never run: `what` ("a drawing") of `tokens` tokens each.

    Raises UserError naming the numbers and the setting to change.
    """
    if not requests:
        return
    prompt = max(request.prefix for request in requests) + 1
    if prompt + tokens > context:
        raise UserError(
            f"{what} of {tokens} tokens after a prompt of {prompt} makes {prompt + tokens}; the model's context is "
            f"{context} tokens: shorten the prompt{' or rollout.max_new_tokens' if what == 'an answer' else ''}"
        )
    # The rest of a prompt's last page is copied, so the longest prompt need not take the most.
    for request in {request.prefix: request for request in requests}.values():
        room.require(request.prefixes(), tokens, what)
