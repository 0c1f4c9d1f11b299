"""Under a launcher, `-m bench.all_reduce COUNT`: the median seconds in which ranks add COUNT float32 numbers."""

import json
import sys
import time
from statistics import median

import torch
import torch.distributed as dist


def main(count: int) -> None:
    dist.init_process_group("gloo")
    gradients, times = torch.ones(count), []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps(median(times)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
