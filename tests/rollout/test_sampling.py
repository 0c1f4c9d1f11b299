from fastcorl.rollout import row_seed


def test_row_seeds():
    seeds = [row_seed(*parts) for parts in [(0, "a", 1, "image"), (0, "a", 1, "text"), (0, "a", 2, "image"), (1, "a")]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    # Written down: a change of the hash would change every run.
    assert row_seed(0, "a", 1, "image") == 1251028823
