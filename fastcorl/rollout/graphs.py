"""CUDA graphs of decode steps, one per pair of row numbers, captured when first needed."""

from collections.abc import Callable

import torch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def bucket(count: int) -> int:
    """The number of rows that `count` rows are stepped as: few enough numbers that each has its graph."""
    if count == 0:
        return 0
    if count > BUCKETS[-1]:
        return -(-count // 64) * 64
    return next(size for size in BUCKETS if size >= count)


class StepGraphs:
    """Runs `step(images, texts)`, always the same function, as a graph. The step must read and write device memory that
    stays where it is, and must not look at the host's state.

    The first step of a size runs as it is, which compiles its kernels and lets libraries allocate; it is then captured,
    which runs nothing, for the steps to come. On a CPU every step runs as it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool = None

    def run(self, step: Callable[[int, int], None], images: int, texts: int) -> None:
        graph = self.graphs.get((images, texts))
        if graph is not None:
            graph.replay()
            return
        step(images, texts)
        if self.device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads, a reward's or DeepSpeed's, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step(images, texts)
        self.pool = self.pool or graph.pool()
        self.graphs[images, texts] = graph
