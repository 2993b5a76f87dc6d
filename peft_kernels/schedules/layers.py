"""Finding a model's transformer layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..planning import unwrapped


def transformer_layers(model: nn.Module, paths: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The transformer layers by path, in order.

    Args:
        paths: of the `nn.ModuleList`s that hold them, like "model.layers". None looks for them: among the lists that
            lie in no other list, the one with most parameters, and those that hold modules of the same type, as an
            encoder and a decoder do.

    Raises:
        ValueError, TypeError: there is none, or a path does not lead to a ModuleList.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if paths is None:
        lists = _likely(model)
        if not lists:
            raise ValueError("model must hold its transformer layers in an nn.ModuleList, and none has parameters")
    else:
        lists = {path: _at(model, path) for path in ([paths] if isinstance(paths, str) else paths)}
        if not any(len(modules) for modules in lists.values()):
            raise ValueError(f"layers must name at least one nn.ModuleList with modules in it, got {paths!r}")
    return {f"{path}.{name}": layer for path, modules in lists.items() for name, layer in modules.named_children()}


def _likely(model: nn.Module) -> dict[str, nn.ModuleList]:
    outermost: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not inside and _size(module):
            outermost[path] = module
    if not outermost:
        return {}
    largest = max(outermost.values(), key=_size)
    kind = type(largest[0])
    return {path: modules for path, modules in outermost.items() if modules is largest or type(modules[0]) is kind}


def _at(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"layers names {path!r}, which the model does not have") from error
    if not isinstance(module, nn.ModuleList):
        raise TypeError(f"layers must name an nn.ModuleList, but {path!r} is a {type(module).__name__}")
    return module


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
