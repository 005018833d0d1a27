"""The folder of one training run: what was asked, what was logged, and where to go on from.

`config.json` (the arguments), `log.jsonl` (a line a step), `last.safetensors` (weights, their
average, optimizer) and `metrics.json` (when the run has ended). Nothing is pickled; every file but
the log, which grows, replaces its predecessor in one go.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnlab.lab.files import atomic_write, write_json


class RunFolder:
    """The files in `path` of a run with the arguments `config`; `writes=False` only reads them."""

    def __init__(self, path: str | os.PathLike, config: dict[str, Any], writes: bool = True):
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))  # as it reads back: lists for tuples
        self.writes = writes
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.jsonl"
        self.state_file = self.path / "last.safetensors"
        self.metrics_file = self.path / "metrics.json"
        self.saved_step = 0

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.exists()

    def describe(self) -> str:
        """Which checkpoint is here, in words."""
        return f"step {self.saved_step} in {self.state_file}" if self.saved_step else "none yet"

    def check(self) -> None:
        """Raise ValueError naming every argument in which the run that is here differs.

        Also where its configuration cannot be read.
        """
        try:
            before = json.loads(self.config_file.read_text()) if self.exists() else self.config
        except ValueError as error:
            raise _damaged(self.config_file, error) from error
        different = [
            f"{name}={self.config.get(name)!r} where that run has {before.get(name)!r}"
            for name in sorted({*before, *self.config})
            if before.get(name) != self.config.get(name)
        ]
        if different:
            raise ValueError(
                f"run_dir={str(self.path)!r} holds a run with other arguments: "
                f"{'; '.join(different)}. Choose another run_dir, or start over with resume=False "
                "(--no-resume)"
            )

    def start(self) -> None:
        """Forget the run that was here, and write the configuration of this one."""
        if self.writes:
            for file in (self.state_file, self.log_file, self.metrics_file):
                file.unlink(missing_ok=True)
            write_json(self.config_file, self.config)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line to the log."""
        if self.writes:
            with open(self.log_file, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Cut the log behind `step`, and return what is left. ValueError when it is damaged."""
        lines = (
            self.log_file.read_text().splitlines(keepends=True) if self.log_file.exists() else []
        )
        try:
            complete = [json.loads(line) for line in lines if line.endswith("\n")]
            entries = [entry for entry in complete if entry["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(self.log_file, error) from error
        if self.writes:
            with atomic_write(self.log_file) as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return entries

    def save(
        self,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        step: int,
        seconds: float,
    ) -> None:
        """Write the checkpoint of `step`."""
        if not self.writes:
            return
        state = optimizer.state_dict()
        parts = {name: module.state_dict() for name, module in modules.items()}
        parts |= {f"state:{index}": slots for index, slots in state["state"].items()}
        parts |= {f"group:{index}": group for index, group in enumerate(state["param_groups"])}
        entries = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in entries.items() if key not in tensors}
        metadata = {"step": step, "seconds": seconds, "others": others}
        # Copies, because safetensors refuses tensors that share memory (tied weights).
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        with atomic_write(self.state_file) as temporary:
            save_file(copies, temporary, metadata={"attnlab": json.dumps(metadata)})
        self.saved_step = step

    def load(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float]:
        """Put the checkpoint into `modules` and `optimizer`: its step and seconds, or (0, 0.0).

        Raises ValueError when the file is damaged.
        """
        if not self.state_file.exists():
            return 0, 0.0
        try:
            with safe_open(self.state_file, framework="pt") as file:
                metadata = json.loads(file.metadata()["attnlab"])
                values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError) as error:
            raise _damaged(self.state_file, error) from error
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in (values | metadata["others"]).items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        for name, module in modules.items():
            module.load_state_dict(parts[name])
        numbered = [(*part.partition(":"), entries) for part, entries in parts.items()]
        state = {int(index): entries for kind, _, index, entries in numbered if kind == "state"}
        groups = {int(index): entries for kind, _, index, entries in numbered if kind == "group"}
        ordered = [groups[index] for index in range(len(groups))]
        optimizer.load_state_dict({"state": state, "param_groups": ordered})
        self.saved_step = metadata["step"]
        return metadata["step"], metadata["seconds"]

    def finish(self, metrics: list[dict[str, float]], seconds: float) -> None:
        """Write the metrics of the last evaluation and the run's duration."""
        if self.writes:
            last = metrics[-1] if metrics else {}
            write_json(self.metrics_file, {**last, "seconds": round(seconds, 1)})


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged ({error}); start over with resume=False (--no-resume)")
