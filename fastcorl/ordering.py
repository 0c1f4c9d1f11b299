"""In which order to refine: measured by how much training each task changes the others (Omni-Thinker, Li et al. 2025,
arXiv 2507.14783).

The transfer of task j on task i is the change of i's score by a short training of j. Training i brings i forward
whenever it comes; what is trained after it moves it by its transfer. So the best order is the one that maximises the
sum of the transfers of later tasks on earlier ones.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, permutations

Scores = dict[str, float]
Transfer = dict[str, Scores]


def measure_transfer(tasks: Sequence[str], start: Scores, train: Callable[[str], Scores]) -> Transfer:
    """transfer[i][j] for tasks i and j: by how much `train(j)` changes the score of i. It starts over at every call and
    returns the scores of all tasks."""
    after = {task: train(task) for task in tasks}
    return {i: {j: after[j][i] - start[i] for j in tasks} for i in tasks}


def best_order(tasks: Sequence[str], transfer: Transfer) -> list[str]:
    """The order of least forgetting; of equal ones the first in the order of `tasks`."""

    def kept(order: Sequence[str]) -> float:
        return sum(transfer[earlier][later] for earlier, later in combinations(order, 2))

    return list(max(permutations(tasks), key=kept))
