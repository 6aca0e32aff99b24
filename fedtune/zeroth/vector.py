"""Operations that Numba's compiler does not find by itself, as LLVM vector instructions.

`add_looked_up` and `add_permuted` need AVX-512's permutations and are used only where `HAS_PERMUTE` is true;
the others are plain LLVM and run on any processor. Arrays of weights hold float32, or the bits of bfloat16 as
uint16, or those of float16 as int16, for Numba has neither: the type says which. Floats are multiplied by
powers of two at most, and they are added exactly as written, in the order written.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils, config

from fedtune.zeroth import reference

_intrinsic: Any = extending.intrinsic  # its own type takes the first argument for one of the caller's

# Who sets NUMBA_CPU_NAME (a cache shared by unlike machines, say) gets the kernels that run anywhere.
_ANY = getattr(config, "CPU_NAME", None) is not None
HAS_PERMUTE = not _ANY and bool(llvmlite.binding.get_host_cpu_features().get("avx512bw"))
# Elsewhere LLVM would call a function of the C library's, which Numba does not link.
HAS_FLOAT16 = not _ANY and bool(llvmlite.binding.get_host_cpu_features().get("f16c"))

_AHEAD = 1024  # elements: far enough for memory, near enough for the first cache
_BYTE = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_WORDS = ir.VectorType(_I32, 16)
_I64 = ir.IntType(64)
_QUADS = ir.VectorType(_I64, 8)
_HALVES = ir.VectorType(_I16, 32)
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_CHUNKS = 8  # of 32 elements, side by side: a processor does not look far enough ahead itself


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    return builder.bitcast(_address(context, builder, kind, array, index), vector.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * 16))


def _splat64(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_QUADS, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(_QUADS, ir.Undefined), ir.Constant(ir.VectorType(_I32, 8), [0] * 8)
    )


@_intrinsic
def add_signed(typingctx, out, base, at, copies, place, start0, start1, start2, start3, signs):  # type: ignore[no-untyped-def]
    """A tile of out[i] = base[i] + ((s0 + s1) + (s2 + s3)) from i = at on.

    s_t = ±copies[start_t ^ (place + i - at)], − where plane t has its bit set: of the word at signs[32 t +
    i mod 32] the lowest bit for the first 32 elements, the next bit for the next 32. Indices are uint64. The
    low 4 bits of start_t are 0: what they would do is in the choice of copy.
    """
    return types.void(out, base, at, copies, place, start0, start1, start2, start3, signs), _adder(False)


@_intrinsic
def add_permuted(typingctx, out, base, at, y, place, r0, r1, r2, r3, signs):  # type: ignore[no-untyped-def]
    """The same with s_t = ±y[r_t ^ (place + i - at)], for any r_t: lanes are exchanged in the register."""
    return types.void(out, base, at, y, place, r0, r1, r2, r3, signs), _adder(True)


def _adder(permuted: bool) -> Any:
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        out, base, at, copies, place, *starts, signs = arguments
        kinds = signature.args
        orders = []
        if permuted:
            low = ir.Constant(_I64, 15)
            lanes = [_splat(builder, builder.trunc(builder.and_(r, low), _I32)) for r in starts]
            orders = [builder.xor(lane, ir.Constant(_WORDS, list(range(16)))) for lane in lanes]
            starts = [builder.and_(r, ir.Constant(_I64, -16)) for r in starts]
        drawn = []  # in the order plane 0 lanes 0-15, plane 0 lanes 16-31, plane 1 lanes 0-15, …
        for start in range(0, 128, 16):
            pointer = _pointer(context, builder, kinds[9], signs, ir.Constant(_I64, start), _WORDS)
            drawn.append(builder.load(pointer, align=4))
        before = builder.block
        loop, after = builder.append_basic_block("rows"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        # From the last 32 elements to the first: their signs are the top bits of the words, then of the words
        # doubled. A loop, because unrolled the doubling would become shifts, for which processors have fewer
        # units than for additions.
        start = builder.phi(_I64)
        words = [builder.phi(_WORDS) for _ in drawn]
        here = builder.add(at, start)
        _prefetch(context, builder, kinds[1], base, here)
        new = []
        for half, old in enumerate(_read(context, builder, kinds[1], base, here)):
            there = builder.add(place, builder.add(start, ir.Constant(_I64, 16 * half)))
            s = []
            for plane, r in enumerate(starts):
                pointer = _pointer(context, builder, kinds[3], copies, builder.xor(r, there), _WORDS)
                value = builder.load(pointer, align=4)
                if permuted:
                    value = builder.call(_permute(builder), [value, orders[plane]])
                sign = builder.and_(words[2 * plane + half], _constant(_WORDS, 1 << 31))
                s.append(builder.bitcast(builder.xor(value, sign), _FLOATS))
            new.append(builder.fadd(old, builder.fadd(builder.fadd(s[0], s[1]), builder.fadd(s[2], s[3]))))
        _write(context, builder, kinds[0], out, here, new)
        start.add_incoming(ir.Constant(_I64, reference.TILE - 32), before)
        start.add_incoming(builder.sub(start, ir.Constant(_I64, 32)), loop)
        for word, first in zip(words, drawn, strict=True):
            word.add_incoming(first, before)
            word.add_incoming(builder.add(word, word), loop)
        builder.cbranch(builder.icmp_unsigned("==", start, ir.Constant(_I64, 0)), after, loop)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return generate


def _prefetch(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> None:
    """Fetches 32 elements some way ahead: reads that jump blind the processor's own prefetching."""
    fetch = builder.module.declare_intrinsic(
        "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _I32, _I32, _I32])
    )
    for line in range(0, 32, 512 // kind.dtype.bitwidth):
        ahead = builder.add(index, ir.Constant(_I64, _AHEAD + line))
        ahead = builder.bitcast(_address(context, builder, kind, array, ahead), _BYTE.as_pointer())
        builder.call(fetch, [ahead, *(ir.Constant(_I32, n) for n in (1, 3, 1))])


def _read(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> list[Any]:
    """32 elements from `index` on, as two registers of float32."""
    if kind.dtype == types.float32:
        at = (builder.add(index, ir.Constant(_I64, n)) for n in (0, 16))
        return [builder.load(_pointer(context, builder, kind, array, i, _FLOATS), align=4) for i in at]
    both = builder.load(_pointer(context, builder, kind, array, index, _HALVES), align=2)
    if kind.dtype == types.uint16 and HAS_PERMUTE:  # an instruction a register: bits above zeros
        zeros = _constant(_HALVES, 0)
        orders = ([32 if i % 2 == 0 else n + i // 2 for i in range(32)] for n in (0, 16))
        two = (builder.call(_permute_pair(builder), [both, ir.Constant(_HALVES, o), zeros]) for o in orders)
        return [builder.bitcast(one, _FLOATS) for one in two]
    parts = (_shuffled(builder, both, both, range(n, n + 16)) for n in (0, 16))
    return [_widened(builder, kind.dtype, part) for part in parts]


def _write(context: Any, builder: Any, kind: Any, array: Any, index: Any, values: list[Any]) -> None:
    """Two registers of float32 to 32 elements from `index` on."""
    if kind.dtype == types.float32:
        for n, value in zip((0, 16), values, strict=True):
            at = builder.add(index, ir.Constant(_I64, n))
            builder.store(value, _pointer(context, builder, kind, array, at, _FLOATS), align=4)
        return
    pointer = _pointer(context, builder, kind, array, index, _HALVES)
    if kind.dtype == types.uint16 and HAS_PERMUTE:
        one, two = (builder.bitcast(_bfloat16(builder, value), _HALVES) for value in values)
        upper = ir.Constant(_HALVES, list(range(1, 64, 2)))
        builder.store(builder.call(_permute_pair(builder), [one, upper, two]), pointer, align=2)
        return
    one, two = (_narrowed(builder, kind.dtype, value) for value in values)
    builder.store(_shuffled(builder, one, two, range(32)), pointer, align=2)


def _shuffled(builder: Any, one: Any, two: Any, order: Any) -> Any:
    return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))


def _like(value: Any, element: Any) -> Any:
    """The type of as many of `element` as the value holds."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _all(kind: Any, value: float) -> Any:
    return _constant(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def _widened(builder: Any, dtype: Any, bits: Any) -> Any:
    """Bits of bfloat16 (uint16) or float16 (int16), one or many, as float32."""
    wide = _like(bits, _I32)
    if dtype == types.int16 and HAS_FLOAT16:
        return builder.fpext(builder.bitcast(bits, _like(bits, ir.HalfType())), _like(bits, ir.FloatType()))
    if dtype == types.int16:
        bits = builder.zext(bits, wide)
        size = builder.shl(builder.and_(bits, _all(wide, 0x7FFF)), _all(wide, 13))
        size = builder.bitcast(size, _like(bits, ir.FloatType()))
        size = builder.bitcast(builder.fmul(size, _all(size.type, 2.0**112)), wide)  # exponents' difference
        special = builder.icmp_unsigned(">=", size, _all(wide, 0x47800000))  # 2^16
        size = builder.select(special, builder.or_(size, _all(wide, 0x7F800000)), size)
        sign = builder.shl(builder.and_(bits, _all(wide, 0x8000)), _all(wide, 16))
        return builder.bitcast(builder.or_(size, sign), _like(bits, ir.FloatType()))
    return builder.bitcast(builder.shl(builder.zext(bits, wide), _all(wide, 16)), _like(bits, ir.FloatType()))


def _narrowed(builder: Any, dtype: Any, value: Any) -> Any:
    """The same back: to the nearest, ties to even, and any NaN as 0x7FC0 (bfloat16) or 0x7E00 (float16)."""
    narrow = _like(value, _I16)
    if dtype == types.int16:
        nan = builder.fcmp_unordered("uno", value, value)
        if HAS_FLOAT16:
            bits = builder.bitcast(builder.fptrunc(value, _like(value, ir.HalfType())), narrow)
        else:
            bits = builder.trunc(_float16(builder, value), narrow)
        return builder.select(nan, _all(narrow, 0x7E00), bits)
    return builder.trunc(builder.lshr(_bfloat16(builder, value), _all(_like(value, _I32), 16)), narrow)


def _float16(builder: Any, value: Any) -> Any:
    """The bits of float16 as integers of 32 bits, for anything but a NaN."""
    wide = _like(value, _I32)
    bits = builder.bitcast(value, wide)
    size = builder.and_(bits, _all(wide, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, _all(wide, 13)), _all(wide, 1))
    normal = builder.add(builder.add(size, odd), _all(wide, 0xC8000FFF))  # exponent − 112; half a unit
    normal = builder.lshr(normal, _all(wide, 13))
    half = builder.fadd(builder.bitcast(size, value.type), _all(value.type, 0.5))  # its unit is theirs: 2^-24
    small = builder.sub(builder.bitcast(half, wide), _all(wide, 0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", size, _all(wide, 0x38800000)), small, normal)
    large = builder.icmp_unsigned(">=", size, _all(wide, 0x47800000))
    result = builder.select(large, _all(wide, 0x7C00), result)
    return builder.or_(result, builder.and_(builder.lshr(bits, _all(wide, 16)), _all(wide, 0x8000)))


def _bfloat16(builder: Any, value: Any) -> Any:
    """The bits of bfloat16 in the upper half of each of float32, and anything in the lower."""
    nan, wide = builder.fcmp_unordered("uno", value, value), _like(value, _I32)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, _all(wide, 16)), _all(wide, 1))
    bits = builder.add(bits, builder.add(odd, _all(wide, 0x7FFF)))
    return builder.select(nan, _all(wide, 0x7FC00000), bits)


@_intrinsic
def widened(typingctx, element):  # type: ignore[no-untyped-def]
    """An element of a kernel's array as float32: itself, or from the bits of bfloat16 or float16."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return arguments[0] if element == types.float32 else _widened(builder, element, arguments[0])

    return types.float32(element), generate


@_intrinsic
def narrowed(typingctx, value, element):  # type: ignore[no-untyped-def]
    """A float32 rounded to what `element` is."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return arguments[0] if element == types.float32 else _narrowed(builder, element, arguments[0])

    return element(types.float32, element), generate


def _permute(builder: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
    return builder.module.declare_intrinsic("llvm.x86.avx512.permvar.si.512", (), kind)


@_intrinsic
def add_looked_up(typingctx, total, states, key, digits, elements):  # type: ignore[no-untyped-def]
    """total[i] += Σ_t T_t[part t of halfword i], modulo 2^32, for i < `elements`, a multiple of 256.

    `states` holds 8 uint64 for 32 elements, in the order of `fedtune.zeroth.reference.states`. `digits` holds
    the tables' entries as two int16, low + 2^14 high with |low| ≤ 2^13: 128 low ones, then 128 high ones.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        total, states, key, digits, elements = arguments
        kinds = signature.args
        spread = _splat64(builder, key)

        def mixed(first: Any) -> list[Any]:
            xs = []
            for n in range(_CHUNKS):
                at = builder.add(first, ir.Constant(_I64, 8 * n))
                state = builder.load(_pointer(context, builder, kinds[1], states, at, _QUADS), align=4)
                xs.append(builder.mul(builder.xor(state, spread), _constant(_QUADS, reference.MIX[0])))
            xs = [builder.mul(_folded(builder, x), _constant(_QUADS, reference.MIX[1])) for x in xs]
            return [builder.bitcast(_folded(builder, x), _HALVES) for x in xs]

        tables = []
        for start in range(0, 256, 32):
            pointer = _pointer(context, builder, kinds[3], digits, ir.Constant(_I64, start), _HALVES)
            tables.append(builder.load(pointer, align=2))
        step = ir.Constant(_I64, 32 * _CHUNKS)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), elements, step, _I64) as (i, _):
            for n, word in enumerate(mixed(builder.lshr(i, ir.Constant(_I64, 2)))):
                low, high = _looked_up(builder, tables[:4], word), _looked_up(builder, tables[4:], word)
                for half in range(2):
                    at = builder.add(i, ir.Constant(_I64, 32 * n + 16 * half))
                    target = _pointer(context, builder, kinds[0], total, at, _WORDS)
                    result = builder.load(target, align=4)
                    for digit, weight in ((high, 1 << 14), (low, 1)):
                        # Pairs of int16 times (weight, 0) or (0, weight), added up: one of the two, widened.
                        weights = ir.Constant(_HALVES, [weight * (k % 2 == half) for k in range(32)])
                        result = _multiply_add(builder, result, digit, weights)
                    builder.store(result, target, align=4)
        return context.get_dummy_value()

    return types.void(total, states, key, digits, elements), generate


def _folded(builder: Any, x: Any) -> Any:
    return builder.xor(x, builder.lshr(x, _constant(_QUADS, 32)))


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _looked_up(builder: Any, tables: list[Any], word: Any) -> Any:
    """32 lanes of the sum of three entries; an instruction looks only at the bits that it needs."""
    lower, upper, second, third = tables
    one = builder.call(_permute_pair(builder), [lower, word, upper])
    two, three = (
        builder.call(_permute_halves(builder), [table, builder.lshr(word, _constant(_HALVES, bit))])
        for table, (bit, _) in zip((second, third), reference.FIELDS[1:], strict=True)
    )
    return builder.add(builder.add(one, two), three)


def _permute_pair(builder: Any) -> Any:
    kind = ir.FunctionType(_HALVES, [_HALVES] * 3)
    return builder.module.declare_intrinsic("llvm.x86.avx512.vpermi2var.hi.512", (), kind)


def _permute_halves(builder: Any) -> Any:
    kind = ir.FunctionType(_HALVES, [_HALVES] * 2)
    return builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", (), kind)


def _multiply_add(builder: Any, total: Any, one: Any, two: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_HALVES] * 2)
    pairs = builder.module.declare_intrinsic("llvm.x86.avx512.pmaddw.d.512", (), kind)
    return builder.add(total, builder.call(pairs, [one, two]))


@_intrinsic
def popcount(typingctx, word):  # type: ignore[no-untyped-def]
    """The number of bits set in a uint32, as a uint32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.uint32(types.uint32), generate
