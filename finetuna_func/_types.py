"""The values of the library: a frozen base, a finetune, and the configs that shape a finetune.

Everything here is a frozen value. `Base` and `Finetuned` hold read-only mappings from
``functional_call`` names to tensors, in sorted key order, so that optree (which sorts dict
keys) and torch's pytree (which does not) see the leaves in the same order.

Before and after, for one linear layer called ``q_proj``:

    model.q_proj.weight  (out, in) float
        -> Base.params       {"q_proj.weight": int8 (out, in), "q_proj.weight_scale": fp32 (out,)}
        -> Finetuned.params  {"q_proj.lora_a": (r, in), "q_proj.lora_b": (out, r)}
           Finetuned.consts  {"q_proj.lora_scale": ()}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

    from finetuna_func._skeleton import Skeleton

Params: TypeAlias = Mapping[str, Tensor]
"""A flat, read-only tree: ``functional_call`` name -> tensor. No ``None``, no nesting."""

Selector: TypeAlias = "str | Iterable[str]"
"""Names of modules: a leaf name, a dotted path, or a regex over the whole path; or several."""

AdapterKind: TypeAlias = Literal["linear", "embedding"]
AdapterInit: TypeAlias = Literal["default", "gaussian", "pissa", "olora", "loftq"]


def frozen_tree(tree: Params) -> Params:
    """Returns a read-only copy of a flat tree, keys sorted."""
    return MappingProxyType({name: tree[name] for name in sorted(tree)})


@dataclass(frozen=True, slots=True)
class LinearAdapterConfig:
    """LoRA on a linear layer: ``y += scale * (dropout(x) @ A.T @ B.T + bias)``.

    Shapes: x ``(..., in)``, A ``(r, in)``, B ``(out, r)``, bias ``(out,)``, y ``(..., out)``.

    Source: `LoRA <https://arxiv.org/abs/2106.09685>`_.

    Attributes:
        r: Rank, between 1 and the smaller side of the layer.
        alpha: Numerator of the scale ``alpha / r``.
        dropout: Probability of zeroing an input of ``A`` while training, in ``[0, 1)``.
        bias: Whether the adapter has a bias of its own (PEFT's ``lora_bias``).
        rank_stabilized: Whether the scale is ``alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732).
        dora: Whether the result is renormalised row by row, to a trained magnitude (DoRA, arXiv
            2402.09353). With dropout, the frozen part sees the whole input.
        init: First values of the factors. ``"default"``: A uniform, B zero. ``"gaussian"``: A normal
            with deviation ``1 / r``, B zero. ``"pissa"``: the largest singular directions of the
            weight (arXiv 2404.02948); ``"olora"``: the first columns of its QR factors (arXiv
            2406.01775); in both the frozen weight is the same for all finetunes, so the initial
            product is kept beside the adapter and subtracted. ``"loftq"``: the largest directions
            of the base's rounding error (arXiv 2310.08659), which needs the float weights; a layer that
            the base holds in float starts by default. (With
            ``dropout``, PiSSA and OLoRA see the dropped input in the subtracted product too, so that
            a fresh finetune is the base at any rate; in PEFT the weight itself is changed.)
        rank_pattern: Other ranks for some layers: ``{selector: r}``.
        alpha_pattern: Other alphas for some layers: ``{selector: alpha}``.
        layers_to_transform: Numbers of the repeated blocks to adapt; all if ``None``.
        exclude: Selectors of layers to leave out.

    Example:
        >>> LinearAdapterConfig(r=8, alpha=16).scale, LinearAdapterConfig(r=4, rank_stabilized=True).scale
        (2.0, 0.5)
    """

    r: int = 4
    alpha: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    rank_stabilized: bool = False
    dora: bool = False
    init: AdapterInit = "default"
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    layers_to_transform: int | Collection[int] | None = None
    exclude: Selector = ()

    def __post_init__(self) -> None:
        _check_rank(self, self.r, self.alpha)
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"LinearAdapterConfig(dropout={self.dropout!r}): expected a probability in [0, 1); "
                "use 0.0 for no dropout."
            )
        for name in ("bias", "rank_stabilized", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LinearAdapterConfig({name}={getattr(self, name)!r}): expected True or False.")
        if self.init not in get_args(AdapterInit):
            raise ValueError(f"LinearAdapterConfig(init={self.init!r}): expected one of {get_args(AdapterInit)}.")
        if self.init in ("pissa", "olora", "loftq") and self.alpha == 0:
            raise ValueError(f"LinearAdapterConfig(init={self.init!r}, alpha=0): factors of the weight need a scale.")
        if self.dora and self.bias:
            raise ValueError("LinearAdapterConfig(dora=True, bias=True): DoRA has no adapter bias; choose one of them.")

    @property
    def scale(self) -> float:
        """The factor on the low-rank product, ``alpha / r`` or ``alpha / sqrt(r)``."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    @property
    def subtracts_start(self) -> bool:
        """Whether the initial product is kept and subtracted."""
        return self.init in ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class EmbeddingAdapterConfig:
    """LoRA on an embedding: ``y += scale * A.T[ids] @ B.T``.

    Shapes: ids ``(...)``, A ``(r, rows of the table)``, B ``(width, r)``, y ``(..., width)``.

    Attributes:
        r: Rank, between 1 and the smaller side of the table.
        alpha: Numerator of the scale ``alpha / r``.
        rank_stabilized: Whether the scale is ``alpha / sqrt(r)``.
        rank_pattern: Other ranks for some layers: ``{selector: r}``.
        alpha_pattern: Other alphas for some layers: ``{selector: alpha}``.
        layers_to_transform: Numbers of the repeated blocks to adapt; all if ``None``.
        exclude: Selectors of layers to leave out.
    """

    r: int = 4
    alpha: float = 1.0
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    layers_to_transform: int | Collection[int] | None = None
    exclude: Selector = ()

    def __post_init__(self) -> None:
        _check_rank(self, self.r, self.alpha)
        if not isinstance(self.rank_stabilized, bool):
            raise ValueError(
                f"EmbeddingAdapterConfig(rank_stabilized={self.rank_stabilized!r}): expected True or False."
            )

    @property
    def scale(self) -> float:
        """The factor on the low-rank product, ``alpha / r`` or ``alpha / sqrt(r)``."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)


AdapterConfig: TypeAlias = LinearAdapterConfig | EmbeddingAdapterConfig


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rank(config: object, r: object, alpha: Any) -> None:
    name = type(config).__name__
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(
            f"{name}(r={r!r}): the rank must be an integer of at least 1; "
            "to leave a layer unadapted, leave it out of adapt_layers."
        )
    if not _is_number(alpha) or not abs(alpha) <= 1e30:  # NaN compares false
        raise ValueError(f"{name}(alpha={alpha!r}): expected a finite number.")


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How the user's model holds the weight of a layer, where it is not a matrix of its own.

    Attributes:
        kernel: Of a convolution, ``(in, *kernel)``: the axes that are the columns of its matrix.
        expert: Which expert of a fused 3-D parameter, named as the layer without its number.
        experts: How many that parameter holds.
        inverted: Whether PEFT takes the axes of that parameter the other way round.
        beyond_peft: Why an adapter here has no form in PEFT; empty if it has.
    """

    kernel: tuple[int, ...] = ()
    expert: int = 0
    experts: int = 0
    inverted: bool = False
    beyond_peft: str = ""


MATRIX = WeightForm()
"""An ordinary weight."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Which layer an adapter sits on, how it was configured (patterns resolved), and what form the weight has."""

    path: str
    kind: AdapterKind
    config: AdapterConfig
    form: WeightForm = MATRIX


@dataclass(frozen=True, slots=True)
class Follower:
    """A parameter that is tied to another, by their names; and what its layer is, if it is a layer's weight."""

    name: str
    of: str
    kind: AdapterKind | None


@dataclass(frozen=True, slots=True)
class Spec:
    """The static part of a finetune: everything but its tensors. Hashable, compared by value.

    Attributes:
        base: Fingerprint of the base that the finetune belongs to.
        adapters: The adapted layers.
        plain: Names of the parameters trained directly, in the finetune's own copy.
        quantized: Layers that the base holds in float and this finetune uses in 8 bits.
        packed: Those of ``plain`` that the user's model holds as part of a larger parameter.
        followers: Parameters tied to one that is adapted or plain, and so changed with it.
        members: For a stack, the spec of each finetune in it, in order.
    """

    base: str
    adapters: tuple[AdapterSpec, ...] = ()
    plain: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    followers: tuple[Follower, ...] = ()
    members: tuple[Spec, ...] = ()


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base: parameters and buffers by name, and the skeleton that interprets them.

    Made by `quantize_base_model`. It is a pytree (torch and optree) whose leaves are the
    tensors of `params`.

    Attributes:
        params: ``{name: tensor}``; a quantized ``path.weight`` holds the codes and has a
            ``path.weight_scale`` beside it: in ``"int8"``, ``(out, in)`` int8 and ``(out,)`` float32.
            Read-only.
        skeleton: The model on the meta device, its layers reinterpreted. Static.
        fingerprint: Identifies architecture, quantization and content. Static.
        derived: 8-bit leaves made later for layers that `params` holds in float, by layer;
            made once and shared by all finetunes of this base.
    """

    params: Params
    skeleton: Skeleton = field(repr=False)
    fingerprint: str
    derived: dict[str, Params] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", frozen_tree(self.params))

    def __repr__(self) -> str:
        return (
            f"Base({self.skeleton.name}, {len(self.params)} tensors, {tree_bytes(self.params):,} bytes, "
            f"fingerprint={self.fingerprint!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a frozen value, which is what makes sharing it safe

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, each storage counted once."""
        return tree_bytes(self.params)

    @property
    def bits_per_param(self) -> float:
        """Bits that hold a parameter of the model, scales included: 32.0 in float32, about 8 in int8, 4 in nf4.

        The mean over all parameters, quantized or not; tied ones count once, buffers not at all.
        """
        skeleton = self.skeleton
        own = [name for name in skeleton.shapes if name not in skeleton.ties]
        scales = [
            f"{path}.weight{suffix}" if path else f"weight{suffix}"
            for path, layer in skeleton.layers.items()
            if layer.scheme is not None
            for suffix in layer.scheme.suffixes
        ]
        held = {name: self.params[name] for name in (*own, *scales) if name in self.params}
        numbers = sum(math.prod(skeleton.shapes[name]) for name in own)
        return 8 * tree_bytes(held) / numbers if numbers else 0.0

    def to(self, device: torch.device | str) -> Base:
        """Returns the base on another device (same fingerprint); itself if it is there already."""
        if all(leaf.device == torch.device(device) for leaf in self.params.values()):
            return self
        moved = _keep_sharing(self.params, device)
        derived = {path: {k: v.to(device) for k, v in leaves.items()} for path, leaves in self.derived.items()}
        return dataclasses.replace(self, params=moved, derived=derived)


@dataclass(frozen=True, eq=False)
class Finetuned:
    """One finetune, or a stack of them: small trainable tensors on top of a `Base`.

    Made by `new_finetuned` and `stack`. A pytree (torch and optree) whose leaves are the
    tensors of `params` and `consts`.

    Attributes:
        params: What is differentiated: ``path.lora_a``, ``(r, in)``; ``path.lora_b``, ``(out, r)``; plain
            weights. Those of a stack have a leading axis N. Read-only.
        consts: What is batched but not trained: ``path.lora_scale`` and ``path.lora_dropout``, both ``()``,
            of a stack ``(N,)``; and what DoRA, PiSSA and OLoRA keep of the frozen weight.
        spec: Static description.
    """

    params: Params
    consts: Params
    spec: Spec

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", frozen_tree(self.params))
        object.__setattr__(self, "consts", frozen_tree(self.consts))

    def __repr__(self) -> str:
        stack = f"stack of {self.stack_size}, " if self.stack_size is not None else ""
        return (
            f"Finetuned({stack}{len(self.spec.adapters)} adapters, {len(self.spec.plain)} plain parameters, "
            f"{self.num_params:,} trainable, base={self.spec.base!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a frozen value

    def __reduce__(self) -> tuple[Any, ...]:
        return Finetuned, (dict(self.params), dict(self.consts), self.spec)  # so that processes can exchange it

    @property
    def stack_size(self) -> int | None:
        """How many finetunes the stack holds; ``None`` for a single finetune."""
        return len(self.spec.members) or None

    @property
    def num_params(self) -> int:
        """Trainable numbers."""
        return sum(leaf.numel() for leaf in self.params.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, each storage counted once."""
        return tree_bytes({**self.params, **self.consts})

    def replace(self, *, params: Params | None = None, consts: Params | None = None) -> Finetuned:
        """Returns a new finetune with other tensors under the same names.

        Args:
            params: New trainable tensors; names must be those of the old ones.
            consts: New constants; likewise.

        Raises:
            ValueError: A name is missing or unknown.
        """
        new_params = self.params if params is None else params
        new_consts = self.consts if consts is None else consts
        for argument, new, old in (("params", new_params, self.params), ("consts", new_consts, self.consts)):
            if new.keys() != old.keys():
                raise ValueError(
                    f"Finetuned.replace({argument}=...): missing names {sorted(old.keys() - new.keys())[:5]}, "
                    f"unknown names {sorted(new.keys() - old.keys())[:5]}; expected exactly the names of "
                    f"tuned.{argument}."
                )
        return Finetuned(new_params, new_consts, self.spec)

    def to(self, device: torch.device | str) -> Finetuned:
        """Returns the finetune on another device."""
        return Finetuned(
            _keep_sharing(self.params, device),
            _keep_sharing(self.consts, device),
            self.spec,
        )


def tree_bytes(tree: Params) -> int:
    """Returns the bytes held by a flat tree, counting each shared storage once."""
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in tree.values()}
    return sum(storages.values())


def _keep_sharing(tree: Params, device: torch.device | str) -> dict[str, Tensor]:
    """Moves each distinct tensor once, so that names which shared a tensor still do."""
    moved: dict[int, Tensor] = {}
    return {name: moved.setdefault(id(leaf), leaf.to(device)) for name, leaf in tree.items()}
