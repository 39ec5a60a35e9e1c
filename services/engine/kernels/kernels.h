/* What computes steps, one at a time, on threads of its own and the caller's. */
#pragma once

#include "step.h"

#include <stddef.h>

typedef struct kvf_kernels kvf_kernels;

/* instruction_set: one that this processor has.  NULL when memory or threads cannot be had. */
kvf_kernels *kvf_kernels_open(const char *instruction_set, int num_threads);
/* Not while a step runs. */
void kvf_kernels_close(kvf_kernels *kernels);
/* Computes the step, whose model, batch and nearly are given; blocks.  drawn_before: the tokens that the step before drew;
 * for one that it did not, another stands.  -1 when there is no memory, and then nothing was done. */
int kvf_compute(kvf_kernels *kernels, kvf_step *step, const int64_t *drawn_before, long num_drawn_before);
