"""What a training run tells while it runs."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnlab.lab.run_folder import RunFolder


class TrainingDiverged(FloatingPointError):
    """The loss or its gradient is NaN or infinite."""


@dataclass
class History:
    """What a run logged: per step `steps` (from 1), `loss`, `lr`; per evaluation `metrics`."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)  # each with its "step"
    seconds: float = 0.0

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line of the log: a step's, or an evaluation's."""
        if "metrics" in entry:
            self.metrics.append({"step": entry["step"], **entry["metrics"]})
        else:
            self.steps.append(entry["step"])
            self.loss.append(entry["loss"])
            self.lr.append(entry["lr"])

    def __repr__(self) -> str:
        last = f", last loss {self.loss[-1]:.3f}" if self.loss else ""
        return f"History({len(self.steps)} steps{last}, {self.seconds:.0f} s)"


class RunLog:
    """The history of a run, in memory and in its folder; losses are read from the device late."""

    def __init__(self, folder: RunFolder | None, processes: int):
        self.folder, self.processes = folder, processes
        self.history = History()
        self.unread: list[tuple[int, float, Tensor]] = []

    def open(
        self, resume: bool, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> int:
        """Restore what the folder holds, or start it anew; the number of steps that are done."""
        if self.folder is None:
            return 0
        if resume:
            self.folder.check()
        self._wait()  # until all processes have read what one of them may now replace
        if not (resume and self.folder.exists()):
            self.folder.start()
        self._wait()
        steps, self.history.seconds = self.folder.load(modules, optimizer)
        for entry in self.folder.rewind(steps):
            self.history.add(entry)
        return steps

    def add(self, step: int, lr: float, loss: Tensor, norm: Tensor) -> None:
        """Note a step, without waiting for its loss and the norm of its gradient."""
        self.unread.append((step, lr, torch.stack([loss.float(), norm.float()])))

    def read(self) -> float:
        """Wait for the steps noted since the last call, write them, and return the last loss.

        Raises TrainingDiverged at the first one that is not finite.
        """
        values = torch.stack([value for *_, value in self.unread])
        if self.processes > 1:
            dist.all_reduce(values)
            values /= self.processes
        for (step, lr, _), (loss, norm) in zip(self.unread, values.tolist(), strict=True):
            if not math.isfinite(loss + norm):
                raise TrainingDiverged(
                    f"the loss is {loss} and the norm of its gradient {norm} at step {step} "
                    f"(lr {lr:.3g}). Try a lower lr or a longer warmup, and look for values in the "
                    f"data that are not finite. Last good checkpoint: "
                    f"{self.folder.describe() if self.folder else 'none, run_dir was not given'}"
                )
            self.write({"step": step, "loss": loss, "grad_norm": norm, "lr": lr})
        self.unread.clear()
        return loss

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry to the history and to the folder's log."""
        self.history.add(entry)
        if self.folder:
            self.folder.append(entry)

    def close(self) -> None:
        """Write how the run ended, and wait until every process gets here."""
        if self.folder:
            self.folder.finish(self.history.metrics, self.history.seconds)
        self._wait()

    def _wait(self) -> None:
        if self.processes > 1:
            dist.barrier()
