"""Four operations on 16 lanes that Numba's compiler does not find by itself, as LLVM vector instructions.

`add_signed` and `popcount` are plain LLVM and run on any processor; `lookup16` and `add_permuted` need the
AVX-512 permutation and are used only where `HAS_PERMUTE` is true. Nothing is multiplied, and floats are added
exactly as written, in the order written.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
from llvmlite import ir
from numba import extending, types
from numba.core import config

_intrinsic: Any = extending.intrinsic  # its own type takes the first argument for one of the caller's

# Who sets NUMBA_CPU_NAME (a cache shared by unlike machines, say) gets the kernels that run anywhere.
HAS_PERMUTE = getattr(config, "CPU_NAME", None) is None and bool(
    llvmlite.binding.get_host_cpu_features().get("avx512f")
)

_AHEAD = 1024  # elements: far enough for memory, near enough for the first cache
_BYTE = ir.IntType(8)
_I32 = ir.IntType(32)
_WORDS = ir.VectorType(_I32, 16)
_FLOATS = ir.VectorType(ir.FloatType(), 16)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    return builder.bitcast(_address(context, builder, kind, array, index), vector.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * 16))


@_intrinsic
def add_signed(typingctx, out, base, at, copies, place, start0, start1, start2, start3, signs, bits):  # type: ignore[no-untyped-def]
    """256 elements of out[i] = base[i] + ((s0 + s1) + (s2 + s3)) from i = at on.

    s_t = ±copies[start_t ^ (place + i - at)], − where plane t has its bit set: of the word at signs[32 t +
    i mod 32], bit `bits` for the first 32 elements, the next bit for the next 32. `bits` is a uint32,
    indices are uint64. The low 4 bits of start_t are 0: what they would do is in the choice of copy.
    """
    return types.void(out, base, at, copies, place, start0, start1, start2, start3, signs, bits), _adder(
        False
    )


@_intrinsic
def add_permuted(typingctx, out, base, at, y, place, r0, r1, r2, r3, signs, bits):  # type: ignore[no-untyped-def]
    """The same with s_t = ±y[r_t ^ (place + i - at)], for any r_t: lanes are exchanged in the register."""
    return types.void(out, base, at, y, place, r0, r1, r2, r3, signs, bits), _adder(True)


def _adder(permuted: bool) -> Any:
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        out, base, at, copies, place, *starts, signs, bits = arguments
        kinds = signature.args
        wide = ir.IntType(64)
        orders = []
        if permuted:
            low = ir.Constant(wide, 15)
            lanes = [_splat(builder, builder.trunc(builder.and_(r, low), _I32)) for r in starts]
            orders = [builder.xor(lane, ir.Constant(_WORDS, list(range(16)))) for lane in lanes]
            starts = [builder.and_(r, ir.Constant(wide, -16)) for r in starts]
        left = _splat(builder, builder.sub(ir.Constant(_I32, 24), bits))
        top = ir.Constant(_WORDS, [0x80000000] * 16)
        words = []  # in the order plane 0 lanes 0-15, plane 0 lanes 16-31, plane 1 lanes 0-15, …
        for start in range(0, 128, 16):
            pointer = _pointer(context, builder, kinds[9], signs, ir.Constant(wide, start), _WORDS)
            words.append(builder.shl(builder.load(pointer, align=4), left))
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _I32, _I32, _I32])
        )
        for step in range(16):
            here = builder.add(at, ir.Constant(wide, 16 * step))
            there = builder.add(place, ir.Constant(wide, 16 * step))
            s = []
            for plane, (word, start) in enumerate(zip(words[step % 2 :: 2], starts, strict=True)):
                index = builder.xor(start, there)
                value = builder.load(_pointer(context, builder, kinds[3], copies, index, _WORDS), align=4)
                if permuted:
                    value = builder.call(_permute(builder), [value, orders[plane]])
                sign = builder.and_(builder.shl(word, ir.Constant(_WORDS, [7 - step // 2] * 16)), top)
                s.append(builder.bitcast(builder.xor(value, sign), _FLOATS))
            total = builder.fadd(builder.fadd(s[0], s[1]), builder.fadd(s[2], s[3]))
            # The reads of `copies` jump, which blinds the processor's own prefetching to the one stream here.
            ahead = builder.add(here, ir.Constant(wide, _AHEAD))
            ahead = builder.bitcast(_address(context, builder, kinds[1], base, ahead), _BYTE.as_pointer())
            builder.call(fetch, [ahead, *(ir.Constant(_I32, n) for n in (1, 3, 1))])
            old = builder.load(_pointer(context, builder, kinds[1], base, here, _FLOATS), align=4)
            new = builder.fadd(old, total)
            builder.store(new, _pointer(context, builder, kinds[0], out, here, _FLOATS), align=4)
        return context.get_dummy_value()

    return generate


def _permute(builder: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
    return builder.module.declare_intrinsic("llvm.x86.avx512.permvar.si.512", (), kind)


@_intrinsic
def lookup16(typingctx, total, at, words, place, tables):  # type: ignore[no-untyped-def]
    """16 lanes of total[at] += Σ_{n<8} tables[16 n + (nibble n of words[place])], modulo 2^32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        total, at, words, place, tables = arguments
        kinds = signature.args
        word = builder.load(_pointer(context, builder, kinds[2], words, place, _WORDS), align=4)
        sums = []
        for nibble in range(8):
            start = ir.Constant(ir.IntType(64), 16 * nibble)
            table = builder.load(_pointer(context, builder, kinds[4], tables, start, _WORDS), align=4)
            shifted = builder.lshr(word, ir.Constant(_WORDS, [4 * nibble] * 16)) if nibble else word
            sums.append(builder.call(_permute(builder), [table, shifted]))  # looks at the low 4 bits alone
        while len(sums) > 1:
            sums = [builder.add(one, two) for one, two in zip(sums[::2], sums[1::2], strict=True)]
        target = _pointer(context, builder, kinds[0], total, at, _WORDS)
        builder.store(builder.add(builder.load(target, align=4), sums[0]), target, align=4)
        return context.get_dummy_value()

    return types.void(total, at, words, place, tables), generate


@_intrinsic
def popcount(typingctx, word):  # type: ignore[no-untyped-def]
    """The number of bits set in a uint32, as a uint32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.uint32(types.uint32), generate
