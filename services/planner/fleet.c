// A fleet in virtual time, step by step, but with sums in place of sequences: what a step costs needs only how many decode
// and how much context they have together, so a step costs O(1) and a request O(log n).  Nothing here knows a clock.
// The contract of every field is in fleet.py.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NUM_TERMS 6
#define NUM_BUCKETS 1024
#define BUCKETS_FROM_S 1e-5
#define BUCKET_GROWTH 1.02
#define NUM_KEYS 4
#define MOST_SPREAD 0.95 // as cost_model.py's
#define NUM_DELAYS 0.5   // likewise
#define NOBODY (-1)

typedef struct {
    double additive[NUM_TERMS], compute[NUM_TERMS], memory[NUM_TERMS];
    double expert_s, expert_rate, spread;
} Cost;

typedef struct {
    int64_t num_workers, step_tokens, mixed_tokens, kv_tokens, max_running, prompts_alone;
    Cost cost;
} Pool;

typedef struct {
    Pool prefill, decode;  // no prefill workers: those of decode compute prompts too
    double kv_token_nbytes, out_bytes_per_s, in_bytes_per_s, round_trip_s;
    double itl_bound_s, request_weight;
    double token_s[2];  // what a queued prompt token takes, on a prefill and on a decode worker
    double max_queue_s, stall_weight, patience, dispatch_s;
    int64_t decode_computes;
} Fleet;

typedef struct {
    double *first_s, *second_s, *end_s;
    int32_t *num_slow;
    double *busy_s, *prefill_tokens, *decode_tokens;  // by worker, those of prefill first
    double *gaps;                                     // NUM_BUCKETS
    double end_of_all_s;
    double num_steps;
} Result;

typedef struct { int64_t finish; int32_t request; } Finish;

typedef struct {
    const Pool *pool;
    int is_writer;
    int32_t waiting, waiting_last, chunked, chunked_last, incoming, incoming_last, fresh;
    int64_t num_chunked, num_decoding, num_planned, num_requests, kv_used;
    int64_t steps, num_slow;
    double context, planned_tokens, queued_tokens, took_s, stalled_s, link_free_s;
    int busy;
    Finish *heap;
    int64_t heap_room;
} Worker;

typedef struct { double at_s; uint64_t number; int32_t worker, request; } Event;

typedef struct { Event *items; int64_t num, room; } Heap;  // by time, then in the order in which they were pushed

typedef struct {
    const Fleet *fleet;
    const double *arrive_s;
    const int32_t *num_input, *num_output, *num_cached;
    Result *result;
    Worker *workers;
    int64_t num_writers, num_all;
    int32_t *next, *done, *reader, *slow_before;
    double *keys[NUM_KEYS];  // prefill workers by queue; decode workers by what one more costs, by KV, by cost if there is room
    int64_t leaves[NUM_KEYS];
    Heap events, line;
    uint64_t number;
    double now_s;
    uint64_t random;
    int failed;
} Run;

// The worker with the least of a key: a tree of winners over `leaves` (a power of two).
static void set_key(Run *run, int which, int64_t index, double key) {
    double *tree = run->keys[which];
    int64_t at = run->leaves[which] + index;
    tree[at] = key;
    for (at >>= 1; at >= 1; at >>= 1) {
        double least = fmin(tree[2 * at], tree[2 * at + 1]);
        if (tree[at] == least) break;
        tree[at] = least;
    }
}

static int64_t least(const Run *run, int which) {
    const double *tree = run->keys[which];
    int64_t at = 1;
    while (at < run->leaves[which]) at = tree[2 * at] <= tree[2 * at + 1] ? 2 * at : 2 * at + 1;
    return at - run->leaves[which];
}

static int earlier(const Event *a, const Event *b) {
    return a->at_s < b->at_s || (a->at_s == b->at_s && a->number < b->number);
}

static void push(Run *run, Heap *heap, double at_s, int32_t worker, int32_t request) {
    if (heap->num == heap->room) {
        int64_t room = heap->room ? 2 * heap->room : 1024;
        Event *grown = realloc(heap->items, room * sizeof *grown);
        if (!grown) { run->failed = 1; return; }
        heap->items = grown, heap->room = room;
    }
    int64_t at = heap->num++;
    Event event = {at_s, run->number++, worker, request};
    while (at && earlier(&event, &heap->items[(at - 1) / 2])) heap->items[at] = heap->items[(at - 1) / 2], at = (at - 1) / 2;
    heap->items[at] = event;
}

static Event pop(Heap *heap) {
    Event top = heap->items[0], last = heap->items[--heap->num];
    int64_t at = 0, n = heap->num;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && earlier(&heap->items[child + 1], &heap->items[child])) child++;
        if (!earlier(&heap->items[child], &last)) break;
        heap->items[at] = heap->items[child], at = child;
    }
    heap->items[at] = last;
    return top;
}

static void push_finish(Run *run, Worker *w, int64_t finish, int32_t request) {
    if (w->num_decoding == w->heap_room) {
        int64_t room = w->heap_room ? 2 * w->heap_room : 64;
        Finish *grown = realloc(w->heap, room * sizeof *grown);
        if (!grown) { run->failed = 1; return; }
        w->heap = grown, w->heap_room = room;
    }
    int64_t at = w->num_decoding++;
    while (at && w->heap[(at - 1) / 2].finish > finish) w->heap[at] = w->heap[(at - 1) / 2], at = (at - 1) / 2;
    w->heap[at] = (Finish){finish, request};
}

static int32_t pop_finish(Worker *w) {
    int32_t request = w->heap[0].request;
    Finish last = w->heap[--w->num_decoding];
    int64_t at = 0, n = w->num_decoding;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && w->heap[child + 1].finish < w->heap[child].finish) child++;
        if (w->heap[child].finish >= last.finish) break;
        w->heap[at] = w->heap[child], at = child;
    }
    w->heap[at] = last;
    return request;
}

static void append(Run *run, int32_t *first, int32_t *last, int32_t request) {
    run->next[request] = NOBODY;
    if (*first == NOBODY) *first = request;
    else run->next[*last] = request;
    *last = request;
}

static int32_t take(Run *run, int32_t *first) {
    int32_t request = *first;
    *first = run->next[request];
    return request;
}

static double step_s(const Cost *cost, const double *terms) {
    double additive = 0, compute = 0, memory = 0;
    for (int i = 0; i < NUM_TERMS; i++) {
        additive += cost->additive[i] * terms[i];
        compute += cost->compute[i] * terms[i];
        memory += cost->memory[i] * terms[i];
    }
    if (cost->expert_s > 0) memory += cost->expert_s * -expm1(-cost->expert_rate * (terms[1] + terms[4]));
    return additive + fmax(compute, memory);
}

// The sum of four even draws of 16 bits each, 0 to 4.  SplitMix64 (Steele, Lea, Flood 2014), from a state of the run's own: the
// same every time.
static double four_even(Run *run) {
    uint64_t bits = run->random += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    bits ^= bits >> 31;
    return ((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48)) / 65535.0;
}

// What a step takes that takes mean_s on the average, as cost_model.py has it: eight even draws are together near enough to
// normal.
static double scattered_s(Run *run, const Cost *cost, double mean_s) {
    double times = fmin(1, cost->additive[0] / mean_s) / (9 * NUM_DELAYS);
    double normal = (four_even(run) + four_even(run) - 4) * 1.2247449;
    double root = fmax(0, 1 - times + normal * sqrt(times));
    return mean_s * (1 + fmin(cost->spread, MOST_SPREAD) * (root * root * root - 1));
}

static void count_gap(Run *run, double gap_s, double times) {
    int bucket = gap_s <= BUCKETS_FROM_S ? 0 : (int)(log(gap_s / BUCKETS_FROM_S) / log(BUCKET_GROWTH));
    run->result->gaps[bucket < NUM_BUCKETS ? bucket : NUM_BUCKETS - 1] += times;
}

static int64_t kept_tokens(const Run *run, const Worker *w, int32_t request) {
    return run->num_input[request] + (w->is_writer ? 0 : run->num_output[request]);
}

static int64_t uncached(const Run *run, int32_t request) {
    return run->num_input[request] - run->num_cached[request];
}

static double queue_s(const Run *run, const Worker *w) { return w->queued_tokens * run->fleet->token_s[!w->is_writer]; }

static void rank(Run *run, Worker *w) {
    int64_t index = w - run->workers;
    if (w->is_writer) set_key(run, 0, index, w->queued_tokens);
    else {
        double more_s = run->num_writers ? 0 : queue_s(run, w);
        double cost_s = more_s + w->num_requests * run->fleet->request_weight;
        int64_t at = index - run->num_writers;
        set_key(run, 1, at, cost_s);
        set_key(run, 2, at, (double)w->kv_used);
        set_key(run, 3, at, more_s > run->fleet->max_queue_s ? INFINITY : cost_s);
    }
}

static void start_step(Run *run, Worker *w);

static void has_come(Run *run, Worker *w, int32_t request) {
    append(run, &w->waiting, &w->waiting_last, request);
    start_step(run, w);
}

// Room on a decode worker is set aside when a request is sent there, on a prefill worker when its prompt is begun.  A prompt
// counts as ahead of others' as a whole, until its end is known.
static void send(Run *run, Worker *reader, Worker *computer, int32_t request) {
    run->reader[request] = (int32_t)(reader - run->workers);
    reader->kv_used += kept_tokens(run, reader, request);
    reader->num_requests++;
    double dispatch_s = run->fleet->dispatch_s;
    if (dispatch_s > 0) push(run, &run->events, run->now_s + dispatch_s, (int32_t)(computer - run->workers), request);
    else has_come(run, computer, request);
    computer->queued_tokens += uncached(run, request);
    rank(run, reader);
    if (computer == reader) return;
    computer->num_requests++;
    rank(run, computer);
}

static void unqueue(Run *run, Worker *w, int32_t request) {
    w->queued_tokens -= uncached(run, request);
    rank(run, w);
}

static void start_step(Run *run, Worker *w) {
    if (w->busy) return;
    const Pool *pool = w->pool;
    int32_t request;
    while (w->incoming != NOBODY && w->num_decoding < pool->max_running) {
        request = take(run, &w->incoming);
        push_finish(run, w, w->steps + run->num_output[request] - 1, request);
        w->context += run->num_input[request] + 1;
        run->next[request] = w->fresh, w->fresh = request;
    }
    while (w->waiting != NOBODY && w->num_decoding + w->num_chunked < pool->max_running &&
           (!w->is_writer || w->kv_used + kept_tokens(run, w, w->waiting) <= pool->kv_tokens)) {
        request = take(run, &w->waiting);
        append(run, &w->chunked, &w->chunked_last, request);
        if (w->is_writer) w->kv_used += kept_tokens(run, w, request);
        w->num_chunked++;
    }
    int64_t budget = pool->step_tokens;
    if (!pool->prompts_alone && w->num_decoding) {
        budget -= w->num_decoding;
        if (budget > pool->mixed_tokens) budget = pool->mixed_tokens;
    }
    double terms[NUM_TERMS] = {1, 0, 0, 0, (double)w->num_decoding, w->context};
    for (request = w->chunked; request != NOBODY && budget > 0; request = run->next[request]) {
        int64_t start = run->done[request], left = run->num_input[request] - start;
        int64_t count = left < budget ? left : budget;
        budget -= count;
        terms[1] += count, terms[2] += count * (start + count / 2.0), terms[3] += start + count;
    }
    if (terms[1] == 0 && w->num_decoding == 0) return;
    if (pool->prompts_alone && terms[1] > 0) terms[4] = terms[5] = 0;
    w->busy = 1;
    w->num_planned = (int64_t)terms[4];
    w->planned_tokens = terms[1];
    w->took_s = step_s(&pool->cost, terms);
    if (pool->cost.spread > 0 && w->took_s > 0) w->took_s = scattered_s(run, &pool->cost, w->took_s);
    push(run, &run->events, run->now_s + w->took_s, (int32_t)(w - run->workers), NOBODY);
}

// Bytes leave a writer one after the other, and come in one after the other.
static double ship(Run *run, Worker *w, int32_t request, double tokens) {
    Worker *reader = &run->workers[run->reader[request]];
    double nbytes = tokens * run->fleet->kv_token_nbytes;
    double begin_s = fmax(run->now_s, w->link_free_s);
    w->link_free_s = begin_s + nbytes / run->fleet->out_bytes_per_s;
    reader->link_free_s = fmax(begin_s, reader->link_free_s) + nbytes / run->fleet->in_bytes_per_s;
    return fmax(w->link_free_s, reader->link_free_s) + 2 * run->fleet->round_trip_s;
}

static void leave(Run *run, Worker *w, int32_t request) {
    w->kv_used -= kept_tokens(run, w, request);
    w->num_requests--;
    rank(run, w);
}

static void answered(Run *run, Worker *w, int32_t request) {
    run->result->end_s[request] = run->now_s;
    leave(run, w, request);
}

// Where a decode worker computes the prompt itself, all who are there wait for it, which weighs more (gateway/costs.py).
// What that costs more than shipping it.
static double more_alone_s(const Run *run, const Worker *writer, const Worker *reader, int32_t request) {
    const Fleet *fleet = run->fleet;
    if (!fleet->decode_computes) return INFINITY;
    double tokens = (double)uncached(run, request), stalled = fmax(1, fleet->stall_weight * reader->num_requests);
    double nbytes = run->num_input[request] * fleet->kv_token_nbytes;
    double ship_s = nbytes / fmin(fleet->out_bytes_per_s, fleet->in_bytes_per_s) + 2 * fleet->round_trip_s;
    return queue_s(run, reader) + tokens * fleet->token_s[1] * (1 + stalled) -
           (queue_s(run, writer) + tokens * fleet->token_s[0] + ship_s);
}

static int fits(const Run *run, const Worker *reader, int32_t request) {
    return reader->kv_used + kept_tokens(run, reader, request) <= reader->pool->kv_tokens;
}

// In place of the best, where it costs no more than those behind would lose by waiting for that (gateway/admission.py).
static int is_worth(const Run *run, double more_s, double queued_s) { return more_s <= (run->line.num - 1) * queued_s; }

// Of a colocated fleet.
static Worker *with_room(const Run *run, Worker *best) {
    double queued_s = queue_s(run, best);
    if (queued_s <= run->fleet->max_queue_s) return best;
    int64_t other = least(run, 3);
    double more_s = run->keys[3][run->leaves[3] + other] - run->keys[1][run->leaves[1] + (best - run->workers)];
    return is_worth(run, more_s, queued_s) ? &run->workers[other] : best;
}

static Worker *who_computes(const Run *run, Worker *writer, Worker *reader, int32_t request) {
    double more_s = more_alone_s(run, writer, reader, request), most_s = run->fleet->max_queue_s;
    Worker *best = more_s < 0 ? reader : writer, *other = more_s < 0 ? writer : reader;
    double queued_s = queue_s(run, best);
    if (queued_s <= most_s || queue_s(run, other) > most_s) return best;
    return is_worth(run, fabs(more_s), queued_s) ? other : best;
}

// The gateway's (gateway/admission.py): the first, by when it is due, goes where it would be best off, once there is room.
static void serve_line(Run *run) {
    while (run->line.num) {
        int32_t request = run->line.items[0].request;
        Worker *reader = &run->workers[run->num_writers + least(run, 1)];
        if (!run->num_writers) reader = with_room(run, reader);
        if (!fits(run, reader, request)) reader = &run->workers[run->num_writers + least(run, 2)];
        Worker *computer = reader;
        if (run->num_writers) computer = who_computes(run, &run->workers[least(run, 0)], reader, request);
        if (queue_s(run, computer) > run->fleet->max_queue_s) return;
        if (!fits(run, reader, request)) return;
        pop(&run->line);
        send(run, reader, computer, request);
    }
}

static void end_step(Run *run, Worker *w) {
    Result *result = run->result;
    int64_t index = w - run->workers, num_fresh = 0;
    w->busy = 0;
    result->busy_s[index] += w->took_s;
    result->prefill_tokens[index] += w->planned_tokens;
    result->decode_tokens[index] += (double)w->num_planned;
    result->num_steps++;
    if (w->num_planned) {
        w->steps++;
        w->context += (double)w->num_planned;
        // Steps of prompts alone before it are part of the gap.
        double step_gap_s = w->stalled_s + w->took_s;
        int is_slow = step_gap_s > run->fleet->itl_bound_s;
        w->num_slow += is_slow;
        while (w->fresh != NOBODY) {
            int32_t request = take(run, &w->fresh);
            double gap_s = run->now_s - result->first_s[request];
            result->second_s[request] = run->now_s;
            count_gap(run, gap_s, 1);
            // Its own first gap, which holds the transfer, in place of the step's.
            run->slow_before[request] = (int32_t)(w->num_slow - (gap_s > run->fleet->itl_bound_s));
            num_fresh++;
        }
        if (w->num_planned > num_fresh) count_gap(run, step_gap_s, (double)(w->num_planned - num_fresh));
        w->stalled_s = 0;
        while (w->num_decoding && w->heap[0].finish <= w->steps) {
            int32_t request = pop_finish(w);
            w->context -= (double)run->num_input[request] + run->num_output[request];
            result->num_slow[request] = (int32_t)w->num_slow - run->slow_before[request];
            answered(run, w, request);
        }
    } else w->stalled_s += w->num_decoding ? w->took_s : 0;
    double left = w->planned_tokens;
    int32_t request = w->chunked;
    while (left > 0) {
        int32_t following = run->next[request];
        double count = fmin(left, run->num_input[request] - run->done[request]);
        int is_first = run->done[request] == run->num_cached[request];
        left -= count;
        run->done[request] += (int32_t)count;
        double there_s = 0;
        // What the cache held is written too.
        if (w->is_writer && run->num_output[request] > 1)
            there_s = ship(run, w, request, count + (is_first ? run->num_cached[request] : 0));
        if (run->done[request] == run->num_input[request]) {
            w->chunked = following;
            w->num_chunked--;
            result->first_s[request] = run->now_s;
            unqueue(run, w, request);
            int goes_on = run->num_output[request] > 1;
            if (w->is_writer && goes_on) {
                push(run, &run->events, there_s, (int32_t)index, request);
            } else {
                if (w->is_writer) leave(run, w, request);
                if (!goes_on) answered(run, &run->workers[run->reader[request]], request);
                else append(run, &w->incoming, &w->incoming_last, request);
            }
        }
        request = following;
    }
    start_step(run, w);
    serve_line(run);
}

static void arrive(Run *run, int32_t request) {
    const Fleet *fleet = run->fleet;
    int ever_fits = run->num_input[request] + (int64_t)run->num_output[request] <= fleet->decode.kv_tokens &&
                    (!run->num_writers || run->num_input[request] <= fleet->prefill.kv_tokens);
    if (!ever_fits) {
        run->result->first_s[request] = run->result->end_s[request] = run->result->second_s[request] = INFINITY;
        return;
    }
    double work_s = (double)uncached(run, request) * fleet->token_s[!run->num_writers];
    push(run, &run->line, run->now_s + fleet->patience * work_s, NOBODY, request);
    serve_line(run);
}

static int64_t leaves_for(int64_t count) {
    int64_t leaves = 1;
    while (leaves < count) leaves *= 2;
    return leaves;
}

static int settled(const Run *run) {
    if (run->line.num) return 0;
    for (int64_t i = 0; i < run->num_all; i++) {
        const Worker *w = &run->workers[i];
        if (w->kv_used || w->num_requests || w->num_decoding || w->num_chunked || w->busy || w->waiting != NOBODY ||
            w->incoming != NOBODY || w->fresh != NOBODY || fabs(w->context) > 0.5 || fabs(w->queued_tokens) > 0.5)
            return 0;
    }
    return 1;
}

// 0: all were answered and nothing is held.  1: out of memory.  2: something was left, which is a bug.
__attribute__((visibility("default"))) int kvp_run(const Fleet *fleet, int64_t num_requests, const double *arrive_s,
                                                   const int32_t *num_input, const int32_t *num_output,
                                                   const int32_t *num_cached, Result *result) {
    Run run = {.fleet = fleet, .arrive_s = arrive_s, .num_input = num_input, .num_output = num_output,
               .num_cached = num_cached, .result = result, .num_writers = fleet->prefill.num_workers,
               .num_all = fleet->prefill.num_workers + fleet->decode.num_workers};
    run.workers = calloc(run.num_all, sizeof *run.workers);
    run.next = calloc(num_requests + 1, sizeof *run.next);
    run.done = calloc(num_requests + 1, sizeof *run.done);
    run.reader = calloc(num_requests + 1, sizeof *run.reader);
    run.slow_before = calloc(num_requests + 1, sizeof *run.slow_before);
    for (int which = 0; which < NUM_KEYS; which++) {
        run.leaves[which] = leaves_for(which ? fleet->decode.num_workers : fleet->prefill.num_workers);
        run.keys[which] = malloc(2 * run.leaves[which] * sizeof(double));
        run.failed |= !run.keys[which];
    }
    run.failed |= !run.workers || !run.next || !run.done || !run.reader || !run.slow_before;
    if (!run.failed) {
        for (int which = 0; which < NUM_KEYS; which++)
            for (int64_t i = 0; i < 2 * run.leaves[which]; i++) run.keys[which][i] = INFINITY;
        for (int64_t i = 0; i < run.num_all; i++) {
            Worker *w = &run.workers[i];
            w->is_writer = i < run.num_writers;
            w->pool = w->is_writer ? &fleet->prefill : &fleet->decode;
            w->waiting = w->chunked = w->incoming = w->fresh = NOBODY;
            rank(&run, w);
        }
        memcpy(run.done, num_cached, num_requests * sizeof *run.done);
    }
    int64_t next = 0;
    while (!run.failed && (next < num_requests || run.events.num)) {
        if (next < num_requests && (!run.events.num || arrive_s[next] <= run.events.items[0].at_s)) {
            run.now_s = arrive_s[next];
            arrive(&run, (int32_t)next++);
            continue;
        }
        Event event = pop(&run.events);
        run.now_s = event.at_s;
        Worker *w = &run.workers[event.worker];
        if (event.request == NOBODY) {
            end_step(&run, w);
        } else if (run.done[event.request] < run.num_input[event.request]) {
            has_come(&run, w, event.request);
        } else {  // written and committed
            Worker *reader = &run.workers[run.reader[event.request]];
            leave(&run, w, event.request);
            append(&run, &reader->incoming, &reader->incoming_last, event.request);
            start_step(&run, reader);
            start_step(&run, w);
            serve_line(&run);
        }
    }
    result->end_of_all_s = run.now_s;
    int status = run.failed ? 1 : settled(&run) ? 0 : 2;
    for (int64_t i = 0; run.workers && i < run.num_all; i++) free(run.workers[i].heap);
    free(run.workers), free(run.next), free(run.done), free(run.reader), free(run.slow_before);
    free(run.events.items), free(run.line.items);
    for (int which = 0; which < NUM_KEYS; which++) free(run.keys[which]);
    return status;
}
