"""A list of requests, shared out: to this process, to several of which any may be killed, or to a cluster."""

from __future__ import annotations

from tokenprune.study.workers.alone import Alone
from tokenprune.study.workers.contract import Make, Opened, Worker, Workers
from tokenprune.study.workers.on_ray import OnRay
from tokenprune.study.workers.pool import Pool
from tokenprune.study.workers.processes import Processes

__all__ = ["Alone", "Make", "OnRay", "Opened", "Pool", "Processes", "Worker", "Workers"]
