/* What packing.py asks of weights before it stores them in 8 bits or fewer. */
#include "step.h"

#define MAX_STEPS 255

static int is_multiple(float rise, float per_step, float tolerance)
{
    float steps = rise * per_step, whole = (steps + 12582912.0f) - 12582912.0f; /* rounds */
    return steps - whole <= tolerance && whole - steps <= tolerance;
}

/* How many steps lie between the least and the greatest of a group: as few as have every weight at a step, which is how
 * files that were quantized are met; MAX_STEPS where nothing does. */
static int count_steps(const float *weights, float least, float span)
{
    float per_span = 1 / span;
    for (int count = 1; count < MAX_STEPS; count++) {
        int i = 0;
        while (i < GROUP && is_multiple(weights[i] - least, count * per_span, count * 0x1p-14f)) i++;
        if (i == GROUP) return count;
    }
    return MAX_STEPS;
}

/* to: [num_groups][3], of each group of weights the least, how far the greatest is above it, and the number of steps.  The
 * least is NaN where a weight is not finite. */
void kvf_count_steps(const float *weights, long num_groups, float *to)
{
    for (; num_groups; num_groups--, weights += GROUP, to += 3) {
        float least = weights[0], greatest = weights[0], finite = 0;
        for (int i = 0; i < GROUP; i++) {
            finite += weights[i] * 0.0f;
            least = weights[i] < least ? weights[i] : least;
            greatest = weights[i] > greatest ? weights[i] : greatest;
        }
        to[0] = least + finite;
        to[1] = greatest - least;
        to[2] = greatest > least ? count_steps(weights, least, greatest - least) : 0;
    }
}
