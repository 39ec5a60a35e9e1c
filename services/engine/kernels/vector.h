/* The few vector operations that the kernels are written in, over as many lanes as the instruction set has.
 *
 * Everything that includes this is compiled once for each instruction set (see build.py) and chosen at run time.
 */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* VL: lanes of 32 bits.  A tile of a matmul is MR rows times PART vectors, of which the format's numbers and some operands
 * fit the registers; up to WHOLE rows it is as wide as a panel.  BLOCK_ROWS: as many as are multiplied with one panel after the
 * other, so that they stay in a thread's own cache.  STORED_ROWS: see KINDS. */
#if defined(__AVX512F__)
#define VL 16
#define MR(format) ((format) == F32 || (format) == BF16 ? 12 : 6)
#define BLOCK_ROWS(format) 144
#define PART 2
#define WHOLE(format) MR(format)
#define STORED_ROWS 3
#define LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h), \
                    F(8, h), F(9, h), F(10, h), F(11, h), F(12, h), F(13, h), F(14, h), F(15, h)
#elif defined(__AVX2__)
#define VL 8
#define MR(format) ((format) == F32 ? 3 : (format) == BF16 ? 4 : 6)
#define BLOCK_ROWS(format) (12 * MR(format))
#define PART 2
#define WHOLE(format) ((format) == F32 ? 3 : 2)
#define STORED_ROWS 1
#define LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h)
#else
#define VL 4
#define MR(format) 1
#define BLOCK_ROWS(format) 12
#define PART 8
#define WHOLE(format) 1
#define STORED_ROWS 1
#define LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h)
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));   /* VL numbers of 16 bits */
typedef int8_t vb2 __attribute__((vector_size(2 * VL)));    /* VL pairs of 8 bits */
typedef int16_t vs2 __attribute__((vector_size(4 * VL)));   /* VL pairs of 16 bits */

/* Any address, any type behind it. */
static ALWAYS_INLINE vf load(const void *p) { vf v; memcpy(&v, p, sizeof v); return v; }
static ALWAYS_INLINE void store(void *p, vf v) { memcpy(p, &v, sizeof v); }
static ALWAYS_INLINE vf splat(float x) { return x - (vf){0}; }
static ALWAYS_INLINE vi splat_bits(uint32_t x) { return (vi)((vu){0} + x); }
static ALWAYS_INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static ALWAYS_INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* a > b ? yes : no.  gcc makes several instructions of choose() and a comparison. */
static ALWAYS_INLINE vf where_above(vf a, vf b, vf yes, vf no)
{
#if defined(__AVX512F__)
    return (vf)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ), (__m512)no, (__m512)yes);
#elif defined(__AVX2__)
    return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
    return choose(a > b, yes, no);
#endif
}

/* b where one is NaN. */
static ALWAYS_INLINE vf max_of(vf a, vf b)
{
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

static ALWAYS_INLINE vi most_of(vi a, vi b)
{
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    vi mask = a > b;
    return (mask & a) | (~mask & b);
#endif
}

static ALWAYS_INLINE vi least_of(vi a, vi b) { return ~most_of(~a, ~b); }

/* v's lanes by operation, in halves: lane i with lane i + VL / 2, and so on; the result is in all of them. */
#define OTHER(lane, h) ((lane) ^ (h))
#define REDUCE(v, operation)                                                                  \
    do {                                                                                      \
        if (VL >= 16) v = operation(v, __builtin_shuffle(v, (vi){LANES(OTHER, 8 % VL)}));     \
        if (VL >= 8) v = operation(v, __builtin_shuffle(v, (vi){LANES(OTHER, 4 % VL)}));      \
        v = operation(v, __builtin_shuffle(v, (vi){LANES(OTHER, 2)}));                        \
        v = operation(v, __builtin_shuffle(v, (vi){LANES(OTHER, 1)}));                        \
    } while (0)
#define PLUS(a, b) ((a) + (b))

static ALWAYS_INLINE float sum_of(vf v) { REDUCE(v, PLUS); return v[0]; }
static ALWAYS_INLINE float greatest(vf v) { REDUCE(v, max_of); return v[0]; }

/* acc + a * b over pairs of bfloat16, first of the pair in the low half. */
static ALWAYS_INLINE vf dot_bf16(vf acc, vi a, vi b)
{
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & (int)0xffff0000) * (vf)(b & (int)0xffff0000);
#endif
}

/* acc + a * b over pairs of int16.  The same bits on every instruction set. */
static ALWAYS_INLINE vi dot_i16(vi acc, vi a, vi b)
{
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Rounded to the nearest, ties to even; NaN stays NaN. */
static ALWAYS_INLINE vh to_bf16(vf x)
{
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)((vi)(bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
#endif
}

/* float16, finite or not, as numbers. */
static ALWAYS_INLINE vf from_f16(const uint16_t *halves)
{
    vh v;
    memcpy(&v, halves, sizeof v);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps((__m128i)v);
#else
    vi bits = __builtin_convertvector(v, vi), magnitude = (bits & 0x7fff) << 13;
    vf number = (vf)magnitude * 0x1p112f; /* from an exponent's bias of 15 to 127, whether there is a leading one or not */
    number = choose(magnitude >= 0x7c00 << 13, (vf)(magnitude | 0x7f800000), number);
    return (vf)((vi)number | (bits & 0x8000) << 16);
#endif
}

static ALWAYS_INLINE vu widen(const void *halves)
{
    vh v;
    memcpy(&v, halves, sizeof v);
#if defined(__AVX512F__) /* which gcc 12 makes of two halves, here and below */
    return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, vu);
#endif
}

/* to: [2 * VL] pairs of the 2 * VL numbers of 16 bits each that are at low and high. */
static ALWAYS_INLINE void interleave(const void *low, const void *high, void *to)
{
#if defined(__AVX512BW__)
#define EVEN(lane, first) ((first) + (lane)) | ((first) + (lane) + 32) << 16
    const vi firsts = {LANES(EVEN, 0)}, seconds = {LANES(EVEN, 16)};
    __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
    store(to, (vf)_mm512_permutex2var_epi16(a, (__m512i)firsts, b));
    store((char *)to + 64, (vf)_mm512_permutex2var_epi16(a, (__m512i)seconds, b));
#else
    for (long at = 0; at < 4 * VL; at += 2 * VL)
        store((char *)to + 2 * at, (vf)(widen((const char *)low + at) | widen((const char *)high + at) << 16));
#endif
}

static ALWAYS_INLINE vi widen_pairs(const void *bytes)
{
    vb2 v;
    memcpy(&v, bytes, sizeof v);
#if defined(__AVX512BW__)
    return (vi)_mm512_cvtepi8_epi16((__m256i)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16((__m128i)v);
#else
    return (vi)__builtin_convertvector(v, vs2);
#endif
}

#define LEAST_SCALE 0x1p-64f /* of numbers that int16 stands for */
#define NO_NUMBER 0x7fff0000

/* A positive number times a power of two that is not below 1, of which power has the bits, less those of 1.  NaN where either
 * is, NO_NUMBER for a power.  A product would take a multiplier's time: the upper halves are added, as far as they go, which is
 * where NaN is. */
static ALWAYS_INLINE vf scaled_by(vf number, vi power)
{
#if defined(__AVX512BW__)
    return (vf)_mm512_adds_epi16((__m512i)number, (__m512i)power);
#elif defined(__AVX2__)
    return (vf)_mm256_adds_epi16((__m256i)number, (__m256i)power);
#else
    vi sum = (vi)((vu)number + (vu)power); /* less than 0 where it went too far */
    return (vf)(sum | (sum >> 31));
#endif
}

#define MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits */

/* Within 2 units in the last place; exp(0) is 1, and what is below -87 gives 0.  After Cephes. */
static ALWAYS_INLINE vf exp_of(vf x)
{
    vf in = x;
    x = where_above(x, splat(88.0f), splat(88.0f), x);
    vf shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf result = where_above(splat(-87.0f), in, splat(0), (vf)((vi)p + ((vi)shifted << 23)));
    return choose(in != in, in, result);
}

/* 2^x for what is not above 0, within 2 units in the last place; 2^0 is 1, what is below -126 gives 0, and NaN stays NaN.
 * After Cephes. */
static ALWAYS_INLINE vf exp2_of(vf x)
{
    vf in = max_of(splat(-126.0f), x), shifted = in + MAGIC, r = in - (shifted - MAGIC);
    vf p = splat(1.535336188319500e-4f);
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    vf power = (vf)(((vi)shifted << 23) + 0x3f800000);
    return where_above(splat(-126.0f), x, splat(0), p * power);
}

/* Exchanges rows and columns of VL x VL numbers, halving the distance: after the first round blocks of VL / 2 are in place. */
#define LOW(lane, h) ((lane) & (h) ? VL + (lane) - (h) : (lane))
#define HIGH(lane, h) ((lane) & (h) ? VL + (lane) : (lane) + (h))
#define TRANSPOSE_ROUND(h)                                              \
    UNROLL for (int i = 0; i < VL; i++)                                 \
        if (!(i & (h))) {                                               \
            vf a = rows[i], b = rows[i + (h)];                          \
            rows[i] = __builtin_shuffle(a, b, (vi){LANES(LOW, h)});     \
            rows[i + (h)] = __builtin_shuffle(a, b, (vi){LANES(HIGH, h)}); \
        }

static ALWAYS_INLINE void transpose(vf rows[VL])
{
#if VL >= 16
    TRANSPOSE_ROUND(8)
#endif
#if VL >= 8
    TRANSPOSE_ROUND(4)
#endif
    TRANSPOSE_ROUND(2)
    TRANSPOSE_ROUND(1)
}
