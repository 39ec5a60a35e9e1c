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

typedef struct {
    const kvf_step *step;
    const kvf_tile *tile;
    const char *layer; /* the arena's first block, at this layer */
    long block_nbytes, token_nbytes, value_offset;
    long first_head, end_head, head; /* KV heads: those to do, and the one in hand */
    long head_offset;                /* how far its numbers are into a token's */
    long first_row, first_position;  /* of the sequence's new tokens */
    /* Where the keys of a chunk's tokens are, all heads; values are value_offset further.  Of the chunk that comes next
     * the first num_asked have been asked for. */
    const char **tokens, **coming, *room[2][CHUNK];
    long num_coming, num_asked;
    uint32_t queries[QUERIES * MAX_HEAD_DIM];
    uint32_t panel[NR * MAX_HEAD_DIM]; /* keys of 32 tokens */
    float scores[QUERIES * CHUNK];
    uint32_t weights[QUERIES * CHUNK];
    uint32_t values[CHUNK * MAX_HEAD_DIM];
    float results[QUERIES * (MAX_HEAD_DIM + PARTIAL_HEAD)];
} attending;

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

static long position_of(const attending *a, long query)
{
    return a->first_position + (a->tile->first + query) / (a->step->model->num_heads / a->step->model->num_kv_heads);
}

/* Where the tile's query sees from. */
static long sees_from(const attending *a, long query)
{
    long window = a->step->model->window;
    return window ? most(0, position_of(a, query) + 1 - window) : 0;
}

static void take_queries(attending *a)
{
    const kvf_model *model = a->step->model;
    long dim = model->head_dim, sharing = model->num_heads / model->num_kv_heads, half = a->step->batch->kv_half;
    long stride = padded((model->num_heads + 2 * model->num_kv_heads) * dim, NR);
    for (long i = 0; i < a->tile->count; i++) {
        long row = a->first_row + (a->tile->first + i) / sharing, head = a->head * sharing + (a->tile->first + i) % sharing;
        const float *query = a->step->wide + row * stride + head * dim;
        if (half)
            pack_bf16(query, dim, a->queries + i * dim / 2);
        else
            memcpy(a->queries + i * dim, query, dim * 4);
    }
}

/* Chunk's tokens: begin..end of the context, whole panels from a multiple of NR on, so that a token has the same place in
 * all sums whoever looks at it. */
static long chunk_begin(const attending *a, long chunk) { return most(chunk * CHUNK, sees_from(a, 0) / NR * NR); }

static long chunk_end(const attending *a, long chunk)
{
    return least((chunk + 1) * CHUNK, position_of(a, a->tile->count - 1) + 1);
}

/* Finds the tokens of the chunk that comes next. */
static void locate(attending *a, long chunk)
{
    const kvf_batch *batch = a->step->batch;
    const int32_t *blocks = batch->kv_indices + batch->kv_indptr[a->tile->sequence];
    long begin = chunk_begin(a, chunk), end = chunk_end(a, chunk);
    for (long i = 0; i < end - begin; i++) {
        long block = (begin + i) / batch->block_size, offset = (begin + i) % batch->block_size;
        a->coming[i] = a->layer + blocks[block] * a->block_nbytes + offset * a->token_nbytes;
    }
    a->num_coming = end - begin;
    a->num_asked = 0;
}

/* Asks memory for some more tokens of the chunk that comes next: blocks lie anywhere, which defeats the processor's own
 * foresight.  Inlined: gcc takes a function that only asks for one that does nothing. */
static ALWAYS_INLINE void ask(attending *a, long count)
{
    long head_nbytes = a->step->model->head_dim * (a->step->batch->kv_half ? 2 : 4);
    for (long end = least(a->num_asked + count, a->num_coming); a->num_asked < end; a->num_asked++)
        for (long at = a->first_head * head_nbytes; at < a->end_head * head_nbytes; at += 64) {
            __builtin_prefetch(a->coming[a->num_asked] + at, 0, 2);
            __builtin_prefetch(a->coming[a->num_asked] + a->value_offset + at, 0, 2);
        }
}

/* Keys of NR tokens, of which the first is tokens[at] and those from count on do not matter. */
static void pack_keys(attending *a, long at, long count, long num_units)
{
    for (long lanes = 0; lanes < NR; lanes += VL)
        for (long unit = 0; unit < num_units; unit += VL) {
            vf rows[VL];
            UNROLL for (int i = 0; i < VL; i++)
                rows[i] = load(a->tokens[least(at + lanes + i, count - 1)] + a->head_offset + unit * 4);
            transpose(rows);
            UNROLL for (int i = 0; i < VL; i++) store(a->panel + (unit + i) * NR + lanes, rows[i]);
        }
}

/* Values of tokens skip..end as [panel of 32 dimensions][count tokens, in pairs where they are bfloat16].  Others are zero:
 * their slots hold anything, and a weight of zero would not undo a NaN. */
static void pack_values(attending *a, long skip, long end, long count, long ahead)
{
    static const char zeros[4 * MAX_HEAD_DIM];
    long dim = a->step->model->head_dim, half = a->step->batch->kv_half, offset = a->value_offset + a->head_offset;
    for (long at = 0; at < count; at += 1 + half) {
        if (at % NR == 0) ask(a, ahead);
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
    long count = padded(end - begin, NR), skip = most(0, sees_from(a, 0) - begin);
    const long ahead = NR / 2 / (a->end_head - a->first_head) + 1; /* all of them, before the last panel of the last head */
    take_queries(a);
    operand queries = {a->queries, NULL, dim >> half, 0, dim >> half};
    for (long at = 0; at < count; at += NR) {
        ask(a, ahead);
        pack_keys(a, at, end - begin, dim >> half);
        target scores = {a->scores + at, CHUNK, NULL, 0};
        if (half)
            multiply_bf16(num_queries, queries, (char *)a->panel, scores);
        else
            multiply_f32(num_queries, queries, (char *)a->panel, scores);
    }
    float scale = 1.44269504f / sqrtf((float)dim); /* of log2(e) */
    long stride = dim + PARTIAL_HEAD;
    for (long i = 0; i < num_queries; i++) {
        float *result = a->results + i * stride, *scores = a->scores + i * CHUNK;
        long from = most(sees_from(a, i) - begin, 0), to = least(position_of(a, i) + 1, end) - begin;
        result[1] = from < to ? weigh(scores, from, to, count, scale, &result[0]) : 0;
        if (from >= to) memset(scores, 0, count * 4);
        if (half)
            pack_bf16(scores, count, a->weights + i * CHUNK / 2);
        else
            memcpy(a->weights + i * CHUNK, scores, count * 4);
    }
    pack_values(a, skip, end - begin, count, ahead);
    operand weights = {a->weights, NULL, CHUNK >> half, 0, count >> half};
    for (long d = 0; d < dim; d += NR) {
        target sums = {a->results + PARTIAL_HEAD + d, stride, NULL, 0};
        const char *panel = (char *)(a->values + d * (count >> half));
        if (half)
            multiply_bf16(num_queries, weights, panel, sums);
        else
            multiply_f32(num_queries, weights, panel, sums);
    }
    for (long i = 0; i < num_queries; i++)
        if (a->results[i * stride + 1] != 0) merge(partial_of(step, a->tile, slot, a->head, i), a->results + i * stride, dim);
}

/* Adds chunks of context, which follow each other, to the partial results of a slot. */
static void attend_chunks(attending *a, long chunk, long end_chunk, long slot)
{
    locate(a, chunk);
    ask(a, CHUNK);
    for (; chunk < end_chunk; chunk++) {
        const char **tokens = a->tokens;
        a->tokens = a->coming;
        a->coming = tokens;
        a->num_coming = 0;
        if (chunk + 1 < end_chunk) locate(a, chunk + 1);
        for (a->head = a->first_head; a->head < a->end_head; a->head++) {
            a->head_offset = a->head * a->step->model->head_dim * (a->step->batch->kv_half ? 2 : 4);
            attend_head(a, chunk_begin(a, chunk), chunk_end(a, chunk), slot);
        }
    }
}

/* The share of a tile's context that belongs to a slot, for some KV heads: all heads of a token lie together. */
static void attend(const kvf_step *step, long layer, long slot, long first_head, long end_head)
{
    const kvf_model *model = step->model;
    const kvf_batch *batch = step->batch;
    const kvf_tile *tile = &step->tiles[step->slot_tile[slot]];
    attending a;
    a.step = step;
    a.tile = tile;
    a.first_head = first_head;
    a.end_head = end_head;
    a.tokens = a.room[0];
    a.coming = a.room[1];
    a.token_nbytes = model->num_kv_heads * model->head_dim * (batch->kv_half ? 2 : 4);
    a.value_offset = batch->block_size * a.token_nbytes;
    a.block_nbytes = model->num_layers * 2 * a.value_offset;
    a.layer = batch->arena + layer * 2 * a.value_offset;
    a.first_row = batch->qo_indptr[tile->sequence];
    a.first_position = batch->positions[a.first_row];
    for (long head = first_head; head < end_head; head++)
        for (long i = 0; i < tile->count; i++) {
            float *partial = partial_of(step, tile, slot, head, i);
            memset(partial, 0, (model->head_dim + PARTIAL_HEAD) * 4);
            partial[0] = -INFINITY;
        }
    long chunk = tile->first_chunk + (slot - tile->slot);
    attend_chunks(&a, chunk, chunk + (tile->num_slots > 1 ? 1 : tile->num_chunks), slot);
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
