/* Products of a few rows with a matrix that was packed for it.
 *
 * A panel holds NR outputs, input by input: F32 as [inputs][NR]; BF16 and INT8 as [inputs / 2][NR][2], since processors
 * multiply pairs.  So a product reads a panel once from its beginning to its end, whatever the number of rows, and sums
 * nothing across lanes.  What is multiplied with it is stored row by row: F32 as numbers, BF16 as pairs, INT8 as pairs of
 * int16 with one scale to each GROUP inputs (16 bits, for they cost nothing in quality where 8 would).
 *
 * A weight of INT8 is scale * q + offset, one scale and one offset to GROUP inputs.  With x = x_scale * n, a group of inputs
 * adds scale * x_scale * sum(q * n) + offset * sum(x) to an output, and sum(x) is known from the row.
 *
 * A unit is 32 bits of a row: one input of F32, two of the others.  An output sums its units in one order, the same for any
 * number of rows: what a sequence gets does not depend on its company in a batch.
 */
#pragma once

#include "step.h"
#include "vector.h"

#define NR 32
#define NV (NR / VL)

typedef struct {
    const uint32_t *units;   /* [rows][stride] */
    const kvf_group *groups; /* INT8: [rows][group_stride] */
    long stride, group_stride, num_units;
} operand;

/* Where a tile's NR outputs per row go: stored, after the bias if there is one, or added to what is there. */
typedef struct {
    float *to; /* [rows][stride] */
    long stride;
    const float *bias; /* [NR] or NULL */
    int add;
} target;

/* The sums of rows rows and nv vectors of outputs, the panel and its scales pointing to the first of them.  Where these are
 * not all of the panel, the rest is asked for as well: it comes next, and memory gives whole stretches faster. */
static ALWAYS_INLINE void sum_floats(const int format, const int rows, const int nv, operand x, const char *panel,
                                     vf acc[][NV])
{
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
    for (long u = 0; u < x.num_units; u++, panel += 4 * NR) {
        vf weights[NV];
        if (nv < NV) __builtin_prefetch(panel + 16 * 4 * NR), __builtin_prefetch(panel + 16 * 4 * NR + 64);
        UNROLL for (int v = 0; v < nv; v++) weights[v] = load(panel + 4 * VL * v);
        UNROLL for (int r = 0; r < rows; r++) {
            uint32_t unit = x.units[r * x.stride + u];
            UNROLL for (int v = 0; v < nv; v++)
                acc[r][v] = format == F32 ? acc[r][v] + as_float(unit) * weights[v]
                                          : dot_bf16(acc[r][v], splat_bits(unit), (vi)weights[v]);
        }
    }
}

static ALWAYS_INLINE void sum_int8(const int rows, const int nv, operand x, const char *panel, const uint16_t *scales,
                                   vf acc[][NV])
{
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
    for (long group = 0; group < x.num_units / (GROUP / 2); group++, scales += 2 * NR) {
        vi sums[MR(INT8)][NV]; /* 32 * 128 * 32767 fits */
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < nv; v++) sums[r][v] = splat_bits(0);
        for (long u = group * (GROUP / 2); u < (group + 1) * (GROUP / 2); u++, panel += 2 * NR) {
            vi weights[NV];
            if (nv < NV) __builtin_prefetch(panel + 16 * 2 * NR);
            UNROLL for (int v = 0; v < nv; v++) weights[v] = widen_pairs(panel + 2 * VL * v);
            UNROLL for (int r = 0; r < rows; r++) {
                vi unit = splat_bits(x.units[r * x.stride + u]);
                UNROLL for (int v = 0; v < nv; v++) sums[r][v] = dot_i16(sums[r][v], unit, weights[v]);
            }
        }
        vf scale[NV], offset[NV];
        UNROLL for (int v = 0; v < nv; v++) scale[v] = from_f16(scales + VL * v), offset[v] = from_f16(scales + NR + VL * v);
        UNROLL for (int r = 0; r < rows; r++) {
            const kvf_group *common = x.groups + r * x.group_stride + group;
            UNROLL for (int v = 0; v < nv; v++) {
                vf both = (vf)((vi)scale[v] + splat_bits(common->scale_bits)); /* a product would take a multiplier's time */
                acc[r][v] += __builtin_convertvector(sums[r][v], vf) * both;
                acc[r][v] += offset[v] * common->sum;
            }
        }
    }
}

static ALWAYS_INLINE void multiply_tile(const int format, const int rows, operand x, const char *panel,
                                        const uint16_t *scales, target y)
{
    static const int vector_nbytes[] = {4 * VL, 4 * VL, 2 * VL}; /* of a unit of the panel */
    const int nv = rows <= WHOLE(format) ? NV : PART;
    vf acc[MR(format)][NV];
    for (int first = 0; first < NV; first += nv) {
        const char *part = panel + first * vector_nbytes[format];
        if (format == INT8)
            sum_int8(rows, nv, x, part, scales + first * VL, acc);
        else
            sum_floats(format, rows, nv, x, part, acc);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < nv; v++) {
                float *to = y.to + r * y.stride + VL * (first + v);
                vf sum = acc[r][v];
                if (y.bias) sum += load(y.bias + VL * (first + v));
                if (y.add) sum += load(to);
                store(to, sum);
            }
    }
}

#define ROWS(n)                                                                                              \
    case n:                                                                                                  \
        if (n <= MR(format)) multiply_tile(format, n <= MR(format) ? n : MR(format), x, panel, scales, y);   \
        break;

/* What is multiplied next and asked for meanwhile: memory is far away, and the first tile would wait for every line. */
typedef struct {
    const char *at;
    long nbytes; /* 0: nothing */
} upcoming;

/* Asks for the first of so many parts. */
static ALWAYS_INLINE void fetch_part(upcoming *next, long parts)
{
    long nbytes = next->nbytes / parts;
    for (long i = 0; i < nbytes; i += 64) __builtin_prefetch(next->at + i, 0, 2);
    next->at += nbytes;
    next->nbytes -= nbytes;
}

/* rows rows with one panel.  Tiles are of nearly equal height: 13 rows are 7 and 6, not 12 and 1. */
static ALWAYS_INLINE void multiply_rows(const int format, long rows, operand x, const char *panel,
                                        const uint16_t *scales, target y, upcoming next)
{
    for (long num_tiles = (rows + MR(format) - 1) / MR(format); num_tiles; num_tiles--) {
        long height = (rows + num_tiles - 1) / num_tiles;
        fetch_part(&next, num_tiles);
        switch (height) {
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
        }
        rows -= height;
        x.units += height * x.stride;
        x.groups += format == INT8 ? height * x.group_stride : 0;
        y.to += height * y.stride;
    }
}

static void multiply_f32(long rows, operand x, const char *panel, target y, upcoming next)
{
    multiply_rows(F32, rows, x, panel, NULL, y, next);
}

static void multiply_bf16(long rows, operand x, const char *panel, target y, upcoming next)
{
    multiply_rows(BF16, rows, x, panel, NULL, y, next);
}

static void multiply_int8(long rows, operand x, const char *panel, const uint16_t *scales, target y, upcoming next)
{
    multiply_rows(INT8, rows, x, panel, scales, y, next);
}

static int unit_inputs(int format) { return format == F32 ? 1 : 2; }

/* The panel that begins with output 32 * number, and its scales. */
static const char *panel_of(int format, const kvf_matrix *matrix, long number, const uint16_t **scales)
{
    static const int nbytes[] = {4, 2, 1};
    *scales = format == INT8 ? matrix->scales + number * (matrix->num_columns / GROUP) * 2 * NR : NULL;
    return (const char *)matrix->values + number * NR * matrix->num_columns * nbytes[format];
}

/* What to ask for while so many rows are multiplied with panel number number: the one behind it.  Few rows are done with a
 * panel before another would arrive. */
static upcoming next_panel(int format, long rows, const kvf_matrix *matrix, long number)
{
    static const int nbytes[] = {4, 2, 1};
    const uint16_t *scales;
    if (rows <= MR(format) || number + 1 >= matrix->num_rows / NR) return (upcoming){NULL, 0};
    return (upcoming){panel_of(format, matrix, number + 1, &scales), NR * matrix->num_columns * nbytes[format]};
}

/* Within kvf_work: every thread takes part.  bias is [outputs, padded] or NULL.
 *
 * Where there are rows enough for each thread, they are cut into blocks, as many to each: a thread multiplies the rows that
 * it has prepared, and prepares those that it has multiplied, which are in its own cache (see kvf_claim).  Fewer are one
 * block, or as many as they fill, whose panels are shared out. */
static void multiply(kvf_pool *pool, int format, long rows, operand x, const kvf_matrix *matrix, target y)
{
    const long most_rows = 12 * MR(format), threads = kvf_pool_size(pool), own = rows / threads >= 4 * MR(format) ? threads : 1;
    const long num_blocks = own * ((rows + own * most_rows - 1) / (own * most_rows)), num_panels = matrix->num_rows / NR;
    const long num_shares = num_panels * num_blocks;
    for (long share, end; (share = kvf_claim(pool, num_shares, &end)) < num_shares;)
        for (; share < end; share++) {
            long number = share % num_panels, block = share / num_panels;
            long begin = rows * block / num_blocks, count = rows * (block + 1) / num_blocks - begin;
            const uint16_t *scales;
            const char *panel = panel_of(format, matrix, number, &scales);
            operand part = x;
            part.units += begin * x.stride;
            part.groups += format == INT8 ? begin * x.group_stride : 0;
            target to = {y.to + begin * y.stride + number * NR, y.stride, y.bias ? y.bias + number * NR : NULL, y.add};
            upcoming next = next_panel(format, count, matrix, number);
            if (format == F32) multiply_f32(count, part, panel, to, next);
            if (format == BF16) multiply_bf16(count, part, panel, to, next);
            if (format == INT8) multiply_int8(count, part, panel, scales, to, next);
        }
}
