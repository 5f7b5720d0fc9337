"""Making a base: every Linear and Embedding to 8 bits (or 4) once, the rest copied, the model untouched."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from finetuna_func._experts import experts_left_whole
from finetuna_func._filters import as_names, join_name, lookup, matches, select, split_name
from finetuna_func._hf import weights_read_by_parent
from finetuna_func._layers import float_weight, layer_type
from finetuna_func._lazy import LazyTensor, blocks, evaluate
from finetuna_func._quant import Int8, Scheme, SchemeChoice, check_quantizable, scheme_named, schemes_by_selector
from finetuna_func._skeleton import Skeleton, find_ties
from finetuna_func._types import Base, Params, Selector
from finetuna_func._unpack import ready_codes, unpacked

logger = logging.getLogger(__name__)

DEFAULT_HEAD = frozenset({"lm_head"})
"""What stays in float, and is trained directly, unless the user says otherwise; may match nothing."""


def quantize_base_model(
    model: nn.Module,
    *,
    modules_not_to_quantize: Selector = DEFAULT_HEAD,
    scheme: SchemeChoice = "int8",
    matmul: str = "w8a16",
    device: torch.device | str | None = None,
) -> Base:
    """Returns the model as an immutable 8-bit base; ``model`` itself is not changed in any way.

    Every ``nn.Linear``, ``nn.Embedding`` and other registered layer is quantized; all other
    parameters and all buffers are copied in their own dtype. Tied weights stay one matrix; it is
    quantized unless one of the layers that share it is in ``modules_not_to_quantize``. A subclass of
    Linear or Embedding that is not registered stays in float, with a message in the log.

    Args:
        model: Any module with its weights in float32, bfloat16, float16 or float64. Layers that
            bitsandbytes holds in 8 bits already are taken over as they are.
        modules_not_to_quantize: Leaf names, dotted paths or regexes of layers to keep in float.
        scheme: ``"int8"`` (row-wise absmax, LLM.int8() arXiv 2208.07339), ``"blockwise8"``
            (dynamic code in blocks of 256, arXiv 2110.02861), ``"nf4"`` (4 bits with double
            quantization, QLoRA arXiv 2305.14314), or ``None`` for float. Or a dict of them by layer,
            ``{"down_proj": "int8", "layers.0": None, "*": "nf4"}``: a key is a selector as above, an
            exact path beats any other key, two keys that disagree about a layer are an error, and
            ``"*"`` stands for all other layers (int8 if it is absent). Of layers that share a weight
            it is enough to name one.
        matmul: ``"w8a16"``, activations in float, or ``"w8a8"``, activations quantized row by row
            as well (int8 layers only; LLM.int8() with threshold 0).
        device: Where the base lives; by default where each weight is.

    Raises:
        ValueError: A selector that matches nothing or changes nothing, an unknown scheme, NaN or
            infinite weights, ``max_norm`` embeddings (they change their table in forward).
        TypeError: Not a module, weights that are not floating point, or a scheme of another type.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> base = quantize_base_model(model)
        >>> base.params["0.weight"].dtype, base.params["0.weight_scale"].shape
        (torch.int8, torch.Size([4]))
        >>> model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4))
        >>> mixed = quantize_base_model(model, scheme={"0": "nf4", "*": None})
        >>> mixed.params["0.weight"].shape, mixed.params["1.weight"].dtype
        (torch.Size([4, 32]), torch.float32)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    table = schemes_by_selector(scheme, matmul)
    model, packings = unpacked(model)
    ties = find_ties(model)
    read_by_parent = weights_read_by_parent(model)
    candidates = {
        path: module
        for path, module in model.named_modules()
        if path not in read_by_parent and _is_quantizable(path, module)
    }
    for path in sorted(read_by_parent):
        logger.warning("%s stays in float and takes no adapter: the module above it computes with its weight.", path)
    for path, names in experts_left_whole(model):
        logger.warning(
            "%s is a %s, which holds matrices in one parameter and is not taken apart; %s stay in float.",
            path,
            type(model.get_submodule(path)).__name__,
            ", ".join(names),
        )
    # Users may name any layer that holds a matrix, under any of its tied names.
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    names = as_names("modules_not_to_quantize", modules_not_to_quantize)
    if modules_not_to_quantize is DEFAULT_HEAD:
        kept = {path for path in paths if any(matches(name, path) for name in names)}
    else:
        kept = select("modules_not_to_quantize", names, paths)
    ready = {path: codes for path, module in candidates.items() if (codes := ready_codes(module)) is not None}
    both = sorted(kept & ready.keys())
    if both and modules_not_to_quantize is not DEFAULT_HEAD:
        raise ValueError(
            f"modules_not_to_quantize: {both[:5]} are in 8 bits already (bitsandbytes); load the model in float to "
            "keep them in float."
        )
    free = [
        sharers
        for sharers in _sharing_weights(model, ties)
        if all(path in candidates and path not in kept and path not in ready for path in sharers)
    ]
    schemes = _scheme_of_each(table, candidates, free, ready)
    params: dict[str, Tensor] = {}
    for name, leaf in _tensors(model):
        if name in ties:
            continue
        path, own = split_name(name)
        if own == "weight" and path in ready:
            params.update({name + suffix: code.to(device or code.device) for suffix, code in ready[path].items()})
            continue
        if leaf.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no numbers; load the weights first.")
        if own == "weight" and path in schemes:
            kind = layer_type(candidates[path])
            assert kind is not None
            params.update(_quantize_weight(name, float_weight(kind, leaf.detach()), schemes[path], device))
        else:
            leaf = leaf.detach()
            leaf = evaluate(leaf) if isinstance(leaf, LazyTensor) else leaf.clone()
            params[name] = leaf.to(device or leaf.device)
    skeleton = Skeleton(model, schemes, table["*"] or scheme_named("int8", matmul), packings)
    return Base(params, skeleton, fingerprint_of(skeleton, params))


def _scheme_of_each(
    table: Mapping[str, Scheme | None],
    candidates: Collection[str],
    free: Iterable[Collection[str]],
    ready: Collection[str],
) -> dict[str, Scheme]:
    """Returns the scheme of each quantized layer, by path.

    Args:
        table: By selector, with ``"*"``.
        candidates: Layers that can be quantized.
        free: Those whose format is to be chosen, in groups that share a weight.
        ready: Those that are int8 already.
    """
    others = table["*"]
    named = {selector: scheme for selector, scheme in table.items() if selector != "*"}
    select("scheme", named, candidates, what="layer that can be quantized")
    own = {path: lookup("scheme", named, path) for path in candidates if any(matches(key, path) for key in named)}
    schemes: dict[str, Scheme] = {}
    for path in ready:
        scheme = own.get(path, others)
        if path in own and not isinstance(scheme, Int8):
            raise ValueError(
                f"scheme: {path!r} is in int8 already (bitsandbytes); load the model in float to change that."
            )
        schemes[path] = scheme if isinstance(scheme, Int8) else Int8()
    for sharers in free:
        wanted = {own[path] for path in sharers if path in own}
        if len(wanted) > 1:
            raise ValueError(f"scheme: {sorted(sharers)} share one weight, but are to have different formats.")
        scheme = wanted.pop() if wanted else others
        if scheme is not None:
            schemes.update(dict.fromkeys(sharers, scheme))
    for selector, scheme in named.items():
        if scheme is not None and not any(matches(selector, path) for path in schemes):
            raise ValueError(
                f"scheme: what {selector!r} names stays in float, because modules_not_to_quantize (by default lm_head) "
                "keeps it, or a layer that shares its weight; pass another modules_not_to_quantize, such as ()."
            )
    return schemes


def quantized_leaves(base: Base, path: str) -> Params:
    """Returns the 8-bit leaves of a layer that the base holds in float: made once, then shared."""
    if path not in base.derived:
        layer = base.skeleton.layers[path]
        name = join_name(path, "weight")
        leaf = base.params[base.skeleton.ties.get(name, name)]
        base.derived.setdefault(
            path, _quantize_weight(name, float_weight(layer.type, leaf), base.skeleton.default_scheme, None)
        )
    return base.derived[path]


def _quantize_weight(name: str, weight: Tensor, scheme: Scheme, device: torch.device | str | None) -> dict[str, Tensor]:
    if isinstance(weight, LazyTensor):
        if isinstance(scheme, Int8):
            return _quantize_by_rows(name, weight, scheme, device)
        weight = evaluate(weight)
    check_quantizable(name, weight)
    leaves = scheme.quantize(weight)
    return {name + suffix: leaf.to(device or leaf.device) for suffix, leaf in leaves.items()}


def _quantize_by_rows(
    name: str, weight: LazyTensor, scheme: Int8, device: torch.device | str | None
) -> dict[str, Tensor]:
    """The same leaves from a weight in its file, of which a few rows at a time are in memory."""
    leaves: dict[str, Tensor] = {}
    for start, rows in blocks(weight):
        check_quantizable(name, rows)
        for suffix, part in scheme.quantize(rows).items():
            if start == 0:
                shape = (weight.shape[0], *part.shape[1:])
                leaves[name + suffix] = torch.empty(shape, dtype=part.dtype, device=device or part.device)
            leaves[name + suffix][start : start + part.shape[0]] = part
    return leaves


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for own, leaf in itertools.chain(module._parameters.items(), module._buffers.items()):
            if leaf is not None:
                yield join_name(path, own), leaf


def _sharing_weights(model: nn.Module, ties: Mapping[str, str]) -> list[list[str]]:
    """Returns the paths of modules with a ``weight``, grouped by the parameter it is."""
    groups: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if module._parameters.get("weight") is not None:
            name = join_name(path, "weight")
            groups.setdefault(ties.get(name, name), []).append(path)
    return list(groups.values())


def _is_quantizable(path: str, module: nn.Module) -> bool:
    kind = layer_type(module)
    if kind is None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            logger.warning(
                "%s is a %s, a subclass that may override forward; it stays in float and takes no adapter. "
                "Register it with finetuna_func.register_layer to change that.",
                path,
                type(module).__name__,
            )
        return False
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{path}: nn.Embedding(max_norm=...) rewrites its table in forward, which a frozen base forbids; "
            "normalise the table once and set max_norm=None."
        )
    return kind.adapter is not None and not kind.convolution


def fingerprint_of(skeleton: Skeleton, params: Params) -> str:
    """Returns 16 hex digits that identify architecture, quantization and content, on any device.

    The content enters through a checksum in wrapping 64-bit integer arithmetic, computed where the
    tensors are; it guards against mix-ups, not against forgery.
    """
    digest = hashlib.sha256(skeleton.architecture.encode())
    for path in sorted(skeleton.layers):
        layer = skeleton.layers[path]
        digest.update(f"{path}|{layer.scheme}|{layer.dtype}".encode())
        if layer.quantizable and layer.scheme is None:  # what a finetune would use it in
            digest.update(f"|{skeleton.default_scheme}".encode())
    for name in sorted(params):
        leaf = params[name]
        digest.update(f"{name}|{tuple(leaf.shape)}|{leaf.dtype}|{_checksum(leaf)}".encode())
    return digest.hexdigest()[:16]


# 64-bit words at a time, to bound the temporaries; on an accelerator, the launches.
_WORDS, _WORDS_ELSEWHERE = 1 << 15, 1 << 22
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


def _checksum(leaf: Tensor) -> int:
    flat = leaf.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=leaf.device)
    step = 8 * (_WORDS if leaf.device.type == "cpu" else _WORDS_ELSEWHERE)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        if part.numel() % 8 or part.storage_offset() % 8:
            part = torch.nn.functional.pad(part, (0, -part.numel() % 8))
        words = part.view(torch.int64)
        position = torch.arange(start // 8, start // 8 + words.numel(), device=leaf.device)
        mixed = (words + position * _ODD) * _ODD
        total = total + (mixed ^ (mixed >> 29)).mul_(_ODD).sum()
    return int(total)
