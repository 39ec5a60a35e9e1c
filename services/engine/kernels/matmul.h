/* Products of a few rows with a matrix that was packed for it.
 *
 * A panel holds NR outputs, input by input: F32 as [inputs][NR]; BF16 and INT8 as [inputs / 2][NR][2], since processors
 * multiply pairs; INT4 as [inputs / 8][NR][2] of 16 bits, in which four inputs of a pair's side lie, the first one lowest.
 * So a product reads a panel once from its beginning to its end, whatever the number of rows, and sums nothing across
 * lanes.  What is multiplied with it is stored row by row: F32 as numbers, BF16 as pairs, INT8 and INT4 as pairs of int16
 * with one scale to each GROUP inputs (16 bits, for they cost nothing in quality where 8 would).
 *
 * A weight of INT8 or INT4 is scale / parts * (parts * q + base): one scale and one base to GROUP inputs, parts 8 or 128.
 * What is in brackets has 12 bits, and takes the place of a weight in the products: the sum of GROUP of them just fits.
 * Where more than a few rows are multiplied with a panel, they are made of it once, in memory of the thread's own; for fewer,
 * for each tile, in registers.
 *
 * A unit is 32 bits of a row: one input of F32, two of the others.  An output sums its units in one order, the same for any
 * number of rows: what a sequence gets does not depend on its company in a batch.
 */
#pragma once

#include "step.h"
#include "vector.h"

#define NR 32
#define MOST_ROWS 12 /* of a tile; arrays of as many, for one whose size is not constant stays in memory */
#define NV (NR / VL)

typedef struct {
    const uint32_t *units; /* [rows][stride] */
    const int32_t *groups; /* INT8, INT4: [rows][group_stride], see pack_group */
    long stride, group_stride, num_units;
} operand;

/* Where a tile's NR outputs per row go: stored, after the bias if there is one, or added to what is there. */
typedef struct {
    float *to; /* [rows][stride] */
    long stride;
    const float *bias; /* [NR] or NULL */
    int add;
} target;

/* What a processor asks for by itself ends where a page does, and between two pages it would wait. */
#define AHEAD 8192
static ALWAYS_INLINE void fetch_ahead(const char *panel, long nbytes, long distance)
{
    UNROLL for (long i = 0; i < nbytes; i += 64) __builtin_prefetch(panel + distance + i);
}

/* The sums of rows rows and nv vectors of outputs, the panel and its scales pointing to the first of them.  Where these are
 * not all of the panel, the rest is asked for as well: it comes next, and memory gives whole stretches faster. */
static ALWAYS_INLINE void sum_floats(const int format, const int rows, const int nv, operand x, const char *panel,
                                     long ahead, vf acc[][NV])
{
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
    for (long u = 0; u < x.num_units; u++, panel += 4 * NR) {
        vf weights[NV];
        fetch_ahead(panel, 4 * NR, ahead);
        UNROLL for (int v = 0; v < nv; v++) weights[v] = load(panel + 4 * VL * v);
        UNROLL for (int r = 0; r < rows; r++) {
            uint32_t unit = x.units[r * x.stride + u];
            UNROLL for (int v = 0; v < nv; v++)
                acc[r][v] = format == F32 ? acc[r][v] + as_float(unit) * weights[v]
                                          : dot_bf16(acc[r][v], splat_bits(unit), (vi)weights[v]);
        }
    }
}

#define WIDE 4 /* a format: what is made of INT8 and INT4, pairs of int16 as [inputs / 2][NR][2] */
#define FEW_ROWS(format) (BLOCK_ROWS(format) / 6) /* for more it is made in memory, once */
#define AT_ONCE 4 /* units: as many INT4 has in 32 bits */

/* The parts of a step, in which bases of INT8 and INT4 count, are 2 to the power of so many. */
static ALWAYS_INLINE int parts_bits(int format) { return format == INT4 ? 7 : 3; }

/* Bytes of a unit of a panel, all NR outputs. */
static ALWAYS_INLINE long unit_nbytes(int format) { return format == INT8 ? 2 * NR : format == INT4 ? NR : 4 * NR; }

/* The bases of VL outputs, each as a pair. */
static ALWAYS_INLINE vi bases(const uint16_t *from)
{
    vu base = widen(from);
    return (vi)(base | base << 16);
}

/* Vector v of unit k, below AT_ONCE, of those at a panel of INT8 or INT4: pairs of what is stored, from bit number bit on. */
static ALWAYS_INLINE vi stored(const int format, const char *panel, int k, int v, int bit)
{
    if (format == INT8) return (vi)((vs2)widen_pairs(panel + 2 * NR * k + 2 * VL * v) << bit);
    vu four = (vu)load(panel + 4 * VL * v);
    return (vi)((4 * k < bit ? four << (bit - 4 * k) : four >> (4 * k - bit)) & 0x000f000f << bit);
}

/* The same of any format of integers: pairs of weights. */
static ALWAYS_INLINE vi weight(const int format, const char *panel, int k, int v, vi base)
{
    if (format == WIDE) return (vi)load(panel + 4 * NR * k + 4 * VL * v);
    return (vi)((vs2)stored(format, panel, k, v, parts_bits(format)) + (vs2)base);
}

/* Of few rows of INT8 and INT4 a group's sum is that of what is stored, and the base's share is added to it: that spares an
 * addition for each product, and costs a multiplication for each group and row.  What INT4 stores is left at the bits where it
 * lies, as far as the sums fit, which are of so many kinds: that spares the shifts. */
#define KINDS(format) ((format) == INT4 ? 3 : 1)

/* unit_scale: of an input that is 1 and a weight that is one part of a step, as far as neither row nor group say. */
static ALWAYS_INLINE void sum_ints(const int format, const int rows, const int nv, operand x, const char *panel,
                                   const uint16_t *scales, float unit_scale, long ahead, vf acc[][NV])
{
    const int as_stored = format != WIDE && rows <= STORED_ROWS, kinds = as_stored ? KINDS(format) : 1;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) acc[r][v] = splat(0);
    for (long group = 0; group < x.num_units / (GROUP / 2); group++, scales += 2 * NR) {
        if (format != WIDE) fetch_ahead((const char *)scales, 4 * NR, ahead / 4);
        vi sums[3][MOST_ROWS][NV]; /* 32 * 2048 * 32767 fits, and 16 * 15 * 256 * 32767 */
        vi base[NV];
        UNROLL for (int v = 0; v < nv; v++) base[v] = format == WIDE ? splat_bits(0) : bases(scales + NR + VL * v);
        UNROLL for (int kind = 0; kind < kinds; kind++)
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < nv; v++) sums[kind][r][v] = splat_bits(0);
        for (long u = group * (GROUP / 2); u < (group + 1) * (GROUP / 2); u += AT_ONCE) {
            if (format != WIDE) fetch_ahead(panel, AT_ONCE * unit_nbytes(format), ahead);
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                const int kind = k < kinds ? k : kinds - 1;
                vi weights[NV];
                UNROLL for (int v = 0; v < nv; v++)
                    weights[v] = as_stored ? stored(format, panel, k, v, 4 * kind) : weight(format, panel, k, v, base[v]);
                UNROLL for (int r = 0; r < rows; r++) {
                    vi unit = splat_bits(x.units[r * x.stride + u + k]);
                    UNROLL for (int v = 0; v < nv; v++) sums[kind][r][v] = dot_i16(sums[kind][r][v], unit, weights[v]);
                }
            }
            panel += AT_ONCE * unit_nbytes(format);
        }
        vf scale[NV];
        UNROLL for (int v = 0; v < nv; v++) scale[v] = from_f16(scales + VL * v) * unit_scale;
        UNROLL for (int r = 0; r < rows; r++) {
            const int32_t *of_row = x.groups + r * x.group_stride + 2 * group;
            UNROLL for (int v = 0; v < nv; v++) {
                vi sum = sums[0][r][v];
                UNROLL for (int kind = 1; kind < kinds; kind++) sum += sums[kind][r][v] >> 4 * kind;
                if (as_stored) sum = (sum << parts_bits(format)) + (base[v] >> 16) * of_row[1];
                acc[r][v] += __builtin_convertvector(sum, vf) * scaled_by(scale[v], splat_bits(of_row[0]));
            }
        }
    }
}

/* Makes WIDE of a panel of INT8 or INT4. */
static ALWAYS_INLINE void widen_panel(const int format, long num_units, const char *panel, const uint16_t *scales, char *to)
{
    for (long u = 0; u < num_units; u += GROUP / 2, scales += 2 * NR) {
        vi base[NV];
        UNROLL for (int v = 0; v < NV; v++) base[v] = bases(scales + NR + VL * v);
        for (int four = 0; four < GROUP / 2 / AT_ONCE; four++) {
            UNROLL for (int k = 0; k < AT_ONCE; k++)
                UNROLL for (int v = 0; v < NV; v++)
                    store(to + 4 * NR * k + 4 * VL * v, (vf)weight(format, panel, k, v, base[v]));
            panel += AT_ONCE * unit_nbytes(format);
            to += AT_ONCE * 4 * NR;
        }
    }
}

static ALWAYS_INLINE void multiply_tile(const int format, const int rows, operand x, const char *panel,
                                        const uint16_t *scales, float unit_scale, target y, long ahead)
{
    const int nv = rows <= WHOLE(format) ? NV : PART;
    vf acc[MOST_ROWS][NV];
    for (int first = 0; first < NV; first += nv) {
        const char *part = panel + first * (format == INT8 ? 2 * VL : 4 * VL);
        if (format == F32 || format == BF16)
            sum_floats(format, rows, nv, x, part, ahead, acc);
        else
            sum_ints(format, rows, nv, x, part, scales + first * VL, unit_scale, ahead, acc);
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
        if (n <= MR(format)) multiply_tile(format, n <= MR(format) ? n : MR(format), x, panel, scales, unit_scale, y, \
                                        ahead);                                                              \
        break;

/* rows rows with one panel, and while INT8 and INT4 are multiplied as WIDE the next num_next bytes are asked for, in as many
 * parts as there are tiles.  Tiles are of nearly equal height: 13 rows are 7 and 6, not 12 and 1. */
static ALWAYS_INLINE void multiply_rows(const int format, long rows, operand x, const char *panel,
                                        const uint16_t *scales, float unit_scale, target y, long ahead, const char *next,
                                        long num_next)
{
    for (long num_tiles = (rows + MR(format) - 1) / MR(format); num_tiles; num_tiles--) {
        long height = (rows + num_tiles - 1) / num_tiles, part = num_next / num_tiles;
        for (long i = 0; i < part; i += 64) __builtin_prefetch(next + i, 0, 2);
        next += part;
        num_next -= part;
        switch (height) {
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
        }
        rows -= height;
        x.units += height * x.stride;
        x.groups += height * x.group_stride;
        y.to += height * y.stride;
    }
}

/* Functions of their own, for the sake of their registers. */
#define FORMAT_ROWS(name, format)                                                                             \
    static __attribute__((noinline)) void name(long rows, operand x, const char *panel, const uint16_t *scales, \
                                               float unit_scale, target y, long ahead)                        \
    {                                                                                                         \
        multiply_rows(format, rows, x, panel, scales, unit_scale, y, ahead, NULL, 0);                         \
    }
FORMAT_ROWS(multiply_f32, F32)
FORMAT_ROWS(multiply_bf16, BF16)
FORMAT_ROWS(multiply_int8, INT8)
FORMAT_ROWS(multiply_int4, INT4)

static __attribute__((noinline)) void multiply_wide(long rows, operand x, const char *panel, const uint16_t *scales,
                                                    float unit_scale, target y, const char *next, long num_next)
{
    multiply_rows(WIDE, rows, x, panel, scales, unit_scale, y, 0, next, num_next);
}

/* ahead: how far, in bytes, to ask for what is behind; 0 for a panel that is not in memory alone.  room: for the panel as WIDE. */
static void multiply_panel(int format, long rows, operand x, const char *panel, const uint16_t *scales, target y, long ahead,
                           char *room)
{
    const float unit_scale = LEAST_SCALE / (1 << parts_bits(format));
    const long nbytes = x.num_units * unit_nbytes(format);
    if (format == F32) multiply_f32(rows, x, panel, NULL, 0, y, ahead);
    if (format == BF16) multiply_bf16(rows, x, panel, NULL, 0, y, ahead);
    if (format == F32 || format == BF16) return;
    if (rows > FEW_ROWS(format)) {
        if (format == INT8) widen_panel(INT8, x.num_units, panel, scales, room);
        if (format == INT4) widen_panel(INT4, x.num_units, panel, scales, room);
        multiply_wide(rows, x, room, scales, unit_scale, y, panel + nbytes, nbytes);
    } else if (format == INT8) {
        multiply_int8(rows, x, panel, scales, unit_scale, y, ahead);
    } else {
        multiply_int4(rows, x, panel, scales, unit_scale, y, ahead);
    }
}

static int unit_inputs(int format) { return format == F32 ? 1 : 2; }

/* The panel that begins with output 32 * number, and its scales. */
static const char *panel_of(const kvf_matrix *matrix, long number, const uint16_t **scales)
{
    const int format = (int)matrix->format;
    *scales = matrix->scales ? matrix->scales + number * (matrix->num_columns / GROUP) * 2 * NR : NULL;
    return (const char *)matrix->values + number * (matrix->num_columns / unit_inputs(format)) * unit_nbytes(format);
}

/* Within kvf_work: every thread takes part, each with room of its own, see multiply_panel.  bias is [outputs, padded] or
 * NULL.
 *
 * Where there are rows enough for each thread, they are cut into blocks, as many to each: a thread multiplies the rows that
 * it has prepared, and prepares those that it has multiplied, which are in its own cache (see kvf_claim).  Fewer are one
 * block, or as many as they fill, whose panels are shared out. */
static void multiply(kvf_pool *pool, char *room, long rows, operand x, const kvf_matrix *matrix, target y)
{
    const int format = (int)matrix->format;
    const long threads = kvf_pool_size(pool), own = rows / threads >= BLOCK_ROWS(format) / 3 ? threads : 1;
    const long at_most = own * BLOCK_ROWS(format), num_blocks = own * ((rows + at_most - 1) / at_most);
    const long num_panels = matrix->num_rows / NR, num_shares = num_panels * num_blocks;
    for (long share, end; (share = kvf_claim(pool, num_shares, &end)) < num_shares;)
        for (; share < end; share++) {
            long number = share % num_panels, block = share / num_panels;
            long begin = rows * block / num_blocks, count = rows * (block + 1) / num_blocks - begin;
            const uint16_t *scales;
            const char *panel = panel_of(matrix, number, &scales);
            operand part = x;
            part.units += begin * x.stride;
            part.groups += begin * x.group_stride;
            target to = {y.to + begin * y.stride + number * NR, y.stride, y.bias ? y.bias + number * NR : NULL, y.add};
            multiply_panel(format, count, part, panel, scales, to, AHEAD, room);
        }
}
