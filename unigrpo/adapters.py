"""LoRA: low-rank adapters beside the matrices of one or both experts, through peft.

    y = W x + (alpha / rank) B A x,   A keyed random, B = 0 at the start

Adapters are never merged into W: rollouts, replay and reference run the same modules, and the frozen part of a checkpoint
keeps its bytes. The reference of a run is the model with its adapters off. Adapters are float32 whatever the weights are,
so they are their own master weights. peft is imported where an adapter is made or read, nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unigrpo.seeding import generator

NAME = "default"
PREFIX = "base_model.model."  # of every key in a PEFT file
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
MATRICES = {"attention": ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            "mlp": ("mlp", ("gate_proj", "up_proj", "down_proj"))}


def adapter_pattern(experts: Sequence[str], targets: Sequence[str]) -> str:
    """Regular expression of the full names of the modules that get an adapter.

    Args:
        experts: of understanding, generation. targets: of attention, mlp.
    """
    places = []
    for expert in experts:
        suffix = {"understanding": "", "generation": "_moe_gen"}[expert]
        for target in targets:
            module, names = MATRICES[target]
            place = f"({'|'.join(names)})"
            places.append(rf"{module}\.{place}{suffix}" if target == "attention" else rf"{module}{suffix}\.{place}")
    return rf"language_model\.model\.layers\.\d+\.({'|'.join(places)})"


def add_lora(model: nn.Module, *, rank: int, alpha: int, targets: Sequence[str], experts: Sequence[str],
             seed: int = 0) -> None:
    """Put adapters on a model, in place; they alone require a gradient afterwards.

    Args:
        rank: r > 0. alpha: the adapters' output is scaled by alpha / rank.
        targets: of attention (q, k, v, o) and mlp (gate, up, down). experts: of understanding, generation.
        seed: A is drawn uniformly in +-1 / sqrt(in), keyed by seed and module name; B is zero, so nothing changes yet.
    Raises: ValueError if the model has adapters already.
    Source: LoRA arXiv:2106.09685; A's range is peft's.
    """
    from peft import LoraConfig

    if has_adapters(model):
        raise ValueError("the model has adapters already; training goes on from a checkpoint without an adapter/ folder")
    _inject(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none",
                              target_modules=adapter_pattern(experts, targets)))
    for name, parameter in adapter_parameters(model).items():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            values = generator(seed, "lora", name).uniform(-bound, bound, tuple(parameter.shape)).astype("float32")
            parameter.data.copy_(torch.from_numpy(values))
        else:
            parameter.data.zero_()


def _inject(model: nn.Module, config: Any) -> None:
    """Wrap the modules that the PEFT config names; adapters in float32."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, adapter_name=NAME)
    model.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every wrapped matrix."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def has_adapters(model: nn.Module) -> bool:
    """Whether any matrix is wrapped."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it was before its adapters were trained. Without adapters nothing happens."""
    modules = [module for _, module in adapted(model)]
    wanted = [p.requires_grad for module in modules for p in module.parameters()]
    try:
        for module in modules:
            module.enable_adapters(False)  # type: ignore[operator]
        yield
    finally:
        for module in modules:
            module.enable_adapters(True)  # type: ignore[operator]
        for parameter, value in zip((p for module in modules for p in module.parameters()), wanted, strict=True):
            parameter.requires_grad_(value)


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """Inside, the wrapped matrices stand in the model themselves, so that its state dict has the official keys."""
    wrapped = adapted(model)
    try:
        for name, module in wrapped:
            model.set_submodule(name, module.base_layer)  # type: ignore[arg-type]
        yield
    finally:
        for name, module in wrapped:
            model.set_submodule(name, module)


class AdapterState(nn.Module):
    """The part of an adapted model that training changes: what a resume folder holds instead of all weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters_of = lambda: adapter_parameters(model)  # not registered: the model is not this module's child

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Name -> tensor of all adapters."""
        return {name: p.detach() for name, p in self.parameters_of().items()}

    def load_state_dict(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Raises ValueError naming missing, extra and misshapen tensors."""
        copy_tensors(self.parameters_of(), tensors, "the adapters' state")


def copy_tensors(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], what: str) -> None:
    """Copy values by name. Raises ValueError naming every missing, extra and misshapen tensor."""
    problems = [f"missing tensor {name}" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"extra tensor {name}" for name in sorted(tensors.keys() - parameters.keys())]
    problems += [f"{name} must have shape {tuple(p.shape)}, got {tuple(tensors[name].shape)}"
                 for name, p in parameters.items() if name in tensors and p.shape != tensors[name].shape]
    if problems:
        raise ValueError(f"{what} does not fit the model: " + "; ".join(problems))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def save_adapter(folder: Path, model: nn.Module) -> None:
    """Write the model's adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors, deterministically."""
    config = next(iter(_peft_configs(model).values()))
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    values["inference_mode"] = True
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    save_file({PREFIX + name.replace(f".{NAME}.", "."): p.detach().cpu().contiguous()
               for name, p in adapter_parameters(model).items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _peft_configs(model: nn.Module) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError("the model has no adapters to save; set lora.rank in params")
    return configs


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a PEFT folder's adapters on a model that has none; they are not merged.

    Raises: ValueError naming a missing file, dropout, a model with adapters, and every tensor that does not fit.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"an adapter folder must hold {name}, and {folder} does not")
    if has_adapters(model):
        raise ValueError(f"{folder} cannot be put on a model that has adapters already")
    from peft import LoraConfig

    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if values.get("peft_type") != "LORA" or values.get("lora_dropout"):
        raise ValueError(f"{folder / CONFIG_FILE} must describe LoRA without dropout, got peft_type="
                         f"{values.get('peft_type')} and lora_dropout={values.get('lora_dropout')}")
    _inject(model, LoraConfig.from_pretrained(str(folder)))
    tensors = {key.removeprefix(PREFIX).replace(".lora_A.", f".lora_A.{NAME}.").replace(".lora_B.", f".lora_B.{NAME}."): value
               for key, value in load_file(folder / WEIGHTS_FILE).items()}
    copy_tensors(adapter_parameters(model), tensors, str(folder / WEIGHTS_FILE))
