"""Quantised bases: what their linear layers hold, and whether an adapter can be trained through them.

A torchao weight is a tensor of float32 or bfloat16 to look at, with integers inside; bitsandbytes packs
two weights into a byte and keeps scales beside them; GPTQ, AWQ and others are modules of their own. Their
sizes are `in_features` and `out_features`, never a weight's shape. A .gguf file is no such case: it
becomes plain weights when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bem.adapters.names import clean_name
from bem.adapters.sites import is_linear, linear_shape
from bem.errors import AttachError

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' attribute of a Linear4bit: it may pack its weights for inference."""
KNOWN = "torchao weight-only (int8, float8, intx), bitsandbytes (Linear8bitLt, Linear4bit) and .gguf files"


def is_quantised(module: Any) -> bool:
    """Is a linear layer's weight anything but a plain matrix of floating point numbers?"""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return any(t.dtype not in PLAIN for t in _own_tensors(module))
    packed = weight.numel() < torch.Size(linear_shape(module)).numel()
    return packed or weight.dtype not in PLAIN or type(weight).dequantize is not Tensor.dequantize


def refuse_untrainable(model: nn.Module, blocks: Sequence[str]) -> None:
    """Refuse a base through whose quantised layers no gradient passes.

    Torch would say nothing: what lies below such a layer would be trained by the rest of its gradient,
    or not at all. One layer of each kind is run with one token.

    Args:
        blocks: names of the decoder blocks.
    Raises:
        AttachError: names the layer and its kind, and what to use instead.
    """
    tried: set[object] = set()
    dtype = _compute_dtype(model)
    for name, module in model.named_modules():
        inside = any(clean_name(name).startswith(f"{block}.") for block in blocks)
        if not inside or not is_linear(module) or hasattr(module, "base_layer"):
            continue
        if is_quantised(module) and (kind := _kind(module)) not in tried:
            tried.add(kind)
            if why := _obstacle(module, dtype):
                raise AttachError(
                    f"{clean_name(name)} is a quantised {_described(module)} {why}: nothing can be trained below it. "
                    f"Quantise the base in a form through which gradients pass, such as {KNOWN}, or load it "
                    "unquantised with dtype='bfloat16'."
                )


def dense_weight(module: Any, model: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix by which a linear layer multiplies, in float32: of a quantised one what it makes of the
    unit vectors.

    Args:
        model: whose layer it is; in its dtype the layer computes.
    """
    if not is_quantised(module):
        weight = module.weight.detach().float()
        return weight.t() if hasattr(module, "nf") else weight  # Conv1D keeps (in, out)
    d_in, _ = linear_shape(module)
    unit = torch.eye(d_in, dtype=_compute_dtype(model), device=_device(module))
    with torch.no_grad():
        zero = module(torch.zeros_like(unit[:1])).float()  # the bias
        return (module(unit).float() - zero).t().contiguous()


def plain_tensors(name: str, tensor: Tensor, module: Any) -> Iterator[tuple[str, Tensor]]:
    """A parameter or buffer as plain tensors: what is inside a quantised one, and what stands beside it.

    Args:
        module: whose parameter it is.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # torchao and its kin
        for inside in tensor.__tensor_flatten__()[0]:  # type: ignore[operator]
            yield from plain_tensors(f"{name}.{inside}", getattr(tensor, inside), module)
        return
    yield name, tensor
    if hasattr(tensor, "SCB"):  # bitsandbytes' int8: the scales change places in the first pass
        scales = getattr(getattr(module, "state", None), "SCB", None)
        scales = tensor.SCB if tensor.SCB is not None else scales  # type: ignore[attr-defined]
        if scales is not None:
            yield f"{name}.SCB", scales
    if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes' 4 bits
        yield from _state_tensors(f"{name}.quant_state", state)


def tensors_beside(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that quantised layers keep in attributes of their own.

    bitsandbytes' int8 layers move integers and scales from the weight into the layer in their first pass:
    here, if that is still to come, because a copy that shares the weight would take them away.
    """
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            if getattr(module.weight, "CB", None) is not None:
                module.init_8bit_state()  # type: ignore[operator]
            yield from (t for t in vars(module.state).values() if isinstance(t, Tensor))
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (tensor for _, tensor in _state_tensors("", state))


def _state_tensors(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    for key, value in sorted(vars(state).items()):
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif type(value) is type(state):  # the scales are quantised too
            yield from _state_tensors(f"{name}.{key}", value)


def _obstacle(module: Any, dtype: torch.dtype) -> str:
    """Why no gradient passes through a layer; empty: it passes."""
    if getattr(module, PACKS, False) and _device(module).type == "cpu":
        return (
            "that is packed anew by the first pass in evaluation mode on a CPU with AVX512-BF16, and then passes no "
            f"gradient (set {PACKS} = False on every such layer before the first pass to keep it as it is)"
        )
    x = torch.zeros(1, 1, linear_shape(module)[0], dtype=dtype, device=_device(module))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            y = module(x.requires_grad_())
            if not y.requires_grad:
                return "whose output has no gradient"
            y.sum().backward()
    except Exception as error:  # kernels raise whatever they like
        return f"that cannot be run with gradients ({type(error).__name__}: {str(error)[:120]})"
    return "" if x.grad is not None else "that hands no gradient on to its input"


def _kind(module: Any) -> object:
    """Layers of one kind share their code: the class, what its weight is, and how it was quantised."""
    weight = getattr(module, "weight", None)
    settings = ("act_quant_kwargs", "activation_quantization", "quant_type", "compute_dtype")
    return type(module), type(weight), *(repr(getattr(weight, s, None)) for s in settings)


def _described(module: Any) -> str:
    weight = getattr(module, "weight", None)
    made = (
        "" if type(weight) in (nn.Parameter, Tensor, type(None)) else f" ({type(weight).__name__})"
    )
    return f"{type(module).__module__.partition('.')[0]} {type(module).__name__}{made}"


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the hidden states: that of the embeddings."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in PLAIN else torch.float32


def _device(module: nn.Module) -> torch.device:
    return _own_tensors(module)[0].device


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
