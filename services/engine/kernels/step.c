/* One step, from token ids to drawn tokens: what each thread of the pool does, phase by phase.
 *
 * Compiled once for each instruction set, under the name KVF_STEP.
 */
#include "attention.h"

/* Who prepares the next step may have to wait for a processor: for less than a millisecond where whoever computes has short
 * turns (kvf_take_short_turns).  More would be all of a step of few sequences, and who arrives in one be in none before the
 * one after the next. */
#define LEAD_NS 2000000

static operand inputs_of(const kvf_step *step, int format, long num_columns)
{
    long num_units = num_columns / unit_inputs(format);
    return (operand){step->inputs, step->groups, num_units, 2 * (num_columns / GROUP), num_units};
}

static void append(const kvf_step *step, long layer, long row)
{
    const kvf_model *model = step->model;
    const kvf_batch *batch = step->batch;
    long dim = model->head_dim, num_kv = model->num_kv_heads * dim, item = batch->kv_half ? 2 : 4;
    float *query = step->wide + row * padded(model->num_heads * dim + 2 * num_kv, NR);
    const float *turns = step->turns + row * dim, *key = query + model->num_heads * dim;
    for (long head = 0; head < model->num_heads + model->num_kv_heads; head++) rotate(query + head * dim, turns, dim / 2);
    long block = batch->slots[row] / batch->block_size, offset = batch->slots[row] % batch->block_size;
    for (long half = 0; half < 2; half++) {
        char *to = batch->arena +
                   (((block * model->num_layers + layer) * 2 + half) * batch->block_size + offset) * num_kv * item;
        if (batch->kv_half)
            pack_bf16(key + half * num_kv, num_kv, to);
        else
            memcpy(to, key + half * num_kv, num_kv * 4);
    }
}

/* Share number number of a layer's attention: slot by slot, and of each slot one group of KV heads after the other. */
static attention_share nth_share(const kvf_model *model, long number, long num_groups)
{
    long group = number % num_groups;
    return (attention_share){number / num_groups, model->num_kv_heads * group / num_groups,
                             model->num_kv_heads * (group + 1) / num_groups};
}

/* After so many layers: whether the last eighth of them begins, or what is left, the head included, takes no longer than
 * LEAD_NS by what the layers took. */
static int is_near_end(const kvf_step *step, long number, int64_t taken_ns)
{
    const kvf_model *model = step->model;
    const kvf_layer *layer = model->layers;
    double of_layer = (double)model->hidden_size * (layer->qkv.num_rows + layer->output.num_columns + layer->gate_up.num_rows +
                                                    layer->down.num_columns) * step->batch->num_tokens;
    double of_head = (double)model->hidden_size * model->head.num_rows * step->batch->num_sampled;
    double left = model->num_layers - number + of_head / of_layer;
    return number > 0 && (number >= model->num_layers - model->num_layers / 8 || taken_ns * left <= LEAD_NS * (double)number);
}

void KVF_STEP(void *argument, kvf_pool *pool, int thread)
{
    const kvf_step *step = argument;
    const kvf_model *model = step->model;
    const kvf_batch *batch = step->batch;
    const int format = (int)model->format;
    const long num_rows = batch->num_tokens, hidden_size = model->hidden_size, inner = model->intermediate_size;
    const long stride = padded(hidden_size, NR), attended_size = model->num_heads * model->head_dim;
    /* Groups of KV heads: one, where there are enough slots to share out. */
    const long wanted = (4 * kvf_pool_size(pool) + step->num_slots - 1) / step->num_slots;
    const long num_groups = least(wanted, model->num_kv_heads);
    float *own = step->rows + thread * step->row_stride;
    char *room = step->room + thread * step->row_stride * 2 * NR;
    attending attention;
    int is_told = 0;
#define EACH(i, count) \
    for (long i = 0, i##_end = 0; i < i##_end || (i = kvf_claim(pool, count, &i##_end)) < (count); i++)

    EACH(row, num_rows) {
        unpack_row(&model->embedding, step->token_ids[row], hidden_size, step->hidden + row * stride);
        turn(model->frequencies, model->head_dim / 2, batch->positions[row], step->turns + row * model->head_dim);
    }
    kvf_barrier(pool);
    for (long number = 0; number < model->num_layers; number++) {
        const kvf_layer *layer = &model->layers[number];
        if (thread == 0 && !is_told && is_near_end(step, number, kvf_now_ns() - batch->began_ns)) {
            step->nearly(step->engine);
            is_told = 1;
        }

        operand x = inputs_of(step, format, layer->qkv.num_columns);
        EACH(row, num_rows) {
            normalize(step->hidden + row * stride, layer->attention_norm, model->norm_eps, hidden_size, own);
            prepare(format, own, hidden_size, layer->qkv.num_columns, &x, row);
        }
        kvf_barrier(pool);
        multiply(pool, room, num_rows, x, &layer->qkv, (target){step->wide, layer->qkv.num_rows, layer->qkv_bias, 0});
        kvf_barrier(pool);
        EACH(row, num_rows) append(step, number, row);
        kvf_barrier(pool);
        /* Of the last layer nobody needs more than what tokens are drawn from: for other rows their keys and values do. */
        const int last = number + 1 == model->num_layers;
        const long num_wanted = last ? batch->num_sampled : num_rows;
        float *hidden = last ? step->last_hidden : step->hidden;
        start_attending(&attention, step, number);
        EACH(share, step->num_slots * num_groups) {
            attention_share own_share = nth_share(model, share, num_groups), next = nth_share(model, share + 1, num_groups);
            if (last && !is_sampled(step, own_share.slot)) continue;
            int is_next = share + 1 < share_end && (!last || is_sampled(step, next.slot));
            attend(&attention, own_share, is_next ? &next : NULL);
        }
        kvf_barrier(pool);
        x = inputs_of(step, format, layer->output.num_columns);
        EACH(i, num_wanted) {
            long row = last ? batch->sampled[i] : i;
            gather_row(step, row, own);
            prepare(format, own, attended_size, layer->output.num_columns, &x, i);
            if (last) memcpy(hidden + i * stride, step->hidden + row * stride, hidden_size * sizeof(float));
        }
        kvf_barrier(pool);
        multiply(pool, room, num_wanted, x, &layer->output, (target){hidden, stride, NULL, 1});
        kvf_barrier(pool);

        x = inputs_of(step, format, layer->gate_up.num_columns);
        EACH(row, num_wanted) {
            normalize(hidden + row * stride, layer->mlp_norm, model->norm_eps, hidden_size, own);
            prepare(format, own, hidden_size, layer->gate_up.num_columns, &x, row);
        }
        kvf_barrier(pool);
        multiply(pool, room, num_wanted, x, &layer->gate_up, (target){step->wide, layer->gate_up.num_rows, NULL, 0});
        kvf_barrier(pool);
        x = inputs_of(step, format, layer->down.num_columns);
        EACH(row, num_wanted) {
            const float *gate = step->wide + row * layer->gate_up.num_rows;
            activate(gate, gate + inner, inner, own);
            prepare(format, own, inner, layer->down.num_columns, &x, row);
        }
        kvf_barrier(pool);
        multiply(pool, room, num_wanted, x, &layer->down, (target){hidden, stride, NULL, 1});
        kvf_barrier(pool);
    }
    operand x = inputs_of(step, format, model->head.num_columns);
    EACH(i, batch->num_sampled) {
        normalize(step->last_hidden + i * stride, model->norm, model->norm_eps, hidden_size, own);
        prepare(format, own, hidden_size, model->head.num_columns, &x, i);
    }
    kvf_barrier(pool);
    multiply(pool, room, batch->num_sampled, x, &model->head, (target){step->logits, model->head.num_rows, NULL, 0});
    if (!batch->sampling) return;
    kvf_barrier(pool);
    EACH(i, batch->num_sampled)
        step->draw(step->logits + i * model->head.num_rows, model->vocab_size, &batch->sampling[i], &batch->drawn[i],
                   batch->top + i * batch->top_stride, batch->top_logprobs + i * batch->top_stride,
                   step->candidates + thread * model->vocab_size);
}
