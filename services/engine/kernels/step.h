/* One step of a Llama-like model: what it is given.  library.py declares the same structs for ctypes. */
#pragma once

#include "pool.h"

#include <stdint.h>

/* How a matrix and what it is multiplied with are stored; see matmul.h. */
enum format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

#define GROUP 32 /* inputs that share a scale and a base in INT8 and INT4 */

/* [num_rows, num_columns] of a projection in panels, padded: rows (outputs) with zeros to 32, columns (inputs) to GROUP with
 * anything finite. */
typedef struct {
    const void *values;
    const uint16_t *scales; /* INT8, INT4: [panels][groups][2][32], a group's scales, float16, and its bases, int16 */
    int64_t num_rows, num_columns, format;
} kvf_matrix;

typedef struct {
    kvf_matrix qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *qkv_bias;                  /* [qkv rows, padded], or NULL */
} kvf_layer;

/* Everything is the caller's, constant, and stays for as long as steps run. */
typedef struct {
    int64_t format; /* of the matrices; INT8 stands for INT4 as well, for both are multiplied with the same */
    int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size;
    int64_t vocab_size;       /* the head has as many rows, and more as padding */
    int64_t window;           /* positions that a token sees, itself included; 0 is all */
    float norm_eps;
    const float *frequencies; /* [head_dim / 2], radians per position */
    const float *norm;        /* [hidden] */
    kvf_matrix embedding, head;
    const kvf_layer *layers;
} kvf_model;

/* How a token is drawn: see services/engine/sampling_params.py.  num_logprobs is -1 where none are wanted. */
typedef struct {
    double temperature, top_p;
    int64_t top_k;
    uint64_t seed;
    int64_t position, num_logprobs;
} kvf_sampling;

/* token_id is -1 where the logits are not finite. */
typedef struct {
    int64_t token_id;
    double logprob;
} kvf_drawn;

typedef struct {
    float logit;
    int32_t id;
    double cumulative;
} kvf_candidate;

/* The new tokens of some sequences, back to back.  Indices are the caller's to check: none is checked here. */
typedef struct {
    int64_t num_tokens, num_sequences, num_sampled;
    const int64_t *token_ids; /* [num_tokens]; -1 - n is the token that the step before draws as number n */
    const int64_t *positions, *slots;             /* [num_tokens]; slot = block * block_size + offset */
    const int32_t *qo_indptr, *kv_indptr;         /* [num_sequences + 1]: ranges of tokens, and of kv_indices */
    const int32_t *kv_indices;                    /* blocks of each sequence's context, the new tokens included */
    const int64_t *sampled;                       /* [num_sampled]: tokens whose logits are wanted, each once */
    /* [blocks][layers][2][block_size][kv_heads][head_dim], F32 or (kv_half) bfloat16; new tokens' slots are written. */
    char *arena;
    int64_t block_size, kv_half;
    const kvf_sampling *sampling; /* [num_sampled], or NULL: nothing is drawn */
    kvf_drawn *drawn;             /* [num_sampled], written */
    int64_t *top;                 /* [num_sampled, top_stride], written: as many as num_logprobs says */
    double *top_logprobs;
    int64_t top_stride;
    float *logits; /* [num_sampled, head rows padded to 32], written; NULL: not wanted */
    /* Written: when the step began and was done, by CLOCK_MONOTONIC; failed, when there was no memory and nothing was done. */
    int64_t began_ns, ended_ns, failed;
} kvf_batch;

/* Queries of one sequence that share a KV head, numbered row by row and head by head; chunks of its context. */
typedef struct {
    int32_t sequence, first, count;
    int32_t first_chunk, num_chunks;
    int32_t slot, num_slots; /* of partial results: one for all chunks, or one for each */
    int32_t first_partial;   /* [slots, kv_heads, count] of them, one behind the other */
    int32_t is_sampled;      /* whether a token is drawn from one of its rows */
} kvf_tile;

/* Draws from the first num of row.  order: room for num candidates. */
typedef void kvf_draw(const float *row, long num, const kvf_sampling *by, kvf_drawn *drawn, int64_t *top,
                      double *top_logprobs, kvf_candidate *order);

/* A step with the memory it works in: see step.c. */
typedef struct {
    const kvf_model *model;
    const kvf_batch *batch;
    kvf_draw *draw;
    void (*nearly)(void *engine); /* called once by one thread, before the end, see step.c */
    void *engine;
    int64_t num_tiles, num_slots, num_partials;
    int64_t *token_ids;    /* [num_tokens], all of them known */
    kvf_tile *tiles;       /* [num_tiles] */
    int32_t *slot_tile;    /* [num_slots] */
    int32_t *row_sequence; /* [num_tokens] */
    int32_t *first_tile;   /* [num_sequences] */
    float *hidden;         /* [num_tokens, hidden, padded] */
    float *last_hidden;    /* [num_sampled, hidden, padded]: of the last layer */
    float *wide;           /* [num_tokens, greatest number of outputs of a projection, padded] */
    uint32_t *inputs;      /* [num_tokens, greatest number of inputs of a projection, padded], in the matrices' format */
    int32_t *groups;       /* [num_tokens, the same / GROUP, 2]: see pack_group */
    int64_t row_stride;
    float *rows;           /* [threads, row_stride]: a row on its way into inputs */
    char *room;            /* [threads, row_stride * 2 * NR]: a panel as pairs of int16 */
    float *turns;          /* [num_tokens, 2, head_dim / 2]: cosines, sines */
    float *partials;       /* [num_partials, head_dim + PARTIAL_HEAD] */
    float *logits;         /* [num_sampled, head rows] */
    kvf_candidate *candidates; /* [threads, vocab_size] */
} kvf_step;

#define QUERIES 48       /* most queries of a tile: the more, the less often keys and values are packed */
#define CHUNK 128        /* tokens of context that a partial result is over: multiples of it are where chunks begin */
#define PARTIAL_HEAD 16  /* before its numbers: the greatest score (scaled, as an exponent of 2), the sum of weights, padding */

kvf_draw kvf_draw_avx512bf16, kvf_draw_avx512, kvf_draw_avx2, kvf_draw_portable;
kvf_work kvf_step_avx512bf16, kvf_step_avx512, kvf_step_avx2, kvf_step_portable;
