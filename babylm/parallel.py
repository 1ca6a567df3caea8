"""Models too large for one device, and processes that have to agree.

- `training.fsdp: true`: torch's FSDP2 (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP") cuts every weight, its gradient and its optimizer
  state into as many parts as there are processes. A block's weights are whole on a device only while the block is computed. What is
  saved is whole again, in the files that other runs write, so that any number of processes goes on from it, sharded or not.
- `distillation.offload_teacher: true`: a teacher's blocks wait in host memory and visit the device one at a time.
- `require_same_view`: all processes read the same data and see the same run folder, also where they are on several nodes.
"""

import os
import socket
import warnings
from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from babylm.config import RunConfig
from babylm.run_folder import RunFolder
from babylm.schema import UserError

# ---- What the launcher asks for -------------------------------------------------------------------------------------


def read_launcher(config: RunConfig) -> None:
    """Turn `accelerate launch` with `distributed_type: FSDP` into training.fsdp, and refuse what does not go with sharding.

    Sharding is done here and not by accelerate, which cannot on a CPU, and saves in a format of its own: of its settings only
    the switch is read. Nor does its mixed_precision count: training.precision is what a run's record says.

    Raises:
        UserError: the launcher asks for what would be ignored, or the stage or the run cannot be sharded.
    """
    training = config.training
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # else it would win over training.precision: fp32
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError("accelerate launch: DeepSpeed is not supported: use configs/accelerate/fsdp.yaml")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        ignored = {"fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", "a smaller training.per_device_batch_size or more processes"),
                   "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", "training.gradient_checkpointing=true")}
        for key, (variable, instead) in ignored.items():
            if os.environ.get(variable, "false").lower() == "true":
                raise UserError(f"accelerate launch: {key} is not supported: use {instead}")
        if not hasattr(training, "fsdp"):
            raise UserError("accelerate launch: stage 6 is not sharded: use configs/accelerate/ddp.yaml")
        training.fsdp = True
    if not getattr(training, "fsdp", False):
        return
    if getattr(config, "lora", None) and config.lora.mode != "none":
        raise UserError(f"training.fsdp shards what is trained in full; with lora.mode: {config.lora.mode} only small adapters are: use "
                        "fsdp: false (configs/accelerate/ddp.yaml), and qlora where the base itself does not fit")
    for key, wrong in (("compile", training.compile), ("precision", training.precision == "fp16")):
        if wrong:
            raise UserError(f"training.{key}: {getattr(training, key)} does not go with training.fsdp: use "
                            f"{'compile: false' if key == 'compile' else 'bf16 or fp32'}")
    if getattr(config, "distillation", None) and config.distillation.offload_teacher:
        raise UserError("distillation.offload_teacher does not go with training.fsdp, which shards the teachers too: choose one")


def raise_in_all(error: UserError | None) -> None:
    """Raise in every process what one of them was told; a process that ended alone would leave the others waiting for it."""
    if told := [message for message in gather_object([str(error) if error else None]) if message]:
        raise error or UserError(told[0])


def require_same_view(folder: RunFolder, data: dict[str, str]) -> None:
    """UserError where a process reads other data than the main one, or does not see the run folder that the main one has opened.

    Args:
        data: fingerprints of what is read, by name.
    """
    mine = {"data": data, "resume_from": str(folder.resume_from), "seen": folder.run.is_dir(), "host": socket.gethostname()}
    views = gather_object([mine])
    main = views[0]
    for rank, view in enumerate(views):
        if (view["seen"], view["resume_from"]) != (main["seen"], main["resume_from"]):
            raise UserError(f"process {rank} on {view['host']} does not see {folder.root} as process 0 on {main['host']} does: all nodes "
                            "need the run folder, so put output= on a file system that they share")
        if changed := [name for name, value in view["data"].items() if main["data"].get(name) != value]:
            raise UserError(f"process {rank} on {view['host']} reads other data than process 0 on {main['host']}: {', '.join(changed)}. "
                            "Put corpus and models on a file system that the nodes share, or copy the same ones to each")


# ---- Sharding -------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that a transformers model declares indivisible: its blocks. UserError where it declares none."""
    names, found = set(getattr(model, "_no_split_modules", None) or ()), {}
    for path, module in model.named_modules():
        if type(module).__name__ in names and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    if not found:
        raise UserError(f"{type(model).__name__} does not say which of its modules are blocks (_no_split_modules): it can be neither "
                        "sharded nor offloaded")
    return list(found.values())


def process_mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def shard(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, keep_rest: bool, entrances: Iterable[str] = ()) -> None:
    """Shard `blocks`, and what else `module` holds, in place; parameters become DTensors, tied ones stay tied.

    A block is never whole on the device unless it is being computed: it is moved there and cut before the next one is.

    Args:
        module: what is called; its embeddings and head form one group, so that tied ones are gathered once.
        keep_rest: whether that group stays gathered from the forward pass to the end of the backward pass.
        entrances: methods that gather as `forward` does.
    """
    # It warns of modules that return views (MoE-P's do), which must not be written in place; nothing here does that.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep_rest)
    for name in entrances:
        register_fsdp_forward_method(module, name)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor with all its parts; any other as it is. Every process must call it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def cut_like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`values`, whole in every process, sharded as `parameter` is, without any communication."""
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{name: whole tensor in host memory} on the main process, {} on the others; one is whole on the device at a time.

    Every process must call it.
    """
    main, found = PartialState().is_main_process, {}
    for name, tensor in named:
        values = whole(tensor)
        if main:
            found[name] = values.cpu().contiguous()
    return found


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """`optimizer.state_dict()` as an unsharded run has it; of use on the main process. Every process must call it."""
    saved = optimizer.state_dict()
    return {**saved, "state": {index: whole_tensors(entry.items()) for index, entry in saved["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Put back what `whole_optimizer_state` or an unsharded run saved, each process its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: {name: cut_like(values, parameters[index]) if values.shape == parameters[index].shape else values
                     for name, values in entry.items()} for index, entry in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


# ---- Blocks that wait in host memory --------------------------------------------------------------------------------


def park_blocks(model: nn.Module, device: torch.device) -> None:
    """Move a frozen model to `device`, except that its blocks' weights wait in host memory and visit it while their block runs.

    For forward passes without gradients: nothing else would keep a block's weights from being sent away too early. Pinned
    memory is what a GPU can copy from without a detour; the copies are queued in order with the products that read them.
    """
    parked = {}
    for block in blocks_of(model):
        held = {}
        for parameter in block.parameters():
            waiting = parameter.detach().cpu()
            held[parameter] = waiting.pin_memory() if device.type == "cuda" else waiting
        parked |= held
        block.register_forward_pre_hook(_visit(held, device))
        block.register_forward_hook(_leave(held))
    for parameter in model.parameters():
        parameter.data = parked[parameter] if parameter in parked else parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _visit(held: dict[nn.Parameter, torch.Tensor], device: torch.device):
    def hook(_module: nn.Module, _inputs: tuple) -> None:
        for parameter, waiting in held.items():
            parameter.data = waiting.to(device, non_blocking=True, copy=True)

    return hook


def _leave(held: dict[nn.Parameter, torch.Tensor]):
    def hook(_module: nn.Module, _inputs: tuple, _output: object) -> None:
        for parameter, waiting in held.items():
            parameter.data = waiting

    return hook
