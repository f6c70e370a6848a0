"""datatrove's executor on this machine, without its log on the console; what fails in a task is raised here."""

from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger


class QuietExecutor(LocalPipelineExecutor):
    def run(self) -> Any:
        logger.disable("datatrove")
        return super().run()

    def _launch_run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        logger.disable("datatrove")  # here too: this runs in a worker
        return super()._launch_run_for_rank(*args, **kwargs)
