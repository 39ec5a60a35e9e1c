/* The transport's thread: batches of one-sided operations, over UCP or into mapped memory.
 *
 * UCP wants every call on a worker to come from one thread, and a copy takes the thread that does it.  So one C thread
 * owns the worker: callers hand it whole batches and never wait for bytes.  Completions collect in a list and raise an
 * eventfd, which an event loop can watch without polling.
 * Every handle is used by one caller at a time and not after it was given back; the caller (ucp.py) holds to that.
 *
 * Memory of a peer on the same host is mapped here (segments.py) and written by plain stores.  The mapping keeps its pages
 * when the peer dies, so a death can neither abort nor fault the survivor (CMA in UCX's default error mode does).
 * Everything else goes through put/get and a flush on an endpoint in PEER error mode, where a death arrives as an error
 * code.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "copy.h"
#include "ferry.h"

#define SLICE_BYTES (4u << 20) /* A job yields to the others after this much: no peer waits for another's batch. */
#define PIECE_BYTES (1u << 18) /* The largest single copy or operation: a cancel takes effect between two. */
#define WINDOW 64              /* Operations of one job that UCP may hold: a cancel has to wait for these. */
#define PROGRESS_TURNS 64      /* Calls into UCP before jobs and callers get their turn again. */
#define IDLE_POLL_MS 500
#define STREAM_BYTES (256u << 10) /* Batches from this size on bypass the cache. */
#define INLINE_BYTES (1u << 20)   /* Up to this, whoever posts copies: at most 0.1 ms, and no thread is woken. */

enum turn { ALL_STARTED, MORE_TO_START, WAITS };

uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void ring(int fd)
{
    uint64_t one = 1;
    ssize_t ignored = write(fd, &one, sizeof one);
    (void)ignored; /* a full eventfd is already readable */
}

static void hush(int fd)
{
    uint64_t count;
    ssize_t ignored = read(fd, &count, sizeof count);
    (void)ignored;
}

/* What is known of the owner.  A pidfd is readable once no thread of its process runs any more. */
static ucs_status_t owner_status(remote_t *remote)
{
    if (!remote->mapped) return atomic_load(&remote->peer->status);
    if (*remote->mark != remote->incarnation) return UCS_ERR_CONNECTION_RESET;
    struct pollfd process = {.fd = remote->process, .events = POLLIN};
    return poll(&process, 1, 0) > 0 ? UCS_ERR_CONNECTION_RESET : UCS_OK;
}

static void copy(job_t *job, char *here, char *there, uint64_t length)
{
    char *to = job->op == OP_WRITE ? there : here, *from = job->op == OP_WRITE ? here : there;
    if (job->total >= STREAM_BYTES) copy_streaming(to, from, length);
    else memcpy(to, from, length);
}

/* Copies or posts up to one slice. */
static enum turn start_slice(job_t *job)
{
    region_t *region = job->region;
    remote_t *remote = job->remote;
    ucs_status_t owner = owner_status(remote);
    for (uint64_t budget = SLICE_BYTES; job->at < job->n;) {
        if (!remote->mapped || *remote->mark != remote->incarnation) owner = owner_status(remote);
        if (job->status == UCS_OK) job->status = owner;
        if (job->cancelled || job->status != UCS_OK) {
            job->cut_short = 1;
            job->at = job->n;
            break;
        }
        if (job->outstanding >= WINDOW) return WAITS;
        if (budget == 0) return MORE_TO_START;
        uint64_t i = job->at, length = job->size[i];
        if (length > PIECE_BYTES) length = PIECE_BYTES;
        if (length > budget) length = budget;
        char *here = region->base + job->local[i];
        if (remote->mapped) {
            copy(job, here, remote->mapped + job->away[i], length);
        } else {
            start_operation(job, here, remote->base + job->away[i], length);
        }
        budget -= length;
        job->nbytes += length;
        job->local[i] += length;
        job->away[i] += length;
        if ((job->size[i] -= length) == 0) job->at++;
    }
    return ALL_STARTED;
}

/* Fills in the completion of a job that has ended. */
static void conclude(job_t *job, int closed)
{
    enum outcome outcome = FAILED;
    ucs_status_t owner = job->status == UCS_OK ? UCS_OK : owner_status(job->remote);
    if (closed) outcome = CLOSED;
    else if (job->status == UCS_OK) outcome = job->cut_short ? CANCELLED : DONE;
    else if (owner == UCS_ERR_CANCELED) outcome = CLOSED; /* shut_down closed its endpoint by force */
    else if (owner != UCS_OK) outcome = PEER_LOST;        /* UCX may call the request CANCELED then */
    else if (job->status == UCS_ERR_CANCELED) outcome = CLOSED;
    copy_fence();
    atomic_thread_fence(memory_order_seq_cst); /* every store is out before anybody hears of it */
    job->completion = (completion_t){.cookie = job->cookie,
                                     .nbytes = job->nbytes,
                                     .num_blocks = job->num_blocks,
                                     .num_pieces = job->n,
                                     .queued_ns = job->t_start_ns - job->t_post_ns,
                                     .busy_ns = now_ns() - job->t_start_ns,
                                     .outcome = outcome,
                                     .status = job->status,
                                     .path = job->remote->mapped ? PATH_MAPPED : PATH_RMA};
}

static void finish(ferry_t *f, job_t *job, int closed)
{
    conclude(job, closed);
    job->next = NULL;
    pthread_mutex_lock(&f->lock);
    *f->done_tail = job;
    f->done_tail = &job->next;
    pthread_mutex_unlock(&f->lock);
    ring(f->event_fd);
}

/* An owner whose process hangs while its kernel still answers ends nothing and fails nothing: nobody waits for it for
 * ever.  What was sent may arrive when it goes on. */
static void drop_stalled(ferry_t *f, peer_t *peer)
{
    if (peer->outstanding == 0 || now_ns() - peer->heard_ns < f->stall_ns) return;
    int fine = UCS_OK;
    atomic_compare_exchange_strong(&peer->status, &fine, UCS_ERR_ENDPOINT_TIMEOUT);
    close_endpoint(f, peer);
}

/* One turn over the active jobs, a slice each.  True while some job could go on without waiting. */
static int advance(ferry_t *f)
{
    int busy = 0;
    for (job_t **link = &f->active, *job; (job = *link) != NULL;) {
        peer_t *peer = job->remote->peer;
        if (job->t_start_ns == 0) job->t_start_ns = now_ns();
        enum turn turn = start_slice(job);
        busy |= turn == MORE_TO_START;
        /* Also after a cancel: what was posted must land, or fail, before the writer may say that it stopped. */
        if (turn == ALL_STARTED && !job->remote->mapped && !job->flushed && atomic_load(&peer->status) == UCS_OK) {
            start_flush(job);
        }
        if (job->outstanding) drop_stalled(f, peer);
        if (turn == ALL_STARTED && job->outstanding == 0) {
            if (!job->remote->mapped && job->status == UCS_OK) job->status = atomic_load(&peer->status);
            if ((*link = job->next) == NULL) f->active_tail = link;
            finish(f, job, 0);
        } else {
            link = &job->next;
        }
    }
    return busy;
}

static ucs_status_t cancel_job(ferry_t *f, uint64_t cookie)
{
    for (job_t *job = f->active; job; job = job->next)
        if (job->cookie == cookie) job->cancelled = 1;
    return UCS_OK; /* a job that is not there has ended, which its completion tells */
}

static ucs_status_t run_call(ferry_t *f, call_t *c)
{
    switch (c->command) {
    case CMD_CONNECT: return connect_peer(f, c);
    case CMD_DISCONNECT: return disconnect_peer(f, c->in);
    case CMD_IMPORT: return import_remote(f, c);
    case CMD_DROP: return drop_remote(f, c->in);
    case CMD_ABANDON: return abandon_remote(f, c->in);
    case CMD_REGISTER: return register_region(f, c);
    case CMD_RELEASE: return release_region(f, c->in);
    case CMD_PACK: return pack_region(f, c);
    case CMD_CANCEL: return cancel_job(f, c->a);
    }
    return UCS_ERR_INVALID_PARAM;
}

/* Takes what callers left, jobs before calls: a call sees every job that was posted before it was made.  Returns whether
 * the ferry is stopping; nothing comes in after that. */
static int take_in(ferry_t *f)
{
    pthread_mutex_lock(&f->lock);
    if (f->inbox) {
        *f->active_tail = f->inbox;
        f->active_tail = f->inbox_tail;
        f->inbox = NULL;
        f->inbox_tail = &f->inbox;
    }
    call_t *calls = f->calls;
    f->calls = NULL;
    f->calls_tail = &f->calls;
    int stopping = f->stopping;
    pthread_mutex_unlock(&f->lock);
    for (call_t *c = calls, *next; c; c = next) {
        next = c->next;
        ucs_status_t status = run_call(f, c);
        if (c->detached) {
            free(c);
            continue;
        }
        pthread_mutex_lock(&f->lock);
        c->status = status;
        c->finished = 1; /* c lies on its caller's stack: not ours any more once the lock is let go */
        pthread_cond_broadcast(&f->called);
        pthread_mutex_unlock(&f->lock);
    }
    return stopping;
}

/* Cuts the jobs short and waits a bounded time for what UCP holds; endpoints that do not answer are then closed by force,
 * which fails their requests.  What is still there after that can no longer be waited for. */
static void shut_down(ferry_t *f)
{
    for (int forced = 0; forced < 2 && f->active; forced++) {
        uint64_t end = now_ns() + CLOSE_TIMEOUT_NS;
        for (job_t *job = f->active; job; job = job->next) {
            job->cancelled = 1;
            if (forced && !job->remote->mapped) {
                int fine = UCS_OK;
                atomic_compare_exchange_strong(&job->remote->peer->status, &fine, UCS_ERR_CANCELED);
                close_endpoint(f, job->remote->peer);
            }
        }
        while (advance(f), f->active && now_ns() < end) {
            atomic_fetch_add(&f->turns, 1);
            ucp_worker_progress(f->worker);
        }
    }
    close_worker(f);
    for (job_t *job = f->active, *next; job; job = next) {
        next = job->next;
        finish(f, job, 1);
    }
    f->active = NULL;
    while (f->peers) {
        peer_t *peer = f->peers;
        f->peers = peer->next;
        free(peer);
    }
}

static void note_quiet(ferry_t *f)
{
    pthread_mutex_lock(&f->lock);
    f->num_quiet++;
    pthread_cond_broadcast(&f->called);
    pthread_mutex_unlock(&f->lock);
}

static void *run(void *arg)
{
    ferry_t *f = arg;
    atomic_store(&f->tid, gettid());
    struct pollfd fds[2] = {{.fd = f->wake_fd, .events = POLLIN}, {.fd = f->worker_fd, .events = POLLIN}};
    while (!take_in(f)) {
        atomic_fetch_add(&f->turns, 1);
        int busy = advance(f);
        for (int i = 0; i < PROGRESS_TURNS && ucp_worker_progress(f->worker); i++) busy = 1;
        if (busy || ucp_worker_arm(f->worker) == UCS_ERR_BUSY) continue;
        note_quiet(f);
        poll(fds, 2, IDLE_POLL_MS);
        hush(f->wake_fd);
    }
    shut_down(f);
    return NULL;
}

/* With the lock held.  False when the ferry is stopping. */
static int enqueue(ferry_t *f, call_t *c)
{
    if (f->stopping) return 0;
    *f->calls_tail = c;
    f->calls_tail = &c->next;
    ring(f->wake_fd);
    return 1;
}

static ucs_status_t call(ferry_t *f, call_t *c)
{
    c->status = UCS_ERR_CANCELED;
    pthread_mutex_lock(&f->lock);
    if (enqueue(f, c))
        while (!c->finished) pthread_cond_wait(&f->called, &f->lock);
    pthread_mutex_unlock(&f->lock);
    return c->status;
}

/* What Python calls.  Statuses are ucs_status_t, negative on failure. */
#pragma GCC visibility push(default)

/* event_fd, a non-blocking eventfd that stays the caller's, becomes readable when there is something to drain.  A peer
 * that ends no request for stall_ms counts as lost. */
int kvf_open(int event_fd, uint64_t stall_ms, ferry_t **out)
{
    ferry_t *f = calloc(1, sizeof *f);
    if (!f) return UCS_ERR_NO_MEMORY;
    pthread_mutex_init(&f->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&f->called, &monotonic);
    pthread_condattr_destroy(&monotonic);
    f->calls_tail = &f->calls;
    f->inbox_tail = &f->inbox;
    f->active_tail = &f->active;
    f->done_tail = &f->done;
    f->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    f->event_fd = event_fd;
    f->stall_ns = stall_ms * 1000000;
    ucs_status_t status = UCS_ERR_IO_ERROR;
    if (f->wake_fd < 0) goto fail;
    if ((status = open_ucp(f)) != UCS_OK) goto fail;
    status = UCS_ERR_NO_MEMORY;
    if (pthread_create(&f->thread, NULL, run, f)) goto fail_ucp;
    pthread_setname_np(f->thread, "kvferry-ferry"); /* for whoever looks for it in top, or in a debugger */
    *out = f;
    return UCS_OK;
fail_ucp:
    close_worker(f);
    close_context(f);
fail:
    if (f->wake_fd >= 0) close(f->wake_fd);
    free(f);
    return status;
}

/* Ends every job, its completion is there to drain, and then the thread.  Calls that need it fail from now on.  Bounded:
 * a few times CLOSE_TIMEOUT_NS at worst, when peers do not answer. */
void kvf_stop(ferry_t *f)
{
    pthread_mutex_lock(&f->lock);
    f->stopping = 1;
    pthread_mutex_unlock(&f->lock);
    ring(f->wake_fd);
    pthread_join(f->thread, NULL);
    f->stopped = 1;
}

/* After kvf_stop and the last drain.  Memory of regions not released stays until the process ends. */
void kvf_free(ferry_t *f)
{
    close_context(f);
    while (f->done) {
        job_t *job = f->done;
        f->done = job->next;
        free(job);
    }
    close(f->wake_fd);
    pthread_cond_destroy(&f->called);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

uint64_t kvf_address(ferry_t *f, void *out, uint64_t capacity)
{
    if (f->address_length <= capacity) memcpy(out, f->address, f->address_length);
    return f->address_length;
}

/* Memory that stays the caller's, for peers to reach and as the near side of transfers: nbytes of it, with what lies
 * behind them registered too, up to mapped_nbytes. */
int kvf_register(ferry_t *f, void *base, uint64_t nbytes, uint64_t mapped_nbytes, region_t **out)
{
    call_t c = {.command = CMD_REGISTER, .in = base, .a = nbytes, .length = mapped_nbytes};
    int status = call(f, &c);
    if (status == UCS_OK) *out = c.out;
    return status;
}

/* Also after kvf_stop, when no thread is left to do it. */
int kvf_release(ferry_t *f, region_t *region)
{
    if (f->stopped) return release_region(f, region);
    call_t c = {.command = CMD_RELEASE, .in = region};
    return call(f, &c);
}

int kvf_pack(ferry_t *f, region_t *region, void *out, uint64_t *length)
{
    call_t c = {.command = CMD_PACK, .in = region, .out = out, .length = *length};
    int status = call(f, &c);
    *length = c.length;
    return status;
}

int kvf_connect(ferry_t *f, void *address, uint64_t incarnation, peer_t **out)
{
    call_t c = {.command = CMD_CONNECT, .in = address, .a = incarnation};
    int status = call(f, &c);
    if (status == UCS_OK) *out = c.out;
    return status;
}

/* UCS_OK, or why the peer counts as lost.  Any thread, no waiting. */
int kvf_peer_status(peer_t *peer) { return atomic_load(&peer->status); }

int kvf_disconnect(ferry_t *f, peer_t *peer)
{
    call_t c = {.command = CMD_DISCONNECT, .in = peer};
    return call(f, &c);
}

/* A region of a connected peer.  The first one asks the peer for its mark, mark_offset behind base: kvf_wait_peer tells
 * the answer. */
int kvf_import(ferry_t *f, peer_t *peer, void *rkey, uint64_t base, uint64_t nbytes, uint64_t mark_offset, remote_t **out)
{
    call_t c = {.command = CMD_IMPORT, .in = rkey, .out = peer, .a = base, .b = nbytes, .length = mark_offset};
    int status = call(f, &c);
    if (status == UCS_OK) *out = c.out;
    return status;
}

/* UCS_OK once the peer has answered, or why it counts as lost.  Blocks, at most timeout_ms; holds up nobody else. */
int kvf_wait_peer(ferry_t *f, peer_t *peer, uint64_t timeout_ms)
{
    uint64_t end_ns = now_ns() + timeout_ms * 1000000;
    struct timespec end = {.tv_sec = end_ns / 1000000000, .tv_nsec = end_ns % 1000000000};
    pthread_mutex_lock(&f->lock);
    while (!peer->settled && !pthread_cond_timedwait(&f->called, &f->lock, &end)) {}
    int status = peer->settled ? atomic_load(&peer->status) : UCS_ERR_TIMED_OUT;
    pthread_mutex_unlock(&f->lock);
    return status;
}

/* UCS_OK once everything that the network had brought to this host when it was called lies in its region: of a writer that
 * has ended on this host, nothing comes after.  Blocks, at most timeout_ms. */
int kvf_fence(ferry_t *f, uint64_t timeout_ms)
{
    uint64_t end_ns = now_ns() + timeout_ms * 1000000;
    struct timespec end = {.tv_sec = end_ns / 1000000000, .tv_nsec = end_ns % 1000000000};
    pthread_mutex_lock(&f->lock);
    uint64_t enough = f->num_quiet + 2; /* the first may have been found quiet before the call */
    int late = 0;
    while (f->num_quiet < enough && !f->stopping && !late) {
        ring(f->wake_fd);
        late = pthread_cond_timedwait(&f->called, &f->lock, &end);
    }
    int status = f->num_quiet >= enough ? UCS_OK : UCS_ERR_TIMED_OUT;
    pthread_mutex_unlock(&f->lock);
    return status;
}

/* Gives a region back whose peer has not answered; the peer counts as lost from now on. */
int kvf_abandon(ferry_t *f, remote_t *remote)
{
    call_t c = {.command = CMD_ABANDON, .in = remote};
    return call(f, &c);
}

/* A region that the caller has mapped: mark holds incarnation until its owner gives it up, process is a pidfd of it. */
int kvf_map(void *mapped, uint64_t nbytes, void *mark, uint64_t incarnation, int process, remote_t **out)
{
    remote_t *remote = calloc(1, sizeof *remote);
    if (!remote) return UCS_ERR_NO_MEMORY;
    *remote = (remote_t){.mapped = mapped, .nbytes = nbytes, .mark = mark, .incarnation = incarnation, .process = process};
    *out = remote;
    return UCS_OK;
}

/* Also after kvf_stop, for mapped ones: those of peers are gone by then. */
int kvf_drop(ferry_t *f, remote_t *remote)
{
    if (f->stopped) return drop_remote(f, remote);
    call_t c = {.command = CMD_DROP, .in = remote};
    return call(f, &c);
}

/* Hands one batch to the thread and returns; a small one into mapped memory is done at once, and *done then holds its
 * completion instead of a zero cookie.  packed is copied: n local offsets, n of the remote, num_sizes sizes, one for all
 * pieces or one each; neighbours on both sides become one operation.  UCS_ERR_INVALID_PARAM when any piece lies outside either region:
 * nothing is started then. */
int kvf_post(ferry_t *f, int op, region_t *region, remote_t *remote, const uint64_t *packed, uint64_t n, uint64_t num_sizes,
             uint64_t cookie, completion_t *done)
{
    const uint64_t *local = packed, *away = packed + n, *size = packed + 2 * n;
    uint64_t step = num_sizes == 1 ? 0 : 1;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t length = size[i * step];
        if (length > region->nbytes || local[i] > region->nbytes - length || length > remote->nbytes ||
            away[i] > remote->nbytes - length)
            return UCS_ERR_INVALID_PARAM;
    }
    job_t *job = malloc(sizeof *job + 3 * n * sizeof *job->arrays);
    if (!job) return UCS_ERR_NO_MEMORY;
    *job = (job_t){
        .op = op, .cookie = cookie, .region = region, .remote = remote, .num_blocks = n, .t_post_ns = now_ns()};
    job->local = job->arrays;
    job->away = job->arrays + n;
    job->size = job->arrays + 2 * n;
    uint64_t m = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t length = size[i * step];
        if (length == 0) continue;
        job->total += length;
        if (m && job->local[m - 1] + job->size[m - 1] == local[i] && job->away[m - 1] + job->size[m - 1] == away[i]) {
            job->size[m - 1] += length;
            continue;
        }
        job->local[m] = local[i];
        job->away[m] = away[i];
        job->size[m++] = length;
    }
    job->n = m;
    done->cookie = 0;
    if (remote->mapped && job->total <= INLINE_BYTES) {
        job->t_start_ns = job->t_post_ns;
        start_slice(job);
        conclude(job, 0);
        *done = job->completion;
        free(job);
        return UCS_OK;
    }
    pthread_mutex_lock(&f->lock);
    int stopping = f->stopping;
    if (!stopping) {
        *f->inbox_tail = job;
        f->inbox_tail = &job->next;
        ring(f->wake_fd);
    }
    pthread_mutex_unlock(&f->lock);
    if (stopping) free(job);
    return stopping ? UCS_ERR_CANCELED : UCS_OK;
}

/* Asks a job to stop at its next piece, without waiting; its completion still comes. */
int kvf_cancel(ferry_t *f, uint64_t cookie)
{
    call_t *c = calloc(1, sizeof *c);
    if (!c) return UCS_ERR_NO_MEMORY;
    c->command = CMD_CANCEL;
    c->a = cookie;
    c->detached = 1;
    pthread_mutex_lock(&f->lock);
    int taken = enqueue(f, c);
    pthread_mutex_unlock(&f->lock);
    if (!taken) free(c);
    return UCS_OK;
}

/* Grows while the thread goes on: a turn takes IDLE_POLL_MS at most where there is nothing to do.  0 once the thread has
 * ended.  Any thread, no waiting. */
uint64_t kvf_turns(ferry_t *f)
{
    int tid = atomic_load(&f->tid); /* 0 before its first turn */
    return tid && syscall(SYS_tgkill, getpid(), tid, 0) ? 0 : 1 + atomic_load(&f->turns);
}

/* Moves up to capacity completions out and clears the eventfd, unless some are left. */
uint64_t kvf_drain(ferry_t *f, completion_t *out, uint64_t capacity)
{
    uint64_t n = 0;
    hush(f->event_fd);
    pthread_mutex_lock(&f->lock);
    while (f->done && n < capacity) {
        job_t *job = f->done;
        if ((f->done = job->next) == NULL) f->done_tail = &f->done;
        out[n++] = job->completion;
        free(job);
    }
    if (f->done) ring(f->event_fd);
    pthread_mutex_unlock(&f->lock);
    return n;
}

/* What ctypes believes of the struct it reads must be what was compiled. */
uint64_t kvf_completion_size(void) { return sizeof(completion_t); }

const char *kvf_status_string(int status) { return ucs_status_string(status); }

void kvf_version(unsigned *major, unsigned *minor, unsigned *release) { ucp_get_version(major, minor, release); }
