/* All that UCP is asked to do: one-sided operations, connections and registered memory.
 *
 * UCP wants every call on a worker to come from one thread: that of ferry.c makes them, save where ferry.h says otherwise.
 * Endpoints are in PEER error mode, where a death arrives as an error code; in the default mode survivors may abort.
 * Compiled against the headers of the UCX in use: no struct layout is written down twice.
 */
#include <stdlib.h>
#include <string.h>

#include "ferry.h"

#define DRAIN_TURNS 100000

static void on_peer_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    atomic_store(&((peer_t *)arg)->status, status);
}

static void on_request(void *request, ucs_status_t status, void *arg)
{
    job_t *job = arg;
    if (status != UCS_OK && job->status == UCS_OK) job->status = status;
    job->outstanding--;
    job->remote->peer->outstanding--;
    job->remote->peer->heard_ns = now_ns();
    ucp_request_free(request);
}

static void settle(peer_t *peer, ucs_status_t status)
{
    int fine = UCS_OK;
    atomic_compare_exchange_strong(&peer->status, &fine, status);
    pthread_mutex_lock(&peer->ferry->lock);
    peer->settled = 1;
    pthread_cond_broadcast(&peer->ferry->called);
    pthread_mutex_unlock(&peer->ferry->lock);
}

/* Where another process has taken the owner's address, it answers too, but with another mark. */
static void on_answer(peer_t *peer, ucs_status_t status)
{
    settle(peer, status == UCS_OK && peer->answer != peer->incarnation ? UCS_ERR_CONNECTION_RESET : status);
}

static void on_probed(void *request, ucs_status_t status, void *arg)
{
    on_answer(arg, status);
    ucp_request_free(request);
}

static void track(job_t *job, ucs_status_ptr_t request)
{
    if (UCS_PTR_IS_ERR(request)) {
        if (job->status == UCS_OK) job->status = UCS_PTR_STATUS(request);
    } else if (request != NULL) {
        peer_t *peer = job->remote->peer;
        if (peer->outstanding++ == 0) peer->heard_ns = now_ns();
        job->outstanding++;
    }
}

void start_operation(job_t *job, char *here, uint64_t there, uint64_t length)
{
    region_t *region = job->region;
    remote_t *remote = job->remote;
    /* The handle and the memory's type, which UCP would otherwise look up for each operation. */
    ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                             UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                             .cb.send = on_request,
                             .user_data = job,
                             .memory_type = region->memory_type,
                             .memh = region->memh};
    track(job, job->op == OP_WRITE ? ucp_put_nbx(remote->peer->ep, here, length, there, remote->rkey, &p)
                                   : ucp_get_nbx(remote->peer->ep, here, length, there, remote->rkey, &p));
}

/* A put that has ended locally may still be on its way; behind the flush it is in place. */
void start_flush(job_t *job)
{
    ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                             .cb.send = on_request,
                             .user_data = job};
    track(job, ucp_ep_flush_nbx(job->remote->peer->ep, &p));
    job->flushed = 1;
}

void close_endpoint(ferry_t *f, peer_t *peer)
{
    if (peer->ep == NULL) return;
    ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
    ucs_status_ptr_t request = ucp_ep_close_nbx(peer->ep, &p);
    peer->ep = NULL;
    if (UCS_PTR_IS_PTR(request)) {
        uint64_t end = now_ns() + CLOSE_TIMEOUT_NS;
        while (ucp_request_check_status(request) == UCS_INPROGRESS && now_ns() < end) ucp_worker_progress(f->worker);
        ucp_request_free(request);
    }
}

ucs_status_t connect_peer(ferry_t *f, call_t *c)
{
    peer_t *peer = calloc(1, sizeof *peer);
    if (!peer) return UCS_ERR_NO_MEMORY;
    peer->ferry = f;
    peer->incarnation = c->a;
    ucp_ep_params_t p = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                       UCP_EP_PARAM_FIELD_ERR_HANDLER,
                         .address = c->in,
                         .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                         .err_handler = {on_peer_error, peer}};
    ucs_status_t status = ucp_ep_create(f->worker, &p, &peer->ep);
    if (status != UCS_OK) {
        free(peer);
        return status;
    }
    peer->next = f->peers;
    f->peers = peer;
    c->out = peer;
    return UCS_OK;
}

ucs_status_t disconnect_peer(ferry_t *f, peer_t *peer)
{
    for (remote_t *remote = f->remotes; remote; remote = remote->next)
        if (remote->peer == peer) return UCS_ERR_BUSY;
    peer_t **link = &f->peers;
    while (*link != peer) link = &(*link)->next;
    *link = peer->next;
    close_endpoint(f, peer);
    if (!peer->probed || peer->settled) free(peer); /* else UCP still holds its probe: a leak, but no use after free */
    return UCS_OK;
}

/* Reads the owner's mark before anything else.  Only an owner that answers is alive, and only if it answers with its
 * incarnation is it the one that was meant.  It also completes the connection in both directions: over tcp, UCX 1.22
 * crashes the owner when its way back is made while a put streams in. */
static void probe_peer(remote_t *remote, uint64_t mark_offset)
{
    peer_t *peer = remote->peer;
    ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                             .cb.send = on_probed,
                             .user_data = peer};
    peer->probed = 1;
    ucs_status_ptr_t request =
        ucp_get_nbx(peer->ep, &peer->answer, sizeof peer->answer, remote->base + mark_offset, remote->rkey, &p);
    if (!UCS_PTR_IS_PTR(request)) on_answer(peer, UCS_PTR_RAW_STATUS(request));
}

ucs_status_t import_remote(ferry_t *f, call_t *c)
{
    remote_t *remote = calloc(1, sizeof *remote);
    if (!remote) return UCS_ERR_NO_MEMORY;
    remote->peer = c->out;
    remote->base = c->a;
    remote->nbytes = c->b;
    ucs_status_t status = atomic_load(&remote->peer->status);
    if (status == UCS_OK) status = ucp_ep_rkey_unpack(remote->peer->ep, c->in, &remote->rkey);
    if (status != UCS_OK) {
        free(remote);
        return status;
    }
    remote->next = f->remotes;
    f->remotes = remote;
    c->out = remote;
    if (!remote->peer->probed) probe_peer(remote, c->length);
    return UCS_OK;
}

ucs_status_t drop_remote(ferry_t *f, remote_t *remote)
{
    if (is_used(f, NULL, remote)) return UCS_ERR_BUSY;
    if (!remote->mapped) {
        remote_t **link = &f->remotes;
        while (*link != remote) link = &(*link)->next;
        *link = remote->next;
        ucp_rkey_destroy(remote->rkey);
    }
    free(remote);
    return UCS_OK;
}

/* After a probe that failed: UCP may hold the key until the endpoint is closed. */
ucs_status_t abandon_remote(ferry_t *f, remote_t *remote)
{
    int fine = UCS_OK;
    atomic_compare_exchange_strong(&remote->peer->status, &fine, UCS_ERR_TIMED_OUT);
    close_endpoint(f, remote->peer);
    return drop_remote(f, remote);
}

ucs_status_t register_region(ferry_t *f, call_t *c)
{
    region_t *region = calloc(1, sizeof *region);
    if (!region) return UCS_ERR_NO_MEMORY;
    ucp_mem_map_params_t p = {.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
                              .address = c->in,
                              .length = c->length};
    ucp_mem_attr_t attr = {.field_mask = UCP_MEM_ATTR_FIELD_MEM_TYPE};
    ucs_status_t status = ucp_mem_map(f->context, &p, &region->memh);
    if (status == UCS_OK && (status = ucp_mem_query(region->memh, &attr)) != UCS_OK)
        ucp_mem_unmap(f->context, region->memh);
    if (status != UCS_OK) {
        free(region);
        return status;
    }
    region->base = c->in;
    region->nbytes = c->a;
    region->memory_type = attr.mem_type;
    f->num_regions++;
    c->out = region;
    return UCS_OK;
}

ucs_status_t release_region(ferry_t *f, region_t *region)
{
    if (is_used(f, region, NULL)) return UCS_ERR_BUSY;
    /* Over tcp the bytes of a writer that has ended may still lie in a socket: better they land here than in what comes
     * to this address next. */
    for (int i = 0; i < DRAIN_TURNS && !f->stopped && ucp_worker_progress(f->worker); i++) {}
    ucs_status_t status = ucp_mem_unmap(f->context, region->memh);
    f->num_regions--;
    free(region);
    return status;
}

ucs_status_t pack_region(ferry_t *f, call_t *c)
{
    void *packed;
    size_t length;
    ucs_status_t status = ucp_rkey_pack(f->context, ((region_t *)c->in)->memh, &packed, &length);
    if (status != UCS_OK) return status;
    if (length > c->length) status = UCS_ERR_BUFFER_TOO_SMALL;
    else memcpy(c->out, packed, length);
    c->length = length;
    ucp_rkey_buffer_release(packed);
    return status;
}

ucs_status_t open_ucp(ferry_t *f)
{
    /* WAKEUP: a thread that sleeps until the network brings something.  The name shows in UCX's own diagnostics. */
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
                           .features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP,
                           .name = "kvferry"};
    ucp_config_t *config;
    ucs_status_t status = ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) return status;
    status = ucp_init(&params, config, &f->context);
    ucp_config_release(config);
    if (status != UCS_OK) return status;
    /* Serialized: the caller that opens, then the thread, and at the end the caller again. */
    ucp_worker_params_t wp = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                              .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    ucp_address_t *address;
    if ((status = ucp_worker_create(f->context, &wp, &f->worker)) != UCS_OK) goto fail_context;
    if ((status = ucp_worker_get_efd(f->worker, &f->worker_fd)) != UCS_OK) goto fail_worker;
    if ((status = ucp_worker_get_address(f->worker, &address, &f->address_length)) != UCS_OK) goto fail_worker;
    f->address = malloc(f->address_length);
    if (f->address) memcpy(f->address, address, f->address_length);
    ucp_worker_release_address(f->worker, address);
    if (f->address) return UCS_OK;
    status = UCS_ERR_NO_MEMORY;
fail_worker:
    ucp_worker_destroy(f->worker);
fail_context:
    ucp_cleanup(f->context);
    return status;
}

void close_worker(ferry_t *f)
{
    while (f->remotes) {
        remote_t *remote = f->remotes;
        f->remotes = remote->next;
        ucp_rkey_destroy(remote->rkey);
        remote->rkey = NULL;
        if (!f->active) free(remote);
    }
    for (peer_t *peer = f->peers; peer; peer = peer->next) close_endpoint(f, peer);
    ucp_worker_destroy(f->worker);
}

/* Regions that were not released keep the context: their memory stays until the process ends. */
void close_context(ferry_t *f)
{
    if (f->num_regions == 0) ucp_cleanup(f->context);
    free(f->address);
}
