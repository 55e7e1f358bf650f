"""Resumable jobs: files of lines in, one answer per line out, each exactly once."""

from jllm.batch.inputs import Line
from jllm.batch.job import Job, JobConfig, open_job
from jllm.batch.leases import JobBusyError, LeaseLostError, declare_dead
from jllm.batch.progress import Progress
from jllm.batch.records import Answer
from jllm.batch.store import StorageError, Store
from jllm.batch.worker import Answerer, Outcome, Worker, summary

__all__ = [
    "Answer",
    "Answerer",
    "Job",
    "JobBusyError",
    "JobConfig",
    "LeaseLostError",
    "Line",
    "Outcome",
    "Progress",
    "StorageError",
    "Store",
    "Worker",
    "declare_dead",
    "open_job",
    "summary",
]
