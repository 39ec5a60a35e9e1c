/* Attention over paged KV, without gathering contexts and without repeating keys for the heads that share them.
 *
 * A tile is up to QUERIES queries of one sequence that share a KV head: the heads of one new token, or of a few.  Its
 * context is taken in chunks of CHUNK tokens, of positions that are multiples of it.  Within a chunk the keys are packed
 * into panels, 32 tokens each, and the values likewise, so that both products are those of matmul.h.  Each chunk gives a
 * partial result (https://arxiv.org/abs/2205.14135), and partial results are merged in the order of chunks, by whoever:
 * the outcome does not depend on how the work was shared, or on what shared the tile.
 */
#pragma once

#include "rows.h"

#define MAX_HEAD_DIM 256

/* What is claimed of a layer's attention: the context, or a part of it, of a tile, for some KV heads (all heads of a token
 * lie together). */
typedef struct {
    long slot, first_head, end_head;
} attention_share;

/* What one thread works in, share after share. */
typedef struct {
    const kvf_step *step;
    const kvf_tile *tile;
    const char *layer; /* the arena's first block, at this layer */
    long block_nbytes, token_nbytes, value_offset;
    long head, head_offset; /* the KV head in hand, and how far its numbers are into a token's */
    /* Where the keys of a chunk's tokens are, all heads; values are value_offset further. */
    const char **tokens, **coming, *room[2][CHUNK];
    /* Of the chunk that comes next: whose it is, how many rows (a token's keys, or its values) it has, how many of them have
     * been asked for and how many should have been by now, and how many more in one unit of time: see ask(). */
    attention_share coming_share;
    long num_coming, num_asked;
    float num_due, pace;
    uint32_t queries[QUERIES * MAX_HEAD_DIM];
    uint32_t panel[NR * MAX_HEAD_DIM]; /* keys of 32 tokens */
    float scores[QUERIES * CHUNK];
    uint32_t weights[QUERIES * CHUNK];
    uint32_t values[CHUNK * MAX_HEAD_DIM];
    float results[QUERIES * (MAX_HEAD_DIM + PARTIAL_HEAD)];
} attending;

/* How long parts of an attention take, by and large: memory is asked for what comes next in even steps. */
#define PACKED_BLOCK 3.0f  /* VL x VL of keys */
#define PACKED_VALUES 1.0f /* of VALUES_A_TIME tokens */
#define VALUES_A_TIME 8
#define WEIGHED 3.0f      /* one query's scores */
#define VALUES_ADDED 6.0f /* NR dimensions, all queries */

static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }

static float *partial_of(const kvf_step *step, const kvf_tile *tile, long slot, long head, long query)
{
    const kvf_model *model = step->model;
    long number = ((slot - tile->slot) * model->num_kv_heads + head) * tile->count + query;
    return step->partials + (tile->first_partial + number) * (model->head_dim + PARTIAL_HEAD);
}

/* from joins to: both are partial results, from of later tokens. */
static void merge(float *to, const float *from, long head_dim)
{
    float top = to[0] > from[0] ? to[0] : from[0];
    vf old = exp2_of(splat(to[0] - top)), new = exp2_of(splat(from[0] - top));
    to[0] = top;
    to[1] = to[1] * old[0] + from[1] * new[0];
    for (long i = PARTIAL_HEAD; i < PARTIAL_HEAD + head_dim; i += VL)
        store(to + i, load(to + i) * old + load(from + i) * new);
}

static long position_of(const kvf_step *step, const kvf_tile *tile, long query)
{
    const kvf_batch *batch = step->batch;
    long sharing = step->model->num_heads / step->model->num_kv_heads;
    return batch->positions[batch->qo_indptr[tile->sequence]] + (tile->first + query) / sharing;
}

/* Where a tile's query sees from. */
static long sees_from(const kvf_step *step, const kvf_tile *tile, long query)
{
    long window = step->model->window;
    return window ? most(0, position_of(step, tile, query) + 1 - window) : 0;
}

/* Chunk's tokens: begin..end of the context, whole panels from a multiple of NR on, so that a token has the same place in
 * all sums whoever looks at it. */
static long chunk_begin(const kvf_step *step, const kvf_tile *tile, long chunk)
{
    return most(chunk * CHUNK, sees_from(step, tile, 0) / NR * NR);
}

static long chunk_end(const kvf_step *step, const kvf_tile *tile, long chunk)
{
    return least((chunk + 1) * CHUNK, position_of(step, tile, tile->count - 1) + 1);
}

static void take_queries(attending *a)
{
    const kvf_model *model = a->step->model;
    long dim = model->head_dim, sharing = model->num_heads / model->num_kv_heads, half = a->step->batch->kv_half;
    long stride = padded((model->num_heads + 2 * model->num_kv_heads) * dim, NR);
    long first_row = a->step->batch->qo_indptr[a->tile->sequence];
    for (long i = 0; i < a->tile->count; i++) {
        long row = first_row + (a->tile->first + i) / sharing, head = a->head * sharing + (a->tile->first + i) % sharing;
        const float *query = a->step->wide + row * stride + head * dim;
        if (half)
            pack_bf16(query, dim, a->queries + i * dim / 2);
        else
            memcpy(a->queries + i * dim, query, dim * 4);
    }
}

/* Finds the tokens of the chunk that comes next, in a share that may be another than the one in hand. */
static void locate(attending *a, attention_share share, long chunk)
{
    const kvf_step *step = a->step;
    const kvf_batch *batch = step->batch;
    const kvf_tile *tile = &step->tiles[step->slot_tile[share.slot]];
    const int32_t *blocks = batch->kv_indices + batch->kv_indptr[tile->sequence];
    long begin = chunk_begin(step, tile, chunk), end = chunk_end(step, tile, chunk);
    for (long i = 0; i < end - begin; i++) {
        long block = (begin + i) / batch->block_size, offset = (begin + i) % batch->block_size;
        a->coming[i] = a->layer + blocks[block] * a->block_nbytes + offset * a->token_nbytes;
    }
    a->coming_share = share;
    a->num_coming = 2 * (end - begin);
    a->num_asked = 0;
    a->num_due = 0;
}

/* Asks memory for what should be on its way after some more units of time.  Blocks lie anywhere, which defeats the
 * processor's own foresight.  In even steps, because what is asked for keeps busy what the chunk in hand is read through:
 * asked for in a few bursts, KV of 2048 tokens took half as long again.  Inlined: gcc takes a function that only asks for one
 * that does nothing. */
static ALWAYS_INLINE void ask(attending *a, float units)
{
    long head_nbytes = a->step->model->head_dim * (a->step->batch->kv_half ? 2 : 4);
    a->num_due += units * a->pace;
    for (long end = least(a->num_due, a->num_coming); a->num_asked < end; a->num_asked++) {
        const char *row = a->coming[a->num_asked / 2] + a->num_asked % 2 * a->value_offset;
        for (long at = a->coming_share.first_head * head_nbytes; at < a->coming_share.end_head * head_nbytes; at += 64)
            __builtin_prefetch(row + at, 0, 3);
    }
}

/* So that all of what comes next has been asked for when the chunk in hand, of count tokens, is done for num_heads heads. */
static void set_pace(attending *a, long count, long num_heads)
{
    long dim = a->step->model->head_dim, num_units = dim >> a->step->batch->kv_half;
    float units = PACKED_BLOCK * (count / VL) * ((num_units + VL - 1) / VL) + WEIGHED * a->tile->count +
                  PACKED_VALUES * (count / VALUES_A_TIME) + VALUES_ADDED * (dim / NR);
    a->pace = (a->num_coming + 1) / (units * num_heads);
}

/* Keys of NR tokens, of which the first is tokens[at] and those from count on do not matter. */
static void pack_keys(attending *a, long at, long count, long num_units)
{
    for (long lanes = 0; lanes < NR; lanes += VL)
        for (long unit = 0; unit < num_units; unit += VL) {
            vf rows[VL];
            ask(a, PACKED_BLOCK);
            UNROLL for (int i = 0; i < VL; i++)
                rows[i] = load(a->tokens[least(at + lanes + i, count - 1)] + a->head_offset + unit * 4);
            transpose(rows);
            UNROLL for (int i = 0; i < VL; i++) store(a->panel + (unit + i) * NR + lanes, rows[i]);
        }
}

/* Values of tokens skip..end as [panel of 32 dimensions][count tokens, in pairs where they are bfloat16].  Others are zero:
 * their slots hold anything, and a weight of zero would not undo a NaN. */
static void pack_values(attending *a, long skip, long end, long count)
{
    static const char zeros[4 * MAX_HEAD_DIM];
    long dim = a->step->model->head_dim, half = a->step->batch->kv_half, offset = a->value_offset + a->head_offset;
    for (long at = 0; at < count; at += 1 + half) {
        if (at % VALUES_A_TIME == 0) ask(a, PACKED_VALUES);
        const char *token = at < skip || at >= end ? zeros : a->tokens[at] + offset;
        const char *next = at + 1 < skip || at + 1 >= end ? zeros : a->tokens[at + 1] + offset;
        for (long d = 0; d < dim; d += NR) {
            uint32_t *to = a->values + d * (count >> half) + (at >> half) * NR;
            if (!half) {
                memcpy(to, token + d * 4, NR * 4);
                continue;
            }
            for (long v = 0; v < NR; v += 2 * VL) interleave(token + (d + v) * 2, next + (d + v) * 2, to + v);
        }
    }
}

/* Scores of a query, those outside from..to void, become weights: 2^(scale * (score - the greatest)).  count is a multiple of
 * NR.  Returns the weights' sum. */
static float weigh(float *scores, long from, long to, long count, float scale, float *top)
{
    for (long i = 0; i < from; i++) scores[i] = -INFINITY;
    for (long i = to; i < count; i++) scores[i] = -INFINITY;
    vf tops = load(scores), sums = splat(0);
    for (long i = VL; i < count; i += VL) tops = max_of(load(scores + i), tops);
    float greatest_score = greatest(tops);
    for (long i = 0; i < count; i += VL) {
        vf weights = exp2_of((load(scores + i) - greatest_score) * scale);
        store(scores + i, weights);
        sums += weights;
    }
    *top = greatest_score * scale;
    return sum_of(sums);
}

/* Tokens begin..end of the context and one KV head. */
static void attend_head(attending *a, long begin, long end, long slot)
{
    const kvf_step *step = a->step;
    long dim = step->model->head_dim, half = step->batch->kv_half, num_queries = a->tile->count;
    long count = padded(end - begin, NR), skip = most(0, sees_from(step, a->tile, 0) - begin);
    take_queries(a);
    operand queries = {a->queries, NULL, dim >> half, 0, dim >> half};
    for (long at = 0; at < count; at += NR) {
        pack_keys(a, at, end - begin, dim >> half);
        target scores = {a->scores + at, CHUNK, NULL, 0};
        multiply_panel(half ? BF16 : F32, num_queries, queries, (char *)a->panel, NULL, scores, 0, NULL);
    }
    float scale = 1.44269504f / sqrtf((float)dim); /* of log2(e) */
    long stride = dim + PARTIAL_HEAD;
    for (long i = 0; i < num_queries; i++) {
        float *result = a->results + i * stride, *scores = a->scores + i * CHUNK;
        long from = most(sees_from(step, a->tile, i) - begin, 0), to = least(position_of(step, a->tile, i) + 1, end) - begin;
        ask(a, WEIGHED);
        result[1] = from < to ? weigh(scores, from, to, count, scale, &result[0]) : 0;
        if (from >= to) memset(scores, 0, count * 4);
        if (half)
            pack_bf16(scores, count, a->weights + i * CHUNK / 2);
        else
            memcpy(a->weights + i * CHUNK, scores, count * 4);
    }
    pack_values(a, skip, end - begin, count);
    operand weights = {a->weights, NULL, CHUNK >> half, 0, count >> half};
    for (long d = 0; d < dim; d += NR) {
        ask(a, VALUES_ADDED);
        target sums = {a->results + PARTIAL_HEAD + d, stride, NULL, 0};
        const char *panel = (char *)(a->values + d * (count >> half));
        multiply_panel(half ? BF16 : F32, num_queries, weights, panel, NULL, sums, 0, NULL);
    }
    for (long i = 0; i < num_queries; i++)
        if (a->results[i * stride + 1] != 0) merge(partial_of(step, a->tile, slot, a->head, i), a->results + i * stride, dim);
}

static int is_sampled(const kvf_step *step, long slot) { return step->tiles[step->slot_tile[slot]].is_sampled; }

static long first_chunk(const kvf_step *step, long slot)
{
    const kvf_tile *tile = &step->tiles[step->slot_tile[slot]];
    return tile->first_chunk + (slot - tile->slot);
}

static void start_attending(attending *a, const kvf_step *step, long layer)
{
    const kvf_batch *batch = step->batch;
    a->step = step;
    a->tokens = a->room[0];
    a->coming = a->room[1];
    a->coming_share.slot = -1;
    a->token_nbytes = step->model->num_kv_heads * step->model->head_dim * (batch->kv_half ? 2 : 4);
    a->value_offset = batch->block_size * a->token_nbytes;
    a->block_nbytes = step->model->num_layers * 2 * a->value_offset;
    a->layer = batch->arena + layer * 2 * a->value_offset;
}

/* next is what this thread will be called for next, or NULL. */
static void attend(attending *a, attention_share share, const attention_share *next)
{
    const kvf_step *step = a->step;
    const kvf_model *model = step->model;
    const kvf_tile *tile = a->tile = &step->tiles[step->slot_tile[share.slot]];
    for (long head = share.first_head; head < share.end_head; head++)
        for (long i = 0; i < tile->count; i++) {
            float *partial = partial_of(step, tile, share.slot, head, i);
            memset(partial, 0, (model->head_dim + PARTIAL_HEAD) * 4);
            partial[0] = -INFINITY;
        }
    long chunk = first_chunk(step, share.slot), end_chunk = chunk + (tile->num_slots > 1 ? 1 : tile->num_chunks);
    if (a->coming_share.slot != share.slot || a->coming_share.first_head != share.first_head) {
        locate(a, share, chunk);
        a->pace = a->num_coming;
        ask(a, 1);
    }
    for (; chunk < end_chunk; chunk++) {
        const char **tokens = a->tokens;
        a->tokens = a->coming;
        a->coming = tokens;
        a->coming_share.slot = -1;
        a->num_coming = 0;
        if (chunk + 1 < end_chunk)
            locate(a, share, chunk + 1);
        else if (next)
            locate(a, *next, first_chunk(step, next->slot));
        long begin = chunk_begin(step, tile, chunk), end = chunk_end(step, tile, chunk);
        set_pace(a, padded(end - begin, NR), share.end_head - share.first_head);
        for (a->head = share.first_head; a->head < share.end_head; a->head++) {
            a->head_offset = a->head * model->head_dim * (step->batch->kv_half ? 2 : 4);
            attend_head(a, begin, end, share.slot);
        }
    }
}

/* to: [heads, head_dim], a row's result, from the partial results of all its slots. */
static void gather_row(const kvf_step *step, long row, float *to)
{
    const kvf_model *model = step->model;
    long sequence = step->row_sequence[row], dim = model->head_dim, sharing = model->num_heads / model->num_kv_heads;
    float sum[PARTIAL_HEAD + MAX_HEAD_DIM];
    for (long head = 0; head < model->num_heads; head++) {
        long query = (row - step->batch->qo_indptr[sequence]) * sharing + head % sharing;
        const kvf_tile *tile = &step->tiles[step->first_tile[sequence] + query / QUERIES];
        memset(sum, 0, sizeof sum);
        sum[0] = -INFINITY;
        for (long slot = tile->slot; slot < tile->slot + tile->num_slots; slot++) {
            const float *partial = partial_of(step, tile, slot, head / sharing, query % QUERIES);
            if (partial[1] != 0) merge(sum, partial, dim);
        }
        for (long i = 0; i < dim; i += VL) store(to + head * dim + i, load(sum + PARTIAL_HEAD + i) / sum[1]);
    }
}
