"""A language model in two parts, the body and its head, so that the head can run on a few tokens at a time.

What a model does after its body (the head, a soft cap, a scale) stays the model's own code: run as the body
alone, the head hands its input through; run as the head alone, the body returns the hidden states it is given.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from finetuna_func._layers import Call


def mark_body_and_head(skeleton: nn.Module, call: Call) -> tuple[str, str] | tuple[None, None]:
    """Makes the body and the head of a language model ones that a call can leave out; returns their paths."""
    prefix = getattr(skeleton, "base_model_prefix", "")
    body = getattr(skeleton, prefix, None) if prefix else None
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module) or head in body.modules():
        return None, None
    head_path = next(path for path, module in skeleton.named_modules() if module is head)
    head._ft_call = call  # type: ignore[assignment]
    # Some models, such as OPT's, call the decoder of their body alone; where both run, the outer one is the body.
    for module in (body, getattr(body, "decoder", None)):
        if isinstance(module, nn.Module):
            module._ft_call = call  # type: ignore[assignment]
            module.__class__ = _body_class(type(module))
    head.__class__ = _head_class(type(head), head_path)
    return prefix, head_path


def hidden_states(model: str, call: Call) -> tuple[Tensor, type]:
    """Returns the first output of the body that ran, and what class its outputs were in."""
    if call.body_output is None:
        raise NotImplementedError(
            f"{model} does not call its body as a whole, so that its head cannot run apart; compute the loss from the "
            "logits of ft.apply or ft.apply_stacked."
        )
    return call.body_output[0], type(call.body_output)


def with_hidden_states(kind: type, hidden: Tensor) -> Any:
    """Returns what a body that returns a ``kind`` would return with these hidden states and nothing else."""
    return (hidden,) if issubclass(kind, tuple) else kind(last_hidden_state=hidden)


def _body_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call: Call = self._ft_call  # type: ignore[assignment]
        if call.part == "head":
            return call.body_output
        output = cls.forward(self, *args, **kwargs)
        if call.part == "body":
            call.body_output = output
        return output

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _head_class(cls: type[nn.Module], path: str) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        call: Call = self._ft_call  # type: ignore[assignment]
        if call.part == "body":
            call.seen.add(path)  # it has its turn later
            return x
        return cls.forward(self, x, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
