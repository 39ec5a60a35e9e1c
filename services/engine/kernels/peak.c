/* What the processor can do at best, to hold against what steps do: products from registers, and reading memory in order.
 *
 * Compiled once for each instruction set, under the name KVF_PEAK.
 */
#include "peak.h"

#include "step.h"
#include "vector.h"

#define CHAINS 12 /* independent ones hide how long an instruction takes */

/* What v holds is unknown to the compiler from here on. */
#if defined(__AVX512F__)
#define FORGET(v) __asm__ volatile("" : "+v"(v))
#elif defined(__x86_64__)
#define FORGET(v) __asm__ volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define FORGET(v) __asm__ volatile("" : "+w"(v))
#else
#define FORGET(v) __asm__ volatile("" : "+m"(v))
#endif

static void multiply_floats(long rounds, float *sink)
{
    vf sums[CHAINS] = {{0}}, a = splat(1), b = splat(1);
    FORGET(b);
    for (long i = 0; i < rounds; i++)
        UNROLL for (int c = 0; c < CHAINS; c++) {
            FORGET(a);
            sums[c] += a * b;
        }
    UNROLL for (int c = 0; c < CHAINS; c++) *sink += sums[c][0];
}

static ALWAYS_INLINE void multiply_pairs(const int format, long rounds, float *sink)
{
    vi sums[CHAINS] = {{0}}, a = splat_bits(0), b = splat_bits(0);
    FORGET(b);
    for (long i = 0; i < rounds; i++)
        UNROLL for (int c = 0; c < CHAINS; c++) {
            FORGET(a);
            sums[c] = format == INT8 ? dot_i16(sums[c], a, b) : (vi)dot_bf16((vf)sums[c], a, b);
        }
    UNROLL for (int c = 0; c < CHAINS; c++) *sink += sums[c][0];
}

static void read_memory(const char *from, long nbytes, float *sink)
{
    vi sums[8] = {{0}};
    for (long at = 0; at + (long)sizeof sums <= nbytes; at += sizeof sums)
        UNROLL for (int i = 0; i < 8; i++) sums[i] ^= (vi)load(from + at + i * sizeof(vi));
    UNROLL for (int i = 0; i < 8; i++) *sink += sums[i][0];
}

void KVF_PEAK(void *argument, kvf_pool *pool, int thread)
{
    kvf_peak *peak = argument;
    float sink = 0;
    if (peak->memory) {
        long share = peak->nbytes / kvf_pool_size(pool) / 4096 * 4096;
        read_memory(peak->memory + thread * share, share, &sink);
        if (!thread) peak->count = share * kvf_pool_size(pool);
    } else {
        int pairs = peak->format == INT8;
#if defined(__AVX512BF16__)
        pairs |= peak->format == BF16;
#endif
        if (pairs && peak->format == INT8)
            multiply_pairs(INT8, peak->rounds, &sink);
        else if (pairs)
            multiply_pairs(BF16, peak->rounds, &sink);
        else /* BF16 too, which is multiplied as floats where there is no instruction for it */
            multiply_floats(peak->rounds, &sink);
        if (!thread) peak->count = (double)peak->rounds * CHAINS * VL * (pairs ? 4 : 2) * kvf_pool_size(pool);
    }
    peak->sinks[thread] = sink;
}
