"""vLLM's CPU worker with the hook for positions: ``--worker-cls tokenprune_vllm.cpu.Worker``.

The runner of vLLM 0.32 for GPUs notes whether a model prunes when it has loaded it; the one for CPUs, which loads in
its own way, does not, and survivors would not get their positions.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        settings = self.model_config.multimodal_config
        asked = settings is not None and settings.is_multimodal_pruning_enabled()
        self.model_runner.is_multimodal_pruning_enabled = asked and supports_multimodal_pruning(
            self.model_runner.get_model()
        )
