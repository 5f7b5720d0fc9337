"""Triton kernels for the lean path on a GPU. Nothing here is imported before it is used.

| module | concept |
|---|---|
| `lora` | the products of many adapters on rows that are divided among them |
| `int8` | the frozen base: codes to numbers in one pass, and a product that reads codes |
| `_tiles` | which rows belong to which adapter; sums over tiles |

Each is a ``torch.library.custom_op`` with shapes for tracing and a first derivative, so that ``torch.compile``
keeps one graph. Under torch.func such operators have no derivative: there the composite of plain torch is taken.
All sums are in float32 and in a fixed order, without atomics: the same inputs give the same bits.
"""
