"""Weights spread over the processes of a stage: every process holds its rows of each of them, in float32 (FSDP2).

The layers are gathered one by one as a replay or its backward pass reaches them; what lies outside of them (embeddings, head,
final norms) for the whole pass. Gradients arrive as sums over the processes. Decoding takes as many calls as the longest
thinking of a process needs, so nothing may be gathered while it runs: sampling gathers all weights before, see `gathered`.
Files are those of whole weights, so any number of processes, with any layout, goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from unigrpo.checkpoint import optimizer_tensors, restore_optimizers
from unigrpo.distributed import World
from unigrpo.rollout import BagelPolicy
from unigrpo.types import Replay, Rollouts

T = TypeVar("T")
NEEDED = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "reset_iter_state")  # newer than FSDPModule


class Pass(nn.Module):
    """The outermost unit of sharding: inside its forward, what lies outside of the layers is whole, until the backward pass.

    The model's own forward would be too small a unit: embeddings and heads are used around it, and their gradients come after
    its inputs'. Nothing is returned, so that no hook hangs on what a loss takes gradients of.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], None]) -> None:
        """Do the work."""
        work()


class ShardedPolicy(BagelPolicy):
    """A policy whose weights are spread over processes; all of them make the same calls in the same order.

    Args:
        policy: whose model has whole weights; they are taken apart layer by layer, and may be maps of files.
        world: at least two processes.
        rounding: the type that the weights have when they are loaded, gathered and saved while training, torch.bfloat16 for
            bfloat16 compute with float32 masters. None: float32 throughout.
    """

    sharded = True

    def __init__(self, policy: BagelPolicy, world: World, *, rounding: torch.dtype | None = None) -> None:
        if missing := [name for name in NEEDED if not hasattr(FSDPModule, name)]:
            raise ValueError(f"compute.sharding=full needs a newer PyTorch than {torch.__version__}, whose FSDPModule has no "
                             f"{missing[0]}: constraints.txt names a version that is tested")
        self.__dict__.update(policy.__dict__)
        self.world, self.rounding = world, rounding
        device = torch.device(world.device)
        mesh = init_device_mesh(device.type, (world.size,))
        precision = MixedPrecisionPolicy(param_dtype=rounding, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.layers: list[Any] = list(self.model.language_model.model.layers)
        for layer in self.layers:
            fully_shard(masters(layer, device, rounding), mesh=mesh, mp_policy=precision)
        self.outer: Any = fully_shard(masters(Pass(self.model), device, rounding), mesh=mesh, mp_policy=precision,
                                      reshard_after_forward=False)
        for unit in (self.outer, *self.layers):
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)  # losses are weighted so that gradients add up
            unit.set_force_sum_reduction_for_comms(True)
        self.shards: dict[str, DTensor] = dict(self.model.named_parameters())  # type: ignore[arg-type]
        self.inside = False

    # ------------------------------------------------------------------------------------------------- gathering

    def settle(self) -> None:
        """Give up what is gathered: the model's parameters are the shards. No collective."""
        for unit in (self.outer, *self.layers):
            unit.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every process holds all weights in the type that computes, and calls of the model wait for nobody."""
        if self.inside:
            yield
            return
        self.inside = True
        try:
            with self.world.waiting("gathering weights"):
                self.outer(lambda: None)
                for layer in self.layers:
                    layer.set_reshard_after_forward(False)
                    layer.unshard()
            yield
        finally:
            for layer in self.layers:
                layer.set_reshard_after_forward(True)
            self.outer.reset_iter_state()  # also forgets in which order layers were called: no backward follows from it
            self.inside = False

    def _pass(self, work: Callable[[], T]) -> T:
        """One forward of the model, or several: layers are gathered as they are reached."""
        if self.inside:
            return work()
        results: list[T] = []
        self.inside = True
        try:
            self.outer(lambda: results.append(work()))
        finally:
            self.inside = False
        return results[0]

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        """See BagelPolicy.generate; all weights are whole meanwhile."""
        with self.gathered():
            return super().generate(*args, **kwargs)

    def replay(self, rollouts: Rollouts, *, velocities: bool = True) -> Replay:
        """See BagelPolicy.replay."""
        return self._pass(lambda: super(ShardedPolicy, self).replay(rollouts, velocities=velocities))

    def packed(self, tokens: Tensor, lengths: Tensor, latents: Tensor | None, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """See BagelPolicy.packed. The head stays whole behind it, until a backward pass or `settle`."""
        return self._pass(lambda: super(ShardedPolicy, self).packed(tokens, lengths, latents, sigma))

    # ------------------------------------------------------------------------------------------------- reference

    def freeze_reference(self, names: Sequence[str]) -> None:
        """Remember today's values of the named parameters: of each, this process's rows, in float32."""
        self.reference_weights = {name: self.shards[name].detach().clone() for name in names}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the shards hold the reference's values, and the frozen copy holds theirs: no third copy is made."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.settle()
        for name, frozen in self.reference_weights.items():
            own, other = self.shards[name].to_local(), frozen.to_local()  # type: ignore[attr-defined]
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)

    # ------------------------------------------------------------------------------------------------- files

    def whole_weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds, on the CPU of the main process; {} in the others. All of them take part.

        Args:
            dtype: of the weights; the one that they are gathered in by default.
        """
        return self._whole(self.shards, self.rounding if dtype is None else dtype)

    def training_files(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
        """What a training state holds, as from whole weights: model, optimizer, extra. On the CPU of the main process."""
        state: dict[str, Tensor] = optimizer_tensors(optimizers)
        if self.rounding is not None:  # with their weights in another type, the float32 values are the optimizer's
            state |= {f"{i}.{index}.master": p for i, index, p in _numbered(optimizers)}
        return {"model": self._whole(self.shards, self.rounding), "optimizer": self._whole(state, None),
                "extra": self._whole(self.reference_weights, self.rounding)}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Inverse of `training_files`: each process takes its rows. Raises ValueError where the names are not the model's."""
        self.settle()
        model, state = tensors["model"], dict(tensors["optimizer"])
        if set(model) != set(self.shards):
            raise ValueError(f"a training state must hold the model's tensors, and these differ: "
                             f"{sorted(set(model) ^ set(self.shards))[:5]}; remove the resume folder to start again")
        for name, shard in self.shards.items():
            self._fill(shard, model[name])
        if self.rounding is not None:
            masters = {f"{i}.{index}.master": p for i, index, p in _numbered(optimizers)}
            if missing := [key for key in masters if key not in state]:
                raise ValueError(f"an optimizer state of float32 masters must hold all {len(masters)}, {len(missing)} are "
                                 "missing; it was saved with another train.precision")
            for key, shard in masters.items():
                self._fill(shard, state.pop(key))
        parameters = {f"{i}.{index}": p for i, index, p in _numbered(optimizers)}
        restore_optimizers(optimizers, {key: self._spread(value, like=parameters[key.rpartition(".")[0]])
                                        for key, value in state.items()})
        self.reference_weights = {name: self._spread(value, like=self.shards[name])
                                  for name, value in tensors["extra"].items()}

    def _whole(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Tensors put together one by one."""
        self.settle()
        found = {}
        for name, value in tensors.items():
            value = value.detach()
            with self.world.waiting(f"putting {name} together"):
                full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.world.main:
                found[name] = (full if dtype is None else full.to(dtype)).cpu()
        return found

    @torch.no_grad()
    def _fill(self, shard: DTensor, whole: Tensor) -> None:
        """Copy this process's rows of a whole tensor into its shard. Raises ValueError where the shape is another."""
        if whole.shape != shard.shape:
            raise ValueError(f"a saved tensor must have shape {tuple(shard.shape)}, got {tuple(whole.shape)}; remove the "
                             "resume folder to start again")
        local = shard.to_local()
        start = -(-len(whole) // self.world.size) * self.world.rank
        local.copy_(whole[start:start + len(local)])

    def _spread(self, whole: Tensor, *, like: DTensor) -> Tensor:
        """A sharded copy in float32; what has no rows (an optimizer's count of steps) stays as it is."""
        if not whole.ndim:
            return whole
        shard = cast(DTensor, torch.zeros_like(like.detach()))
        self._fill(shard, whole)
        return shard


def masters(module: nn.Module, device: torch.device, rounding: torch.dtype | None) -> nn.Module:
    """Its whole weights on a device in float32, of numbers that `rounding` can hold; sharded parts stay as they are."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if not isinstance(p, DTensor):
                value = p.detach() if rounding is None else p.detach().to(rounding)
                setattr(part, name, nn.Parameter(value.to(device, torch.float32), requires_grad=p.requires_grad))
    return module


def _numbered(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[int, int, DTensor]]:
    """(optimizer, parameter's place in it, parameter), as a state's keys count them."""
    for i, optimizer in enumerate(optimizers):
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            yield i, index, p
