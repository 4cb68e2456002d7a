"""The processes that train one network together, by Hugging Face Accelerate; mostly one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lathe.training._batches import walk
from lathe.training._checkpoints import CheckpointError

__all__ = ["Forward", "Processes"]


class Forward(nn.Module):
    """The network as the loop calls it: in autocast where asked, with outputs of float32."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.model, self.device, self.bf16 = model, device, precision == "bf16"

    def forward(self, inputs: Any) -> Any:
        if not self.bf16:
            return self.model(inputs)
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.model(inputs)
        return walk(lambda part: part.float() if part.dtype is torch.bfloat16 else part, output)


class Processes:
    """The processes that train together, by Accelerate; mostly one."""

    def __init__(self, device: str | torch.device) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        try:
            wanted = torch.device(device)
            torch.empty(0, device=wanted)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device must be one of this machine, got {str(device)!r}") from error
        launched = torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.accelerator = Accelerator(cpu=launched and wanted.type == "cpu", device_placement=False)
        kind = self.accelerator.distributed_type
        if kind is not DistributedType.NO and not kind.value.startswith("MULTI_"):
            raise ValueError(
                f"fit trains on one device or data-parallel, but Accelerate was launched with {kind.value}"
            )
        if self.accelerator.scaler is not None:
            raise ValueError("fit trains in float32 or bf16, but Accelerate was launched with fp16")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = wanted if self.world == 1 else self.accelerator.device
        if self.device.type != wanted.type:
            raise ValueError(f"device is {str(device)!r}, but the processes were launched for {self.device.type!r}")

    def wrap(self, forward: nn.Module) -> nn.Module:
        return forward if self.world == 1 else self.accelerator.prepare_model(forward)

    def share_buffers(self, model: nn.Module) -> None:
        """Running statistics are those of the main process, as in its checkpoint."""
        if self.world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def mean(self, value: Tensor) -> Tensor:
        return value if self.world == 1 else self.accelerator.reduce(value, "mean")

    def all(self, value: Any) -> list[Any]:
        """The value of every process, in order."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def together(self, act: Callable[[], None]) -> None:
        """Act in the main process; where that fails, every process raises, so that none waits for ever."""
        error: Exception | None = None
        if self.rank == 0:
            try:
                act()
            except CheckpointError as caught:
                error = caught
        if (found := self.all(None if error is None else str(error))[0]) is not None:
            raise error or CheckpointError(found)
