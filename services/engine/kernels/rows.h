/* What is done to one row, a token's vector, between the products. */
#pragma once

#include "matmul.h"

#include <math.h>

static long padded(long n, long to) { return (n + to - 1) / to * to; }

/* to = x / rms(x) * weight, over n numbers; what is behind them in to is left. */
static void normalize(const float *x, const float *weight, float eps, long n, float *to)
{
    vf squares = splat(0);
    long i = 0;
    for (; i + VL <= n; i += VL) squares += load(x + i) * load(x + i);
    float sum = sum_of(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / n + eps);
    for (i = 0; i < n; i++) to[i] = weight[i] * (x[i] * scale);
}

/* gate * sigmoid(gate) * up; whole vectors, so all three have room behind n numbers. */
static void activate(const float *gate, const float *up, long n, float *to)
{
    for (long i = 0; i < n; i += VL) {
        vf g = load(gate + i);
        store(to + i, g / (1.0f + exp_of(-g)) * load(up + i));
    }
}

/* Pairs of bfloat16 from n numbers, a multiple of 16. */
static void pack_bf16(const float *x, long n, void *to)
{
    for (long i = 0; i < n; i += VL) {
        vh halves = to_bf16(load(x + i));
        memcpy((uint16_t *)to + i, &halves, sizeof halves);
    }
}

/* The bits of the least power of two that is not below x, from LEAST_SCALE to 2^96: so times a float16 it is an ordinary
 * number. */
static ALWAYS_INLINE vi power_of_two(vf x)
{
    vi bits = ((vi)x + 0x7fffff) & 0x7f800000;
    return least_of(most_of(bits, (vi)splat(LEAST_SCALE)), (vi)splat(0x1p96f));
}

/* Pairs of int16 from GROUP numbers.  group: their scale, a power of two, as how much more its bits are than LEAST_SCALE's,
 * or NO_NUMBER where one is not finite or not below 2^111; then their sum.  All lanes say the same: nothing goes by way of the
 * scalar side, which is slow. */
static void pack_group(const float *x, int16_t *to, int32_t *group)
{
    vi top = splat_bits(0);
    for (long i = 0; i < GROUP; i += VL) top = most_of((vi)load(x + i) & 0x7fffffff, top); /* bits have floats' order */
    REDUCE(top, most_of);
    vi scale = power_of_two((vf)top * (1 / 32767.0f));
    vf inverse = (vf)(0x7f000000 - scale); /* of a power of two */
    vi sum = splat_bits(0);
    for (long i = 0; i < GROUP; i += VL) {
        vi number = (vi)(load(x + i) * inverse + MAGIC);
        vh low = __builtin_convertvector((vu)number, vh);
        memcpy(to + i, &low, sizeof low);
        sum += number - (vi)splat(MAGIC);
    }
    REDUCE(sum, PLUS);
    group[0] = ((vi)where_above(splat(0x1p111f), (vf)top, (vf)(scale - (vi)splat(LEAST_SCALE)), (vf)splat_bits(NO_NUMBER)))[0];
    group[1] = sum[0];
}

/* Row number row of an operand for products with a matrix of num_columns: x has n numbers, and zeros up to num_columns
 * are put behind them, for which it must have room. */
static void prepare(int format, float *x, long n, long num_columns, const operand *inputs, long row)
{
    memset(x + n, 0, (num_columns - n) * 4);
    uint32_t *units = (uint32_t *)inputs->units + row * inputs->stride;
    if (format == F32) memcpy(units, x, num_columns * 4);
    if (format == BF16) pack_bf16(x, num_columns, units);
    if (format == INT8)
        for (long group = 0; group < num_columns / GROUP; group++)
            pack_group(x + group * GROUP, (int16_t *)units + group * GROUP,
                       (int32_t *)inputs->groups + row * inputs->group_stride + 2 * group);
}

/* A row of a packed matrix as numbers: a token's embedding. */
static void unpack_row(const kvf_matrix *matrix, long row, long n, float *to)
{
    const uint16_t *scales;
    const char *panel = panel_of(matrix, row / NR, &scales);
    const int format = (int)matrix->format;
    const long lane = row % NR, vector = lane / VL * VL;
    const int parts = 1 << parts_bits(format);
    float scale = 0;
    int base = 0;
    for (long i = 0; i < n; i++) {
        long pair = i / 2 * 2 * NR + lane * 2 + i % 2, four = i / 8 * 2 * NR + lane * 2 + i % 2;
        if (scales && i % GROUP == 0) {
            const uint16_t *group = scales + i / GROUP * 2 * NR;
            scale = from_f16(group + vector)[lane % VL] / parts;
            base = (int16_t)group[NR + lane];
        }
        if (format == F32) to[i] = ((const float *)panel)[i * NR + lane];
        if (format == BF16) to[i] = as_float((uint32_t)((const uint16_t *)panel)[pair] << 16);
        if (format == INT8) to[i] = (parts * ((const int8_t *)panel)[pair] + base) * scale;
        if (format == INT4) to[i] = (parts * (((const uint16_t *)panel)[four] >> i / 2 % 4 * 4 & 15) + base) * scale;
    }
}

/* turns: [2, half], from the position; angles in float32, as the models were trained. */
static void turn(const float *frequencies, long half, int64_t position, float *turns)
{
    for (long i = 0; i < half; i++) {
        float angle = (float)position * frequencies[i];
        turns[i] = cosf(angle);
        turns[half + i] = sinf(angle);
    }
}

/* Rotates a head in place: its i-th number and that of its other half are a pair. */
static void rotate(float *head, const float *turns, long half)
{
    for (long i = 0; i < half; i += VL) { /* half is a multiple of 16 */
        vf first = load(head + i), second = load(head + half + i), cos = load(turns + i), sin = load(turns + half + i);
        store(head + i, first * cos - second * sin);
        store(head + half + i, second * cos + first * sin);
    }
}
