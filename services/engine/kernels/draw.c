/* Drawing tokens, as services/engine/sampler.py does.
 *
 * Compiled once for each instruction set, under the name KVF_DRAW, and without fused multiplications: a draw is the same on
 * all of them.
 */
#include "step.h"

#include <math.h>
#include <string.h>

#define LANES 8
#define FIRST_LOOK 256 /* how many of the likeliest are put in order at first */

typedef double vd __attribute__((vector_size(8 * LANES)));
typedef int64_t vl __attribute__((vector_size(8 * LANES)));
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static vf load(const float *from) { vf v; memcpy(&v, from, sizeof v); return v; }

static int any(vi mask)
{
    int64_t halves[LANES / 2], all = 0;
    memcpy(halves, &mask, sizeof halves);
    for (int i = 0; i < LANES / 2; i++) all |= halves[i];
    return all != 0;
}

/* Of numbers up to 0, to a unit in the last place or so; 0 for what is below -700. */
static inline vd exp_of(vd x)
{
    static const double terms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                   1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
    vl in_range = x >= -700.0;
    x = (vd)(in_range & (vl)x);
    vd shifted = x * 0x1.71547652b82fep0 + 0x1.8p52, n = shifted - 0x1.8p52; /* whole; and in the low bits of shifted */
    vd rest = x - n * 0x1.62e42feep-1 - n * 0x1.a39ef35793c76p-33;
    vd sum = rest * (1.0 / 6227020800) + terms[0];
    for (int i = 1; i < 13; i++) sum = sum * rest + terms[i];
    return (vd)(in_range & ((vl)sum + ((vl)shifted << 52)));
}

static double exp_of_one(double x)
{
    vd v = {x};
    return exp_of(v)[0];
}

/* The sum of exp((row - best) / temperature), in one order for any instruction set. */
static double sum_weights(const float *row, long num, float best, double temperature)
{
    vd sums = {0};
    long i = 0;
    for (; i + LANES <= num; i += LANES)
        sums += exp_of((__builtin_convertvector(load(row + i), vd) - (double)best) / temperature);
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    for (; i < num; i++) sum += exp_of_one(((double)row[i] - best) / temperature);
    return sum;
}

/* The lowest place of the greatest; -1 where any is NaN or the greatest is infinite. */
static long find_best(const float *row, long num)
{
    vf most = (vf){0} + row[0];
    vi nan = {0};
    long i = 0;
    for (; i + LANES <= num; i += LANES) {
        vf v = load(row + i);
        vi greater = v > most;
        most = (vf)((greater & (vi)v) | (~greater & (vi)most));
        nan |= v != v;
    }
    float best = row[0];
    int broken = 0;
    for (int lane = 0; lane < LANES; lane++) {
        best = most[lane] > best ? most[lane] : best;
        broken |= nan[lane];
    }
    for (; i < num; i++) {
        best = row[i] > best ? row[i] : best;
        broken |= row[i] != row[i];
    }
    if (broken || !isfinite(best)) return -1;
    for (i = 0; i + LANES <= num && !any(load(row + i) == best); i += LANES) {}
    while (row[i] != best) i++;
    return i;
}

static int comes_before(kvf_candidate a, kvf_candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

/* Puts what is at place where it belongs in a heap whose last of all is on top. */
static void sink(kvf_candidate *heap, long num, long place)
{
    kvf_candidate moved = heap[place];
    for (long child; (child = 2 * place + 1) < num; place = child) {
        if (child + 1 < num && comes_before(heap[child], heap[child + 1])) child++;
        if (comes_before(heap[child], moved)) break;
        heap[place] = heap[child];
    }
    heap[place] = moved;
}

/* The count greatest of a row, in order: greatest first, lower ids first among equals. */
static void find_likeliest(const float *row, long num, long count, kvf_candidate *to)
{
    if (!count) return;
    for (long i = 0; i < count; i++) to[i] = (kvf_candidate){.logit = row[i], .id = i};
    for (long i = count / 2; i--;) sink(to, count, i);
    for (long i = count; i < num;) {
        if (i + LANES <= num && !any(load(row + i) > to[0].logit)) { /* most are none of the greatest */
            i += LANES;
            continue;
        }
        for (long end = i + LANES < num ? i + LANES : num; i < end; i++)
            if (row[i] > to[0].logit) { /* an equal one has the higher id */
                to[0] = (kvf_candidate){.logit = row[i], .id = i};
                sink(to, count, 0);
            }
    }
    for (long left = count; --left;) {
        kvf_candidate last = to[0];
        to[0] = to[left];
        to[left] = last;
        sink(to, left, 0);
    }
}

/* The first of the four words of Philox4x64-10 (Salmon et al., SC 2011), 53 bits of it: in [0, 1). */
static double uniform(uint64_t seed, uint64_t position)
{
    /* numpy counts before it draws. */
    uint64_t x[4] = {position + 1, 0, 0, 0}, key[2] = {seed, 0};
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)x[0] * 0xD2E7470EE14C6C93;
        unsigned __int128 second = (unsigned __int128)x[2] * 0xCA5A826395121157;
        uint64_t next[4] = {(uint64_t)(second >> 64) ^ x[1] ^ key[0], (uint64_t)second,
                            (uint64_t)(first >> 64) ^ x[3] ^ key[1], (uint64_t)first};
        memcpy(x, next, sizeof x);
        key[0] += 0x9E3779B97F4A7C15;
        key[1] += 0xBB67AE8584CAA73B;
    }
    return (x[0] >> 11) * 0x1p-53;
}

/* Inverse of the cumulative distribution: temperature first, then top_k, then top_p of what top_k left. */
static int64_t sample(const float *row, long num, float best, const kvf_sampling *by, kvf_candidate *order)
{
    long limit = by->top_k && by->top_k < num ? by->top_k : num;
    long count = limit < num || limit < FIRST_LOOK ? limit : FIRST_LOOK;
    double chance = uniform(by->seed, by->position), everything = 0;
    for (;; count = count * 8 < limit ? count * 8 : limit) {
        find_likeliest(row, num, count, order);
        double sum = 0;
        for (long i = 0; i < count; i++)
            order[i].cumulative = sum += exp_of_one(((double)order[i].logit - best) / by->temperature);
        double total = sum;
        if (count < limit) total = everything = everything ? everything : sum_weights(row, num, best, by->temperature);
        long kept = count, place = 0;
        if (by->top_p < 1) {
            for (kept = 0; kept < count && order[kept].cumulative < by->top_p * total;) kept++;
            kept++;
            total = order[(kept < count ? kept : count) - 1].cumulative;
        }
        while (place < count && order[place].cumulative <= chance * total) place++;
        if (count < limit && (kept > count || place == count)) continue;
        long last = (kept < count ? kept : count) - 1;
        return order[place < last ? place : last].id;
    }
}

void KVF_DRAW(const float *row, long num, const kvf_sampling *by, kvf_drawn *drawn, int64_t *top, double *top_logprobs,
              kvf_candidate *order)
{
    long best = find_best(row, num);
    drawn->token_id = best;
    if (best < 0) return;
    if (by->temperature > 0) drawn->token_id = sample(row, num, row[best], by, order);
    if (by->num_logprobs < 0) return;
    double log_sum = log(sum_weights(row, num, row[best], 1));
    drawn->logprob = (double)row[drawn->token_id] - row[best] - log_sum;
    long count = by->num_logprobs < num ? by->num_logprobs : num;
    find_likeliest(row, num, count, order);
    for (long i = 0; i < count; i++) {
        top[i] = order[i].id;
        top_logprobs[i] = (double)order[i].logit - row[best] - log_sum;
    }
}
