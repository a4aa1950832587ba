"""The benchmark of the loss core measures every term."""

import torch

from streamvid.evaluation import bench_suites

CPU = torch.device("cpu")


def test_every_term_of_the_loss_core_is_measured():
    rows = bench_suites.losses((2, 4, 3, 4, 4), CPU, 1)
    by_name = {row[""]: row for row in rows}
    assert by_name["mse"]["time / MSE"] == 1 and by_name["mse"]["peak / MSE"] == 1
    assert len(rows) >= 30 and all(row["ms"] > 0 and row["peak MiB"] > 0 for row in rows)
