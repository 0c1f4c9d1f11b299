from fastcorl.ordering import best_order, measure_transfer


def test_transfer_is_the_change_of_every_score():
    start = {"t2i": 0.5, "mc": 0.3}
    after = {"t2i": {"t2i": 0.7, "mc": 0.2}, "mc": {"t2i": 0.5, "mc": 0.6}}
    transfer = measure_transfer(["t2i", "mc"], start, after.__getitem__)
    assert transfer["mc"]["t2i"] == 0.2 - 0.3
    assert transfer["t2i"]["t2i"] == 0.7 - 0.5


def test_what_is_harmed_by_others_is_trained_last():
    transfer = {
        "t2i": {"t2i": 0.1, "mc": -0.3, "oe": -0.2},
        "mc": {"t2i": -0.1, "mc": 0.1, "oe": 0.1},
        "oe": {"t2i": 0.0, "mc": -0.1, "oe": 0.1},
    }
    # mc before oe (0.1 against -0.1), and drawing, which both harm, after them.
    assert best_order(["t2i", "mc", "oe"], transfer) == ["mc", "oe", "t2i"]


def test_without_any_transfer_the_given_order_stays():
    tasks = ["oe", "t2i", "mc"]
    assert best_order(tasks, {i: dict.fromkeys(tasks, 0.0) for i in tasks}) == tasks
