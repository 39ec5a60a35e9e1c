/* What the processor can do at best. */
#pragma once

#include "pool.h"

/* With memory: nbytes of it are read, a share by each thread, and count is how many were.  Without: rounds rounds of
 * products are computed on each thread in the kernels' format, and count is their FLOPs. */
typedef struct {
    int format;
    long rounds;
    const char *memory;
    long nbytes;
    double count;
    float *sinks; /* one for each thread */
} kvf_peak;
