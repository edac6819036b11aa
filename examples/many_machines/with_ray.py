"""Evaluate with Ray: a task for each shard, then the report.

    python -m examples.many_machines.with_ray MODEL PATCH JUDGE REPORT [SHARDS]

REPORT is a folder that all machines see. Run with Ray 2.60 on one machine without a GPU, in two
tasks; the tests run `shard` and `report` without Ray.
"""

import sys
from typing import Any

import sepme_cli as sepme


def shard(said: str, model: str, patch: str, judge: str, folder: str, **options: Any) -> int:
    """Generate one part of the images, "3/16"; returns how many there were."""
    return sepme.evaluate_shard(
        model, patch, shard=said, judge=judge, report=folder, **options
    ).images


def report(model: str, patch: str, judge: str, folder: str, **options: Any) -> str:
    """Judge all images; returns the page to open."""
    return sepme.evaluate(model, patch, judge=judge, report=folder, **options).page


def main(model: str, patch: str, judge: str, folder: str, shards: str = "16") -> None:
    """Both on the cluster: the report is made on the same kind of device as the images."""
    import ray

    ray.init()
    # A task that asks for what the cluster has not waits for ever.
    remote = ray.remote(num_gpus=1 if ray.cluster_resources().get("GPU") else 0)
    parts = [
        remote(shard).remote(f"{number}/{shards}", model, patch, judge, folder)
        for number in range(1, int(shards) + 1)
    ]
    print(f"{sum(ray.get(parts))} images")
    print(ray.get(remote(report).remote(model, patch, judge, folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
