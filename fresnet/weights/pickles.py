"""A pickle read without running anything that it names.

A pickle is a program: it names functions and classes, and says with what to call them and what to
set on the results. Here each name stands for one of a few functions of this file, which make
tensors and mappings, or for a class that does nothing. Nothing is imported, nothing else is called,
and nothing is set on anything. So what training scripts keep beside weights, such as arguments,
paths and numbers of numpy, does no harm: it becomes `Skipped`.

It is read by Python's unpickler in Python, whose instructions can be replaced one by one. The one
in C calls what it likes for some of them.
"""

import pickle
from collections.abc import Callable, Iterable
from math import prod
from typing import IO, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fresnet.errors import FresnetError

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "QInt32Storage": torch.int32,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}

NAMES = 10_000
"""How many things a pickle may name that are not made."""

ENTRY = 64
"""Bytes that an entry of a mapping or of a list takes at least."""

BUILTINS = {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"}
BUILTINS |= {"set", "str", "tuple"}
"""Names that say nothing of what a file wants: they are skipped, but not told."""


class _Mapping(dict[Any, Any]):
    """Any mapping of the standard library. What else it knew is forgotten, but for `_metadata`."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()
        self._metadata: dict[Any, Any] = {}
        last = arguments[-1] if arguments else ()
        pairs: Any = last.items() if isinstance(last, dict) else last
        if isinstance(last, dict | list | tuple):  # Python 2 wrote entries as arguments
            _put(self, ((pair[0], pair[1]) for pair in pairs if len(pair) == 2))


class Skipped(dict[Any, Any]):
    """Stands in for anything else. What a file puts into it as into a mapping is there.

    Each name in a file gets a class of its own.
    """


class _Call(NamedTuple):
    """A function that a pickle may call."""

    function: Callable[..., Any]


class Budget:
    """The bytes that a file may still ask for, which are a few times its length in all.

    With strides of 0 a few bytes would make a tensor of any size, and mappings can be copied over
    and over.
    """

    def __init__(self, length: int) -> None:
        self._left = 16 * length

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise FresnetError("what it describes is many times larger than the file")


class Storage(NamedTuple):
    """Bytes that tensors share, and the dtype of which they are."""

    data: Tensor
    dtype: torch.dtype
    budget: Budget

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        numbers = (offset, *size, *stride)
        if len(numbers) > 2 * 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise FresnetError("it is damaged: a tensor has no sizes and strides")
        self.budget.take(prod(size) * self.dtype.itemsize)
        return self.data.view(self.dtype).as_strided(size, stride, offset)


def _typed(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Any:
    """A tensor; one that is conjugated or negated, as metadata say, is skipped."""
    if not isinstance(storage, Storage) or any(more[2:]):
        return Skipped()
    return storage.tensor(offset, size, stride)


def _untyped(
    storage: Any, offset: int, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *more: Any
) -> Any:
    if not isinstance(storage, Storage) or any(more):
        return Skipped()
    return storage._replace(dtype=dtype).tensor(offset, size, stride)


def _of_type(function: Any, _: object, arguments: Any, *__: object) -> Any:
    """A tensor of another class, or with attributes, as a plain one."""
    return function.function(*arguments) if isinstance(function, _Call) else Skipped()


CALLS = {
    "torch._utils._rebuild_tensor": _Call(_typed),
    "torch._utils._rebuild_tensor_v2": _Call(_typed),
    "torch._utils._rebuild_tensor_v3": _Call(_untyped),
    "torch._utils._rebuild_parameter": _Call(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": _Call(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": _Call(_of_type),
    "torch.Size": _Call(lambda sizes=(): tuple(sizes)),
    "collections.OrderedDict": _Call(_Mapping),
    "collections.defaultdict": _Call(_Mapping),
    "collections.Counter": _Call(_Mapping),
}
"""What a file may call, by its name in files."""


def _put(mapping: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
    """Put what has a plain key into a mapping: no other can be hashed without care."""
    for key, value in pairs:
        if key is None or type(key) in (str, bytes, int, float, bool):
            mapping[key] = value


_Base: Any = pickle._Unpickler


class Unpickler(_Base):  # type: ignore[misc]
    """Reads one pickle. Storages come from a function of the persistent id in it."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Base.dispatch)

    def __init__(
        self,
        file: IO[bytes],
        storage: Callable[..., Storage],
        skipped: dict[str, type[Skipped]],
        budget: Budget,
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._storage, self._skipped, self._budget = storage, skipped, budget

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in CALLS:
            return CALLS[full]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        shown = full.encode("unicode_escape").decode()
        if len(self._skipped) > NAMES:
            raise FresnetError(f"a pickle that names more than {NAMES} things")
        kind = self._skipped.get(shown) or type(shown, (Skipped,), {})
        if module not in ("builtins", "__builtin__") or name not in BUILTINS:
            self._skipped[shown] = kind
        return kind

    def persistent_load(self, at: Any) -> Any:
        kind, *details = at
        if kind == "storage" and isinstance(details[0], torch.dtype) and type(details[1]) is str:
            return self._storage(*details)
        return details[0] if kind == "module" else Skipped()

    def _called(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, _Call):
            copied = sum(len(one) for one in arguments if isinstance(one, dict | list | tuple))
            self._budget.take(ENTRY * copied)
            return function.function(*arguments)
        return function() if isinstance(function, type) and issubclass(function, Skipped) else None

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        modules = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(made, _Mapping) and isinstance(modules, dict):
            made._metadata = modules  # a state dict's; all other state is set on nothing

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            _put(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1] += items

    def load_set(self) -> None:
        self.append(Skipped())

    def load_additems(self) -> None:
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Skipped())

    def refuse(self) -> None:
        raise FresnetError("a pickle of instructions that torch.save does not write")


for _code, _name in {
    pickle.REDUCE: "load_reduce",
    pickle.NEWOBJ: "load_reduce",
    pickle.NEWOBJ_EX: "load_newobj_ex",
    pickle.BUILD: "load_build",
    pickle.SETITEM: "load_setitem",
    pickle.SETITEMS: "load_setitems",
    pickle.DICT: "load_dict",
    pickle.APPEND: "load_append",
    pickle.APPENDS: "load_appends",
    pickle.EMPTY_SET: "load_set",
    pickle.ADDITEMS: "load_additems",
    pickle.FROZENSET: "load_frozenset",
    pickle.EXT1: "refuse",
    pickle.EXT2: "refuse",
    pickle.EXT4: "refuse",
    pickle.INST: "refuse",
    pickle.OBJ: "refuse",
    pickle.PERSID: "refuse",
    pickle.BYTEARRAY8: "refuse",
}.items():
    Unpickler.dispatch[_code[0]] = getattr(Unpickler, _name)
