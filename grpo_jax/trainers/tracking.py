"""The trackers in a run's config: Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.hosts import processes
from grpo_jax.metrics import trackers


def asked(config: ConfigDict, is_tracked: bool = True) -> trackers.Asked:
    """The trackers of a run; none if the run is not tracked, such as a supervised start."""
    logging = config.logging
    if not is_tracked:
        return trackers.Asked()
    return trackers.Asked(
        wandb_project=logging.wandb_project,
        wandb_entity=logging.wandb_entity,
        mlflow_experiment=logging.mlflow_experiment,
        trackio_project=logging.trackio_project,
        run_name=logging.run_name,
        tags=tuple(map(str, logging.tags)),
    )


def check(config: ConfigDict) -> None:
    """Raises ValueError if a tracker lacks its package or login, on the process that writes."""
    if processes.is_first():
        trackers.check(asked(config))
