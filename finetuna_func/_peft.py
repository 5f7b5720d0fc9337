"""PEFT's form of a finetune: names, shapes and settings of its checkpoints, written and read.

Most leaves differ in name alone. A convolution's factors are kernels there, and the experts of a fused parameter
share one pair of factors (`target_parameters`):

    experts.down_proj.{e}.lora_a (r, in)   ->  experts.lora_A.weight (E * r, in)
    experts.down_proj.{e}.lora_b (out, r)  ->  experts.lora_B.weight (out, r * E), the expert running fastest

where several parameters of a module are adapted, PEFT nests wrappers: the first lies deepest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_func._filters import join_name, split_name
from finetuna_func._init import adapter_dtype, weight_norm
from finetuna_func._skeleton import Layer
from finetuna_func._trees import constants_of
from finetuna_func._types import (
    AdapterSpec,
    Base,
    EmbeddingAdapterConfig,
    Finetuned,
    Follower,
    LinearAdapterConfig,
    Spec,
)

PREFIX = "base_model.model."
FACTORS = ("lora_a", "lora_b", "lora_a0", "lora_b0")
_TO_PEFT = {
    ("linear", "lora_a"): "lora_A.weight",
    ("linear", "lora_b"): "lora_B.weight",
    ("linear", "lora_bias"): "lora_B.bias",
    ("linear", "lora_magnitude"): "lora_magnitude_vector",
    ("embedding", "lora_a"): "lora_embedding_A",
    ("embedding", "lora_b"): "lora_embedding_B",
}
_FROM_PEFT = {suffix: own for (_, own), suffix in _TO_PEFT.items()} | {"lora_magnitude_vector.weight": "lora_magnitude"}
_WRAPPER = ".base_layer"


# --- writing


def tensors_for_peft(tuned: Finetuned, fused: Iterable[str]) -> dict[str, Tensor]:
    """Returns a finetune's tensors as PEFT has them.

    Args:
        tuned: One finetune.
        fused: Parameters whose experts share a pair of factors, see `fused_parameters`.
    """
    params = _with_start(tuned)
    names = peft_names(tuned.spec, fused)
    forms = {adapter.path: adapter.form for adapter in tuned.spec.adapters}
    tensors: dict[str, Tensor] = {}
    for name, file_name in names.items():
        path, own = split_name(name)
        leaf = params[name]
        if path in forms and forms[path].kernel and own in ("lora_a", "lora_b"):
            kernel = forms[path].kernel if own == "lora_a" else (leaf.shape[1], *(1,) * (len(forms[path].kernel) - 1))
            leaf = leaf.reshape(leaf.shape[0], *kernel)
        tensors[file_name] = leaf
    for file_name, (name, transposed) in second_names(tuned.spec).items():
        tensors[file_name] = params[name].mT if transposed else params[name]
    for group in _groups(tuned.spec, fused):
        a, b = (
            {e: params[join_name(adapter.path, own)] for e, adapter in group.experts.items()} for own in FACTORS[:2]
        )
        tensors.update(group.fuse(a, b))
    return tensors


def params_from_peft(spec: Spec, tensors: Mapping[str, Tensor], fused: Iterable[str]) -> dict[str, Tensor]:
    """Undoes `tensors_for_peft`, but for `_with_start`, on tensors of the right names and shapes."""
    forms = {adapter.path: adapter.form for adapter in spec.adapters}
    params: dict[str, Tensor] = {}
    for name, file_name in peft_names(spec, fused).items():
        path, own = split_name(name)
        is_kernel = path in forms and forms[path].kernel and own in ("lora_a", "lora_b")
        params[name] = tensors[file_name].flatten(1) if is_kernel else tensors[file_name]
    for group in _groups(spec, fused):
        params.update(group.split(tensors))
    return params


def peft_names(spec: Spec, fused: Iterable[str]) -> dict[str, str]:
    """Returns the name in the file of each parameter that has a tensor of its own there."""
    shared = {adapter.path for group in _groups(spec, fused) for adapter in group.experts.values()}
    names = {name: PREFIX + name for name in spec.plain}
    for adapter in spec.adapters:
        if adapter.path not in shared:
            names.update(
                {
                    join_name(adapter.path, leaf): f"{PREFIX}{adapter.path}.{_TO_PEFT[adapter.kind, leaf]}"
                    for leaf in _leaves(adapter)
                }
            )
    return names


def _leaves(adapter: AdapterSpec) -> list[str]:
    own = ["lora_a", "lora_b"]
    own += ["lora_bias"] if getattr(adapter.config, "bias", False) else []
    own += ["lora_magnitude"] if getattr(adapter.config, "dora", False) else []
    return own


def second_names(spec: Spec) -> dict[str, tuple[str, bool]]:
    """Returns what the file holds again, since to PEFT tied weights are two: the parameter, and whether transposed.

    A table's update is its head's, transposed: the factors change places.
    """
    adapters = {adapter.path: adapter for adapter in spec.adapters}
    names: dict[str, tuple[str, bool]] = {}
    for follower in spec.followers:
        path, adapter = split_name(follower.name)[0], adapters.get(split_name(follower.of)[0])
        if follower.of in spec.plain:
            names[PREFIX + follower.name] = (follower.of, False)
        elif adapter is not None and follower.kind is not None:
            turned = {"lora_a": "lora_b", "lora_b": "lora_a"} if follower.kind != adapter.kind else {}
            for leaf in _leaves(adapter):
                own = turned.get(leaf, leaf)
                file_name = f"{PREFIX}{path}.{_TO_PEFT[follower.kind, own]}"
                names[file_name] = (join_name(adapter.path, leaf), bool(turned))
    return names


def all_file_names(spec: Spec, fused: Iterable[str]) -> set[str]:
    """Returns the names of all tensors of the file."""
    shared = {name for group in _groups(spec, fused) for name in group.names}
    return shared | set(peft_names(spec, fused).values()) | second_names(spec).keys()


def fused_parameters(tuned: Finetuned) -> tuple[str, ...]:
    """Returns the fused parameters whose adapted experts have one rank and scale, so that PEFT has a form for them."""
    settings: dict[str, set[tuple[Any, ...]]] = {}
    for adapter in tuned.spec.adapters:
        if adapter.form.experts:
            scale = float(tuned.consts[join_name(adapter.path, "lora_scale")])
            extras = (getattr(adapter.config, "bias", False), getattr(adapter.config, "dora", False))
            settings.setdefault(split_name(adapter.path)[0], set()).add((rank_on_disk(adapter), scale, *extras))
    return tuple(name for name, seen in settings.items() if len(seen) == 1 and not any(next(iter(seen))[2:]))


def beyond_peft(tuned: Finetuned) -> str:
    """What PEFT would refuse, or read as something else; empty if nothing."""
    adapters = tuned.spec.adapters
    reasons = {f"adapters on {adapter.form.beyond_peft}" for adapter in adapters if adapter.form.beyond_peft}
    if tuned.spec.packed:
        reasons.add(f"parts of a larger parameter trained directly, such as {tuned.spec.packed[0]}")
    with_dora = {bool(getattr(adapter.config, "dora", False)) for adapter in adapters}
    if len(with_dora) > 1:
        reasons.add("DoRA on some of the adapted layers only")
    if any(adapter.form.experts for adapter in adapters):
        experts = {split_name(adapter.path)[0] for adapter in adapters if adapter.form.experts}
        if experts - set(fused_parameters(tuned)):
            reasons.add("experts of one parameter with different ranks or scales, with biases or DoRA")
        if any(getattr(a.config, "bias", False) or getattr(a.config, "dora", False) for a in adapters):
            reasons.add("biases or DoRA beside adapted experts")
    return "; ".join(sorted(reasons))


def rank_on_disk(adapter: AdapterSpec) -> int:
    """An adapter that subtracts its first product is, to PEFT, an ordinary one of twice the rank."""
    return 2 * adapter.config.r if getattr(adapter.config, "subtracts_start", False) else adapter.config.r


def split_off_start(spec: Spec, params: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Undoes `_with_start` on ``params`` in place; returns the first factors."""
    starts: dict[str, Tensor] = {}
    for adapter in spec.adapters:
        if rank_on_disk(adapter) != adapter.config.r:
            a, b, a0, b0 = (join_name(adapter.path, name) for name in FACTORS)
            r = adapter.config.r
            starts[a0] = params[a][r:].to(dtypes[a0], copy=True)
            starts[b0] = (-params[b][:, r:]).to(dtypes[b0])
            params[a], params[b] = params[a][:r].to(dtypes[a], copy=True), params[b][:, :r].to(dtypes[b], copy=True)
    return starts


def peft_config(tuned: Finetuned) -> dict[str, Any]:
    """Returns what belongs into ``adapter_config.json``."""
    adapters = tuned.spec.adapters
    stabilized = bool(adapters) and all(a.config.rank_stabilized for a in adapters)
    # By the name that PEFT's patterns see: of the layer, or of the fused parameter.
    targets = {split_name(a.path)[0] if a.form.experts else a.path: a for a in adapters}
    followers = {split_name(f.name)[0]: split_name(f.of)[0] for f in tuned.spec.followers}
    targets |= {path: targets[of] for path, of in followers.items() if of in targets}
    saved = {*tuned.spec.plain, *(f.name for f in tuned.spec.followers if f.of in tuned.spec.plain)}
    ranks = {name: rank_on_disk(a) for name, a in targets.items()}
    scales = {name: float(tuned.consts[join_name(a.path, "lora_scale")]) for name, a in targets.items()}
    alphas = {name: _peft_alpha(a, scales[name], stabilized) for name, a in targets.items()}
    fused = [name for name, a in targets.items() if a.form.experts]
    r = next(iter(ranks.values()), 8)
    alpha = next(iter(alphas.values()), 8)
    dropout = max((getattr(a.config, "dropout", 0.0) for a in adapters), default=0.0)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if fused else dropout,  # PEFT knows none on fused experts
        "lora_bias": any(getattr(a.config, "bias", False) for a in adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules([name for name, a in targets.items() if not a.form.experts]),
        **({"target_parameters": fused} if fused else {}),
        "use_rslora": stabilized,
        "use_dora": any(getattr(a.config, "dora", False) for a in adapters),
        "rank_pattern": {f"^{_escape(name)}$": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{_escape(name)}$": other for name, other in alphas.items() if other != alpha},
        "modules_to_save": sorted({split_name(name)[0] for name in saved}) or None,
    }


@dataclass(frozen=True)
class _Fused:
    """The adapters of a fused parameter, which share one pair of factors on disk."""

    wrapper: str  # the name of the module's wrapper in the file
    experts: Mapping[int, AdapterSpec]

    @property
    def names(self) -> tuple[str, str]:
        return f"{PREFIX}{self.wrapper}.lora_A.weight", f"{PREFIX}{self.wrapper}.lora_B.weight"

    @property
    def form(self) -> Any:
        return next(iter(self.experts.values())).form

    @property
    def rank(self) -> int:
        return rank_on_disk(next(iter(self.experts.values())))

    def shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the pair, if each expert's matrix is ``shape``, (out, in)."""
        out_features, in_features = shape[::-1] if self.form.inverted else shape
        rank = self.rank * self.form.experts
        return (rank, in_features), (out_features, rank)

    def fuse(self, a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Returns the pair; an expert without an adapter gets zeros."""
        if self.form.inverted:
            a, b = {e: leaf.mT for e, leaf in b.items()}, {e: leaf.mT for e, leaf in a.items()}
        some_a, some_b = next(iter(a.values())), next(iter(b.values()))
        number = range(self.form.experts)
        all_a = torch.cat([a.get(e, torch.zeros_like(some_a)) for e in number])
        all_b = torch.stack([b.get(e, torch.zeros_like(some_b)) for e in number], dim=-1).flatten(1)
        return dict(zip(self.names, (all_a, all_b), strict=True))

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the factors of each adapted expert by name."""
        all_a, all_b = (tensors[name] for name in self.names)
        all_a, all_b = all_a.unflatten(0, (self.form.experts, -1)), all_b.unflatten(1, (-1, self.form.experts))
        params: dict[str, Tensor] = {}
        for e, adapter in self.experts.items():
            a, b = all_a[e], all_b[..., e]
            a, b = (b.mT, a.mT) if self.form.inverted else (a, b)
            params[join_name(adapter.path, "lora_a")] = a.contiguous()
            params[join_name(adapter.path, "lora_b")] = b.contiguous()
        return params


def _groups(spec: Spec, fused: Iterable[str]) -> list[_Fused]:
    modules: dict[str, list[str]] = {}
    for name in fused:
        modules.setdefault(split_name(name)[0], []).append(name)
    groups: list[_Fused] = []
    for module, names in modules.items():
        # PEFT wraps in the order of registration, and in all these classes the second matrix comes last.
        ordered = sorted(names, key=lambda name: split_name(name)[1] == "down_proj")
        for depth, name in enumerate(reversed(ordered)):
            experts = {a.form.expert: a for a in spec.adapters if a.form.experts and split_name(a.path)[0] == name}
            groups.append(_Fused(module + _WRAPPER * depth, experts))
    return groups


def fused_shapes(base: Base, spec: Spec, fused: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that experts share."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in _groups(spec, fused):
        layer = base.skeleton.layers[next(iter(group.experts.values())).path]
        assert layer.shape is not None
        shapes.update(zip(group.names, group.shapes(layer.shape), strict=True))
    return shapes


def _with_start(tuned: Finetuned) -> dict[str, Tensor]:
    """Returns the params, with A and B as PEFT would need them."""
    params = dict(tuned.params)
    for adapter in tuned.spec.adapters:
        if rank_on_disk(adapter) != adapter.config.r:
            own = {name: join_name(adapter.path, name) for name in FACTORS}
            params[own["lora_a"]] = torch.cat([params[own["lora_a"]], tuned.consts[own["lora_a0"]]])
            params[own["lora_b"]] = torch.cat([params[own["lora_b"]], -tuned.consts[own["lora_b0"]]], dim=1)
    return params


def _target_modules(paths: list[str]) -> list[str] | str:
    """PEFT matches an entry of a list by its tail, so a path of one name (``fc``) must be a full match."""
    if all("." in path for path in paths):
        return paths
    return f"^(?:{'|'.join(map(_escape, paths))})$"


def _peft_alpha(adapter: AdapterSpec, scale: float, stabilized: bool) -> float:
    """The alpha with which PEFT arrives at ``scale``; the configured one where that is it, undisturbed by rounding."""
    r = rank_on_disk(adapter)
    alpha = scale * (math.sqrt(r) if stabilized else r)
    configured = adapter.config.alpha
    return configured if abs(alpha - configured) <= 1e-6 * abs(configured) else alpha


def _escape(path: str) -> str:
    return path.replace(".", r"\.")


# --- reading what PEFT wrote


def read_checkpoint(config_file: Path, tensors: Mapping[str, Tensor], base: Base) -> Finetuned:
    """Returns a LoRA checkpoint that PEFT wrote, as a finetune of a base.

    Args:
        config_file: PEFT's ``adapter_config.json``.
        tensors: What its tensor file holds.
        base: The quantized base; PEFT does not record which one it was, so only names and shapes are checked.

    Raises:
        ValueError: A setting that computes something else, or a tensor that fits nowhere.
    """
    try:
        config = json.loads(config_file.read_text("utf-8"))
        settings = _Settings(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            stabilized=bool(config.get("use_rslora")),
            ranks=dict(config.get("rank_pattern") or {}),
            alphas=dict(config.get("alpha_pattern") or {}),
            parameters=tuple(config.get("target_parameters") or ()),
        )
        settings.check()
        unknown = _settings_not_read(config)
    except (ValueError, re.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"load: {config_file} is not PEFT's description of a LoRA adapter: {error!r}") from error
    if unknown:
        raise ValueError(f"load: {config_file} has {unknown}, which compute something else than LoRA does here.")
    reader = _Reader(str(config_file.parent), base, settings)
    for name in sorted(tensors):
        reader.place(name, tensors[name])
    return reader.finetune()


_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the frozen weights alone


def _settings_not_read(config: Mapping[str, Any]) -> str:
    """The settings that would need something else than the factors; empty if there are none."""
    found = [
        f"{name}={config[name]!r}"
        for name in (
            "alora_invocation_tokens",
            "arrow_config",
            "corda_config",
            "kasa_config",
            "layer_replication",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        )
        if config.get(name)
    ]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type={config.get('peft_type')!r}")
    if config.get("init_lora_weights", True) not in _INITS:
        found.append(f"init_lora_weights={config['init_lora_weights']!r} (convert it to LoRA when saving it in PEFT)")
    return ", ".join(found)


@dataclass(frozen=True)
class _Settings:
    r: int
    alpha: float
    dropout: float
    stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]

    def check(self) -> None:
        """Raises for numbers and patterns that are none."""
        for r in (self.r, *self.ranks.values()):
            LinearAdapterConfig(r, self.alpha, self.dropout)
        for alpha in self.alphas.values():
            LinearAdapterConfig(self.r, alpha)
        for key in (*self.ranks, *self.alphas):
            re.compile(rf"(.*\.)?({key})$")

    def of(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a layer or parameter, by PEFT's rule: the first pattern that matches its tail."""

        def value(patterns: Mapping[str, Any], default: Any) -> Any:
            return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)

        return value(self.ranks, self.r), value(self.alphas, self.alpha)

    def targets(self, parameter: str) -> bool:
        """Whether PEFT adapts this fused parameter."""
        return any(parameter == key or parameter.endswith(f".{key}") for key in self.parameters)


class _Reader:
    """Gathers the tensors of a checkpoint by the layers they belong to."""

    def __init__(self, folder: str, base: Base, settings: _Settings) -> None:
        self.folder, self.base, self.settings = folder, base, settings
        self.plain: dict[str, Tensor] = {}
        self.factors: dict[str, dict[str, Tensor]] = {}

    def place(self, name: str, leaf: Tensor) -> None:
        """Takes one tensor."""
        inner = name.removeprefix(PREFIX)
        for suffix, own in _FROM_PEFT.items():
            if inner.endswith(f".{suffix}"):
                self.factors.setdefault(inner.removesuffix(f".{suffix}"), {})[own] = leaf
                return
        path, own = split_name(inner)
        if path.endswith(_WRAPPER):  # PEFT saves an adapted table whole, beside its factors
            self._check_frozen(join_name(path.removesuffix(_WRAPPER), own), leaf)
        elif inner in self.base.skeleton.shapes and leaf.is_floating_point():
            expected = self.base.skeleton.shapes[inner]
            if tuple(leaf.shape) != expected:
                raise self._error(f"{name} has shape {tuple(leaf.shape)}, expected {expected}")
            self.plain[inner] = leaf
        elif inner in self.base.skeleton.packings:
            parts = self.base.skeleton.packings[inner].parts
            raise self._error(f"{name} is held in parts here, such as {parts[0]}; adapt it instead of saving it whole")
        else:
            raise self._error(f"{name} fits no parameter of {self.base.skeleton.name}")

    def finetune(self) -> Finetuned:
        """Returns the finetune that the tensors make."""
        adapters: list[AdapterSpec] = []
        params: dict[str, Tensor] = {}
        for wrapper, own in self.factors.items():
            if not {"lora_a", "lora_b"} <= own.keys():
                raise self._error(f"{wrapper} lacks one of its two factors")
            specs, leaves = self._ordinary(wrapper, own) if self._layer(wrapper) else self._fused(wrapper, own)
            adapters.extend(specs)
            params.update(leaves)
        for follower in self.base.skeleton.completed(Spec("", tuple(adapters), tuple(self.plain))).followers:
            spec, leaves = self._standing_still(follower)
            adapters.append(spec)
            params.update(leaves)
        adapters.sort(key=lambda adapter: adapter.path)
        consts: dict[str, Tensor] = {}
        for adapter in adapters:
            layer = self.base.skeleton.layers[adapter.path]
            dtype = adapter_dtype(layer)
            consts.update({name: torch.tensor(value, dtype=dtype) for name, value in constants_of(adapter).items()})
            if getattr(adapter.config, "dora", False):
                consts[join_name(adapter.path, "lora_weight_norm")] = weight_norm(self.base, layer, ())
        for name, leaf in self.plain.items():
            held = self.base.params[self.base.skeleton.ties.get(name, name)]
            layer = self.base.skeleton.layers.get(split_name(name)[0])
            dtype = held.dtype if held.is_floating_point() or layer is None else layer.dtype
            params[name] = leaf.to(dtype, copy=True)
        spec = Spec(self.base.fingerprint, tuple(adapters), tuple(sorted(self.plain)))
        device = next(iter(self.base.params.values())).device
        return Finetuned(params, consts, self.base.skeleton.completed(spec)).to(device)

    def _standing_still(self, follower: Follower) -> tuple[AdapterSpec, dict[str, Tensor]]:
        """Returns an adapter of zeros, with which a layer does not follow the one it is tied to; in PEFT none does."""
        layer = self._layer(split_name(follower.name)[0])
        if follower.of in self.plain or layer is None or layer.shape is None or layer.type.adapter is None:
            raise self._error(
                f"it trains {follower.of} but not {follower.name}, which is tied to it and would change too"
            )
        table = layer.type.adapter == "embedding"
        config = EmbeddingAdapterConfig(1) if table else LinearAdapterConfig(1)
        a_width, b_width = layer.shape if table else layer.shape[::-1]
        dtype = adapter_dtype(layer)
        leaves = {"lora_a": torch.zeros(1, a_width, dtype=dtype), "lora_b": torch.zeros(b_width, 1, dtype=dtype)}
        spec = AdapterSpec(layer.path, layer.type.adapter, config, layer.form)
        return spec, {join_name(layer.path, name): leaf for name, leaf in leaves.items()}

    def _layer(self, path: str) -> Layer | None:
        layer = self.base.skeleton.layers.get(self.base.skeleton.same_module.get(path, path))
        return layer if layer is not None and layer.adaptable else None

    def _ordinary(self, path: str, own: dict[str, Tensor]) -> tuple[list[AdapterSpec], dict[str, Tensor]]:
        layer = self._layer(path)
        assert layer is not None and layer.shape is not None and layer.type.adapter is not None
        if layer.form.beyond_peft:
            raise self._error(f"it adapts {path}; PEFT computes something else on {layer.form.beyond_peft}")
        r, alpha = self.settings.of(path)
        out_features, in_features = layer.shape
        config: LinearAdapterConfig | EmbeddingAdapterConfig
        if layer.type.adapter == "embedding":
            config = EmbeddingAdapterConfig(r, alpha, self.settings.stabilized)
            shapes = {"lora_a": (r, out_features), "lora_b": (in_features, r)}
        else:
            config = LinearAdapterConfig(
                r, alpha, self.settings.dropout, "lora_bias" in own, self.settings.stabilized, "lora_magnitude" in own
            )
            a_shape: tuple[int, ...] = (r, *(layer.form.kernel or (in_features,)))
            b_shape = (out_features, r, *(1,) * (len(a_shape) - 2))
            shapes = {"lora_a": a_shape, "lora_b": b_shape}
            shapes |= {"lora_bias": (out_features,), "lora_magnitude": (out_features,)}
            if layer.form.kernel and "lora_magnitude" in own:
                raise self._error(f"{path} is a convolution with DoRA, which has no form here")
        self._check(path, own, shapes)
        dtype = adapter_dtype(layer)
        leaves = {
            name: leaf.to(dtype, copy=True).flatten(1) if name in ("lora_a", "lora_b") else leaf.to(dtype, copy=True)
            for name, leaf in own.items()
        }
        spec = AdapterSpec(layer.path, layer.type.adapter, config, layer.form)
        return [spec], {join_name(layer.path, name): leaf for name, leaf in leaves.items()}

    def _fused(self, wrapper: str, own: dict[str, Tensor]) -> tuple[list[AdapterSpec], dict[str, Tensor]]:
        module, depth = wrapper, 0
        while module.endswith(_WRAPPER):
            module, depth = module.removesuffix(_WRAPPER), depth + 1
        packings = {name: p for name, p in self.base.skeleton.packings.items() if split_name(name)[0] == module}
        targeted = [name for name in packings if self.settings.targets(name)]  # in the order of registration
        if depth >= len(targeted):
            raise self._error(f"it adapts {wrapper}, which is no layer of {self.base.skeleton.name} that takes one")
        name = targeted[-1 - depth]
        layers = [self.base.skeleton.layers.get(split_name(part)[0]) for part in packings[name].parts]
        r, alpha = self.settings.of(name)
        adapters: dict[int, AdapterSpec] = {}
        for layer in layers:
            if layer is None or layer.form.experts != len(layers) or not packings[name].parts[0].endswith("weight"):
                raise self._error(f"it adapts {name}, which is not a fused matrix per expert")
            config = LinearAdapterConfig(r, alpha, rank_stabilized=self.settings.stabilized)
            adapters[layer.form.expert] = AdapterSpec(layer.path, "linear", config, layer.form)
        group = _Fused(wrapper, adapters)
        first = layers[0]
        assert first is not None and first.shape is not None
        self._check(wrapper, own, dict(zip(("lora_a", "lora_b"), group.shapes(first.shape), strict=True)))
        pair = dict(zip(group.names, (own["lora_a"], own["lora_b"]), strict=True))
        leaves = {name: leaf.to(adapter_dtype(first), copy=True) for name, leaf in group.split(pair).items()}
        return list(adapters.values()), leaves

    def _check(self, path: str, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, leaf in own.items():
            if tuple(leaf.shape) != shapes.get(name) or not leaf.is_floating_point():
                raise self._error(
                    f"{name} of {path} is {leaf.dtype} {tuple(leaf.shape)}, expected floating point {shapes.get(name)}"
                )

    def _check_frozen(self, name: str, leaf: Tensor) -> None:
        """Raises unless a frozen weight is the base's, up to the rounding of its 8 bits."""
        path, own = split_name(name)
        layer = self.base.skeleton.layers.get(path)
        canonical = self.base.skeleton.ties.get(name, name)
        held = self.base.params.get(canonical)
        if held is not None and layer is not None and layer.scheme is not None and own == "weight":
            leaves = [self.base.params[canonical + suffix] for suffix in layer.scheme.suffixes]
            held = layer.scheme.dequantize(torch.float32, *leaves)
        # 8 bits lose a hundredth of the largest number at most; bfloat16 as much of each.
        if (
            held is None
            or held.shape != leaf.shape
            or float((leaf.to(held) - held).abs().max()) > 0.02 * float(held.abs().max())
        ):
            raise self._error(f"{name} is saved whole and is not the base's own; train it as a plain layer instead")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"load: {self.folder} is not an adapter that this base can take: {what}.")
