"""A store of many finetunes: few on the device, none lost, all bitwise."""

from __future__ import annotations

import gc
import re
import threading

import pytest
import torch
import torch.utils._pytree as pytree
from models import Everything, assert_same_finetune, finetunes, randomized
from torch import Tensor

import finetuna_func as ft
from finetuna_func import Finetuned, LinearAdapterConfig, optim
from finetuna_func import store as module


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return ft.quantize_base_model(Everything().eval())


@pytest.fixture(params=["memory", "disk"])
def make(request, base, tmp_path):
    """Makes a store of either kind."""
    folders = iter(range(9))

    def made(resident: int = 2) -> ft.Store:
        folder = tmp_path / str(next(folders)) if request.param == "disk" else None
        return ft.Store(base, resident=resident, folder=folder)

    return made


def loss_on(base: ft.Base, ids: Tensor):
    return lambda t: ft.apply_stacked(base, t, ids.expand(t.stack_size, *ids.shape)).square().mean(dim=(1, 2, 3))


def train(base: ft.Base, stacked: Finetuned, state, tx, steps: int = 2):
    ids = torch.arange(10).reshape(2, 5)
    for _ in range(steps):
        _, grads = ft.stacked_value_and_grad(loss_on(base, ids))(stacked)
        updates, state = tx.update(grads, state, stacked)
        stacked = optim.apply_updates(stacked, updates)
    return stacked, state


def assert_close(a, b):
    leaves, spec = pytree.tree_flatten(a)
    others, other_spec = pytree.tree_flatten(b)
    assert spec == other_spec
    for one, other in zip(leaves, others, strict=True):
        same = torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, Tensor) else one == other
        assert same


def test_what_goes_in_comes_out_bitwise(make, base):
    store = make(1)
    tuned = finetunes(base, 4)
    states = [
        {"a": torch.randn(3, 2, dtype=torch.float64), "b": [torch.arange(3, dtype=torch.uint8), 7, None, "x"]},
        None,
        optim.adamw8bit(1e-3, min_size=1).init(tuned[2]),
        (),
    ]
    for i, (t, state) in enumerate(zip(tuned, states, strict=True)):
        store.put(f"{i}", t, state)
    assert list(store) == ["0", "1", "2", "3"] and len(store) == 4 and "2" in store and "4" not in store
    for i in (3, 0, 2, 1, 1):
        assert_same_finetune(store[f"{i}"], tuned[i])
        assert_close(store.state(f"{i}"), states[i])
        assert store.resident == (f"{i}",)
    assert store.state("1") is None and store.state("3") == ()


def test_the_one_used_longest_ago_leaves_first(make, base):
    store = make(2)
    for i, t in enumerate(finetunes(base, 4)):
        store[f"{i}"] = t
    assert store.resident == () and store.resident_bytes == 0
    for name, after in (("0", "0"), ("1", "01"), ("0", "10"), ("2", "02"), ("3", "23"), ("2", "32")):
        assert store[name] is store[name]  # resident, so that it is not fetched again
        assert "".join(store.resident) == after
    assert store.resident_bytes == store["3"].nbytes + store["2"].nbytes
    store["2"] = store["0"]
    assert store.resident == ("0",)  # what was written is fetched when it is used
    assert_same_finetune(store["2"], store["0"])
    assert repr(store).startswith("Store(4 finetunes in") and "2 of 2 on cpu" in repr(store)


@pytest.mark.parametrize("tx", [optim.adamw(1e-2), optim.adamw8bit(1e-2, min_size=1)], ids=["adamw", "adamw8bit"])
def test_training_by_turns_is_training_alone(make, base, tx):
    """Four finetunes, three of which fit: groups come and go, and each ends where it ends without a store."""
    tuned = finetunes(base, 4)
    store = make(3)
    for i, t in enumerate(tuned):
        store.put(f"{i}", t, tx.init(t))
    groups = ["012", "13", "230", "0"]
    for group in groups:
        names = list(group)
        stacked, state = train(base, store.stack(names), store.stack_states(names), tx)
        store.update(names, stacked, state)
    for i, t in enumerate(tuned):
        turns = sum(f"{i}" in group for group in groups)
        stacked, state = train(base, ft.stack([t]), tx.init(ft.stack([t])), tx, 2 * turns)
        end = ft.index(stacked, 0)
        found = store[f"{i}"]
        # A product of three finetunes may be summed in another order than of one; Adam passes on relative errors,
        # in 8 bits by whole codes here and there.
        apart = max(float((found.params[n] - end.params[n]).abs().max()) for n in end.params)
        moved = max(float((t.params[n] - end.params[n]).abs().max()) for n in end.params)
        assert apart < 0.05 * moved and moved > 1e-2
        assert int(store.state(f"{i}")[0].step) == 2 * turns


def test_update_is_stack_undone_bitwise(make, base):
    store, tx, tuned = make(3), optim.adamw(1e-2), finetunes(base, 3)
    for i, t in enumerate(tuned):
        store.put(f"{i}", t, tx.init(t))
    names = ["2", "0", "1"]
    stacked, state = train(base, store.stack(names), store.stack_states(names), tx)
    store.update(names, stacked, state)
    again, again_state = store.stack(names), store.stack_states(names)
    assert_close((dict(again.params), again_state), (dict(stacked.params), state))
    for i, name in enumerate(names):
        assert_same_finetune(store[name], ft.index(stacked, i))
    kept = store.state("0")
    store.update(names[:2], ft.stack(tuned[2:] + tuned[:1]))  # without states, they stay
    assert_close(store.state("0"), kept)
    assert_same_finetune(store["0"], tuned[0])


def test_ranks_differ(make, base):
    """Moments are padded as params are, and cut again; those in 8 bits cannot be."""
    tuned = [randomized(ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=r)), r) for r in (1, 3)]
    tx, tx8 = optim.adamw(1e-2), optim.adamw8bit(1e-2, min_size=1)
    store = make(2)
    for i, t in enumerate(tuned):
        store.put(f"{i}", t, tx.init(t))
    names = ["0", "1"]
    stacked, state = store.stack(names), store.stack_states(names)
    assert_close(state, tx.init(ft.stack(tuned)))
    stacked, state = train(base, stacked, state, tx)
    store.update(names, stacked, state)
    assert store["0"].params["fc1.lora_a"].shape == (1, 8)
    assert store.state("0")[0].mu["fc1.lora_a"].shape == (1, 8)
    assert_close(store.stack_states(names), state)
    assert_close(dict(store.stack(names).params), dict(stacked.params))
    for i, t in enumerate(tuned):
        store.put(f"{i}", t, tx8.init(t))
    with pytest.raises(ValueError, match=re.escape("Only moments in floating point can be padded to a larger rank")):
        store.stack_states(names)


def test_the_disk_holds_what_the_memory_does_not(base, tmp_path):
    """Tensors alive in the process, counted: those of the residents, whatever the number of finetunes."""
    store = ft.Store(base, resident=2, folder=tmp_path / "store")
    one = ft.new_finetuned(base)

    def alive() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.numel()]
        # By storage, not address: what a compiler leaves behind has none.
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    before = alive()
    for i in range(10):
        store.put(f"{i}", randomized(one, i), optim.adamw(1e-3).init(one))
    assert alive() <= before
    for turn in range(3):
        for i in range(10):
            assert store[f"{i}"].nbytes == one.nbytes
            assert store.resident_bytes <= 2 * one.nbytes
        names = [f"{turn}", f"{turn + 5}"]
        store.update(names, store.stack(names), store.stack_states(names))
    assert alive() <= before + 2.1 * one.nbytes
    folders = list((tmp_path / "store").iterdir())
    assert len(folders) == 10  # what was replaced is gone
    del store["3"]
    assert len(list((tmp_path / "store").iterdir())) == 9 and "3" not in store
    path = next((tmp_path / "store").glob("*-4-*"))
    assert_same_finetune(ft.load(path / "finetune", base), store["4"])


def test_a_stack_and_its_parts_are_not_both_there(base, tmp_path):
    store = ft.Store(base, resident=3, folder=tmp_path)
    for i, t in enumerate(finetunes(base, 4)):
        store[f"{i}"] = t
    for i in range(3):
        assert store[f"{i}"]
    assert len(store.resident) == 3
    store.stack(["2", "3"])
    assert store.resident == ("2",)


def test_a_part_of_a_stack_does_not_keep_the_stack(base):
    store, n = ft.Store(base, resident=1), 5
    stacked = ft.stack(finetunes(base, n))
    state = optim.adamw(1e-3).init(stacked)
    store.put("0", ft.index(stacked, 0), pytree.tree_map(lambda leaf: leaf[0], state))
    for leaf in pytree.tree_leaves(store.state("0")):
        assert leaf.untyped_storage().nbytes() == leaf.nbytes
    store.update(["0"], module.stack([ft.index(stacked, 0)]), pytree.tree_map(lambda leaf: leaf[:1], state))
    for leaf in pytree.tree_leaves((store.state("0"), store["0"])):
        assert leaf.untyped_storage().nbytes() == leaf.nbytes


def test_a_failing_update_changes_nothing(make, base, monkeypatch):
    store, tuned = make(3), finetunes(base, 3)
    for i, t in enumerate(tuned):
        store.put(f"{i}", t, {"step": torch.tensor(i)})
    other = ft.stack([randomized(t, 50) for t in tuned])
    calls = iter(range(9))
    real = ft.Store._written

    def failing(self, *args):
        if next(calls) == 2:
            raise OSError("no space left on device")
        return real(self, *args)

    monkeypatch.setattr(ft.Store, "_written", failing)
    with pytest.raises(OSError, match="no space"):
        store.update(["0", "1", "2"], other, {"step": torch.zeros(3)})
    with pytest.raises(ValueError, match=re.escape("state['step'] has shape (2,), expected a leading axis of 3")):
        store.update(["0", "1", "2"], other, {"step": torch.zeros(2)})
    for i, t in enumerate(tuned):
        assert_same_finetune(store[f"{i}"], t)
        assert store.state(f"{i}") == {"step": i}
    if store._folder is not None:
        assert len(list(store._folder.iterdir())) == 3


def test_a_failing_save_leaves_no_half_folder(base, tmp_path, monkeypatch):
    store, tuned = ft.Store(base, resident=1, folder=tmp_path), finetunes(base, 1)[0]
    store.put("a", tuned, torch.ones(3))

    def failing(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", failing)
    with pytest.raises(OSError, match="no space"):
        store.put("a", randomized(tuned, 9), torch.zeros(3))
    assert_same_finetune(store["a"], tuned)
    assert torch.equal(store.state("a"), torch.ones(3)) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "/root", "nul\0", "ü" * 300, "con", " ", "-rf"])
def test_any_string_is_a_name(make, base, name):
    store, tuned = make(1), finetunes(base, 2)
    store["other"] = tuned[0]
    store[name] = tuned[1]
    assert_same_finetune(store[name], tuned[1])
    assert_same_finetune(store["other"], tuned[0])
    if store._folder is not None:
        assert len(list(store._folder.iterdir())) == 2


def test_threads(make, base):
    """Each of four threads counts in its own finetune and reads the others'; nothing is torn or lost."""
    store, tuned = make(2), finetunes(base, 4)
    ones = [t.replace(params={n: torch.zeros_like(p) for n, p in t.params.items()}) for t in tuned]
    for i, t in enumerate(ones):
        store.put(f"{i}", t, torch.tensor(0))
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for k in range(8):
                mine = store[f"{i}"]
                store.put(f"{i}", mine.replace(params={n: p + 1 for n, p in mine.params.items()}), torch.tensor(k + 1))
                other = store[f"{(i + k) % 4}"]
                values = {float(p.flatten()[0]) for p in other.params.values()}
                assert len(values) == 1
                assert len(store.resident) <= 2
                store.stack([f"{i}", f"{(i + 1) % 4}"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i in range(4):
        assert all((p == 8).all() for p in store[f"{i}"].params.values()) and store.state(f"{i}") == 8


def test_errors(make, base, tmp_path):
    store, tuned = make(2), finetunes(base, 3)
    for i, t in enumerate(tuned):
        store[f"{i}"] = t
    other = ft.quantize_base_model(Everything(width=16).eval())
    foreign = ft.new_finetuned(other)
    fewer = ft.new_finetuned(base, adapt_layers={"fc1"}, plain_layers=())
    ranked = ft.new_finetuned(base, linear_config=LinearAdapterConfig(r=2))
    stacked = ft.stack(tuned[:2])
    store.put("with", tuned[0], {"a": torch.ones(1)})
    store.put("else", tuned[0], {"b": torch.ones(1)})
    store.put("long", tuned[0], {"a": torch.ones(2)})
    store.put("five", tuned[0], {"a": 5})
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    calls = [
        (TypeError, "Store(base=...): got a Finetuned, expected a Base", lambda: ft.Store(tuned[0], resident=1)),
        (ValueError, "Store(resident=0): expected an integer of at least 1", lambda: ft.Store(base, resident=0)),
        (ValueError, "Store(resident=True)", lambda: ft.Store(base, resident=True)),
        (
            FileExistsError,
            "expected an empty or new folder",
            lambda: ft.Store(base, resident=1, folder=full),
        ),
        (FileExistsError, "expected an empty", lambda: ft.Store(base, resident=1, folder=full / "file")),
        (KeyError, "no finetune is called 'x'; there are 7: ['0', '1', '2', 'else', 'five'] ...", lambda: store["x"]),
        (KeyError, "no finetune is called 'x'", lambda: store.state("x")),
        (KeyError, "no finetune is called 'x'", lambda: store.stack(["0", "x"])),
        (KeyError, "no finetune is called 'x'", lambda: store.update(["x"], stacked)),
        (KeyError, "no finetune is called 'x'", lambda: store.__delitem__("x")),
        (TypeError, "got the name 3 of type int", lambda: store.put(3, tuned[0])),
        (TypeError, "got a dict for 'a', expected a Finetuned", lambda: store.put("a", {})),
        (ValueError, "'a' is a stack of 2; keep each of ft.unstack", lambda: store.put("a", stacked)),
        (ValueError, "'a' belongs to base", lambda: store.put("a", foreign)),
        (
            ValueError,
            "3 names, but resident=2 is how many may be on the device",
            lambda: store.stack(["0", "1", "2"]),
        ),
        (ValueError, "got 3 names, but resident=2", lambda: store.stack_states(["0", "1", "2"])),
        (ValueError, "got the string '01', expected a list", lambda: store.stack("01")),
        (ValueError, "got the names [], expected at least one", lambda: store.stack([])),
        (ValueError, "got the names ['0', '0'], expected at least one, each once", lambda: store.stack(["0", "0"])),
        (ValueError, "got a stack of 2 for 1 names", lambda: store.update(["0"], stacked)),
        (ValueError, "got no stack for 1 names", lambda: store.update(["0"], tuned[0])),
        (ValueError, "in the place of '1' has other layers", lambda: store.update(["1"], ft.stack([fewer]))),
        (ValueError, "in the place of '1' has other layers, ranks", lambda: store.update(["1"], ft.stack([ranked]))),
        (ValueError, "'0' has no state", lambda: store.stack_states(["0", "1"])),
        (
            ValueError,
            "'else' has a state of another structure",
            lambda: store.stack_states(["with", "else"]),
        ),
        (
            ValueError,
            "['a'] differs: {'with': (torch.float32, (1,))",
            lambda: store.stack_states(["with", "long"]),
        ),
        (ValueError, "state['a'] is [", lambda: store.stack_states(["with", "five"])),
    ]
    before = {name: store[name] for name in store}
    for kind, text, call in calls:
        with pytest.raises(kind, match=re.escape(text)):
            call()
    for name, t in before.items():
        assert_same_finetune(store[name], t)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_the_resident_ones_alone(base):
    """The others are in pinned memory, and what the device held for them is free again."""
    on_gpu, tx = base.to("cuda"), optim.adamw(1e-2)
    tuned = finetunes(base, 5)
    states = [
        pytree.tree_map(lambda x: torch.rand_like(x) if x.is_floating_point() else x + 3, tx.init(t)) for t in tuned
    ]
    store = ft.Store(on_gpu, resident=2)
    for i, (t, state) in enumerate(zip(tuned, states, strict=True)):
        moved = pytree.tree_map(lambda x: x.to("cuda"), state)
        store.put(f"{i}", t.to("cuda") if i % 2 else t, moved)  # from either side
        pytree.tree_map(lambda x: x.zero_(), moved)  # what was put is a copy
    for entry in store._entries.values():
        assert all(leaf.is_pinned() for leaf in (*entry.tuned.params.values(), *entry.state))
    gc.collect()
    before = torch.cuda.memory_allocated()
    for i in (4, 0, 1, 3, 2, 0):
        found = store[f"{i}"]
        assert all(leaf.is_cuda for leaf in found.params.values())
        assert_same_finetune(found.to("cpu"), tuned[i])
        assert_close(pytree.tree_map(lambda x: x.to("cpu"), store.state(f"{i}")), states[i])
        del found
    assert store.resident == ("2", "0")
    # Each tensor takes a multiple of 512 bytes.
    blocks = sum(-(-leaf.nbytes // 512) * 512 for t in store._residents.values() for leaf in t.params.values())
    consts = sum(512 * len(t.consts) for t in store._residents.values())
    assert blocks <= torch.cuda.memory_allocated() - before <= blocks + consts
    names = ["3", "1"]
    stacked, state = store.stack(names), store.stack_states(names)
    ids = torch.arange(10, device="cuda").reshape(2, 5)
    _, grads = ft.stacked_value_and_grad(loss_on(on_gpu, ids))(stacked)
    updates, state = tx.update(grads, state, stacked)
    stacked = optim.apply_updates(stacked, updates)
    store.update(names, stacked, state)
    for i, name in enumerate(names):
        assert_same_finetune(store[name], ft.index(stacked, i))
        assert any(not torch.equal(store[name].params[n].cpu(), leaf) for n, leaf in tuned[int(name)].params.items())
