"""Python model of the `mix` kernel in cuda/basic.cu."""

_MASK = (1 << 32) - 1


def s32(v):
    v &= _MASK
    return v - (1 << 32) if v >> 31 else v


def truncating_div(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def byte_perm(a, b, selector):
    source = [(a >> 8 * k) & 255 for k in range(4)] + [(b >> 8 * k) & 255 for k in range(4)]
    return sum(source[(selector >> 4 * k) & 7] << 8 * k for k in range(4))


def mix_reference(x, sel, threads=256):
    n = len(x)
    s = []
    for i in range(threads):
        loc = [int(x[(i + k) % n]) for k in range(16)]
        s.append(s32(sum(loc[(int(x[i % n]) + k) & 15] * (k + 1) for k in range(16))))
    votes = [
        sum((s[i // 32 * 32 + lane] & 1) << lane for lane in range(32)) for i in range(threads)
    ]
    s = [
        s32(v + b.bit_count() + (b & -b).bit_length() + 32 - (b | 1).bit_length())
        for v, b in zip(s, votes, strict=False)
    ]
    any_large = [any(s[i // 32 * 32 + lane] > 100 for lane in range(32)) for i in range(threads)]
    out = []
    for i in range(n):
        v = s32(s[i] + any_large[i])
        v = s32((v & _MASK) ^ byte_perm(v & _MASK, i, 0x3210))
        v = s32(v + (((((i & _MASK) << 32) | (v & _MASK)) << 5 >> 32) & _MASK))
        v = s32(v + ((v * (i + 12345)) >> 32))
        wide = (v & (2**64 - 1)) * 77777 & (2**64 - 1)
        v = s32(v + ((wide * (1 << 60)) >> 64))
        case = (v + sel) & 7
        v = s32(
            [
                lambda v: v + 1,
                lambda v: v * 3,
                lambda v: v - 7,
                lambda v: v ^ 0x55,
                lambda v: truncating_div(v, 3),
                lambda v: v - 17 * truncating_div(v, 17),
                lambda v: v << 2,
                lambda v: ~v,
            ][case](v)
        )
        for _ in range(i & 7):
            v = s32(v * 1103515245 + 12345)
        out.append(v)
    return out
