"""Portable checkpoints: saved at one world size and backend, resumed at another; export to Hugging Face folders."""

from elastic_lsopt.checkpoint.checkpointer import Checkpointer, LoadReport, SaveReport
from elastic_lsopt.checkpoint.contents import TrainingState
from elastic_lsopt.checkpoint.folder import latest

__all__ = ["Checkpointer", "LoadReport", "SaveReport", "TrainingState", "latest"]
