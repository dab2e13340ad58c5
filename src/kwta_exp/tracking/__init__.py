"""What ``tracking=`` chooses: where a run's epochs, results and figures are shown beside other runs."""

from kwta_exp.tracking.base import NoTracking, Tracking, followed, log_runs
from kwta_exp.tracking.mlflow import MLflow
from kwta_exp.tracking.tensorboard import TensorBoard
from kwta_exp.tracking.wandb import WandB

__all__ = ["MLflow", "NoTracking", "TensorBoard", "Tracking", "WandB", "followed", "log_runs"]
