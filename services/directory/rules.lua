-- The directory's rules where several replicas share one Redis: each call is one step that nothing comes between.
-- core.py says the same for the store in memory, and the tests hold one against the other.
--
-- KEYS[1]  prefix of all keys
-- ARGV[1]  what to do; what follows is its own
--
-- <prefix>head            revision of the last entry of the log: microseconds since 1970, or one more than before
-- <prefix>log             stream of what happened, entry <revision>-0, each naming the revision before it
-- <prefix>log_nbytes      of the entries that the log still has
-- <prefix>workers         set of the ids of all who are registered
-- <prefix>worker:<id>     what is known of one
-- <prefix>lease:<lease>   its id, for as long as the lease holds
-- <prefix>blocks:<id>     its block events since it last held nothing
-- <prefix>pulse           when the leases were last looked at

local prefix = KEYS[1]
local head_key, log_key, nbytes_key = prefix .. 'head', prefix .. 'log', prefix .. 'log_nbytes'
local workers_key, pulse_key = prefix .. 'workers', prefix .. 'pulse'

-- What an entry without payload is taken to need.
local ENTRY_NBYTES = 256
local MAX_REPLACED = 16
-- Some replica looks every half second.  After a longer pause the store was away, and nobody could renew.
local MAX_PULSE_US = 2500000

local function worker_key(id) return prefix .. 'worker:' .. id end
local function blocks_key(id) return prefix .. 'blocks:' .. id end
local function lease_key(lease) return prefix .. 'lease:' .. lease end

local function whole(number) return string.format('%.0f', number) end

local function now_us()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000000 + tonumber(now[2])
end

local function head()
  local found = redis.call('GET', head_key)
  if not found then
    found = whole(now_us())
    redis.call('SET', head_key, found)
  end
  return found
end

local function append(limits, payload_nbytes, ...)
  local previous = head()
  local revision = whole(math.max(tonumber(previous) + 1, now_us()))
  local nbytes = ENTRY_NBYTES + payload_nbytes
  redis.call('XADD', log_key, revision .. '-0', 'previous', previous, 'nbytes', nbytes, ...)
  redis.call('SET', head_key, revision)
  local total = redis.call('INCRBY', nbytes_key, nbytes)
  local length = redis.call('XLEN', log_key)
  while length > 1 and (length > limits.entries or total > limits.nbytes) do
    local oldest = redis.call('XRANGE', log_key, '-', '+', 'COUNT', 1)[1]
    redis.call('XDEL', log_key, oldest[1])
    total = redis.call('DECRBY', nbytes_key, oldest[2][4])
    length = length - 1
  end
end

-- Everybody whose lease ran out while the store was away has a lease's time to return.
local function feel_pulse()
  local now = now_us()
  local last = tonumber(redis.call('GET', pulse_key) or '0')
  if now - last > MAX_PULSE_US then
    for _, id in ipairs(redis.call('SMEMBERS', workers_key)) do
      local known = redis.call('HMGET', worker_key(id), 'lease', 'ttl_ms')
      redis.call('SET', lease_key(known[1]), id, 'PX', known[2], 'NX')
    end
    redis.call('SET', pulse_key, whole(now))
  end
end

local function remove(limits, id, reason)
  local known = redis.call('HMGET', worker_key(id), 'incarnation', 'lease')
  redis.call('DEL', worker_key(id), blocks_key(id), lease_key(known[2]))
  redis.call('SREM', workers_key, id)
  append(limits, 0, 'kind', 'left', 'worker', id, 'incarnation', known[1], 'reason', reason)
end

local function set_load(limits, id, incarnation, old, new)
  if old ~= new then
    redis.call('HSET', worker_key(id), 'load', new)
    append(limits, #new, 'kind', 'load', 'worker', id, 'incarnation', incarnation, 'load', new)
  end
end

local actions = {}

function actions.look(limits)
  feel_pulse()
  redis.call('SET', pulse_key, whole(now_us()))
  local num_ended = 0
  for _, id in ipairs(redis.call('SMEMBERS', workers_key)) do
    if redis.call('EXISTS', lease_key(redis.call('HGET', worker_key(id), 'lease'))) == 0 then
      remove(limits, id, 'expired')
      num_ended = num_ended + 1
    end
  end
  return {'ok', num_ended}
end

function actions.workers()
  local found = {'ok', head()}
  for _, id in ipairs(redis.call('SMEMBERS', workers_key)) do
    found[#found + 1] = id
    local known = redis.call('HMGET', worker_key(id), 'incarnation', 'role', 'info', 'load')
    for i = 1, 4 do found[#found + 1] = known[i] end
  end
  return found
end

function actions.register(limits, id, incarnation, role, info, load, ttl_ms, lease)
  feel_pulse()
  local known = redis.call('HMGET', worker_key(id), 'incarnation', 'info', 'load', 'lease', 'replaced')
  local present = known[1]
  if present and redis.call('EXISTS', lease_key(known[4])) == 0 then
    remove(limits, id, 'expired')
    present = false
  end
  if present == incarnation then
    if known[2] ~= info then return {'reused'} end
    redis.call('DEL', lease_key(known[4]))
    redis.call('HSET', worker_key(id), 'lease', lease, 'ttl_ms', ttl_ms, 'next', '1')
    redis.call('SET', lease_key(lease), id, 'PX', ttl_ms)
    set_load(limits, id, incarnation, known[3], load)
    return {'ok', head()}
  end
  local replaced = {}
  if present then
    for one in string.gmatch(known[5], '%d+') do
      if one == incarnation then return {'replaced', present} end
      replaced[#replaced + 1] = one
    end
    replaced[#replaced + 1] = present
    if #replaced > MAX_REPLACED then table.remove(replaced, 1) end
    remove(limits, id, 'replaced')
  end
  redis.call('HSET', worker_key(id), 'incarnation', incarnation, 'role', role, 'info', info, 'load', load,
    'lease', lease, 'ttl_ms', ttl_ms, 'next', '1', 'stored', '0', 'removed', '0',
    'replaced', table.concat(replaced, ' '))
  redis.call('SADD', workers_key, id)
  redis.call('SET', lease_key(lease), id, 'PX', ttl_ms)
  append(limits, #info + #load, 'kind', 'joined', 'worker', id, 'incarnation', incarnation, 'role', role,
    'info', info, 'load', load)
  return {'ok', head()}
end

function actions.keep_alive(limits, lease, load)
  feel_pulse()
  local id = redis.call('GET', lease_key(lease))
  if not id then return {'unknown'} end
  local known = redis.call('HMGET', worker_key(id), 'incarnation', 'load', 'ttl_ms')
  redis.call('PEXPIRE', lease_key(lease), known[3])
  set_load(limits, id, known[1], known[2], load)
  return {'ok', known[3], head()}
end

function actions.deregister(limits, lease)
  feel_pulse()
  local id = redis.call('GET', lease_key(lease))
  if id then remove(limits, id, 'deregistered') end
  return {'ok', head()}
end

-- kinds: a letter for each change (s, r, c); the changes follow, each as a message that may be joined to the next.
function actions.publish(limits, lease, first, min_removed_nbytes, kinds, ...)
  feel_pulse()
  local id = redis.call('GET', lease_key(lease))
  if not id then return {'unknown'} end
  local known = redis.call('HMGET', worker_key(id), 'incarnation', 'next', 'stored', 'removed')
  local following, sequence = tonumber(known[2]), tonumber(first)
  if sequence > following then
    if string.sub(kinds, 1, 1) ~= 'c' then return {'gap', known[2]} end
    following = sequence
  end
  local changes = {...}
  local fresh = following - sequence + 1
  if fresh > #changes then return {'ok', known[2], head()} end
  local stored, removed, kept = tonumber(known[3]), tonumber(known[4]), fresh
  local cleared = false
  for i = fresh, #changes do
    local kind = string.sub(kinds, i, i)
    if kind == 'c' then
      stored, removed, kept, cleared = 0, 0, i, true
    elseif kind == 's' then
      stored = stored + #changes[i]
    else
      removed = removed + #changes[i]
    end
  end
  -- The account must not outgrow what the worker holds by more than it is worth to send that again.
  if removed > math.max(tonumber(min_removed_nbytes), stored - removed) then return {'snapshot'} end
  if cleared then redis.call('DEL', blocks_key(id)) end
  redis.call('RPUSH', blocks_key(id), table.concat(changes, '', kept))
  local all = table.concat(changes, '', fresh)
  append(limits, #all, 'kind', 'blocks', 'worker', id, 'incarnation', known[1], 'changes', all)
  following = whole(sequence + #changes)
  redis.call('HSET', worker_key(id), 'next', following, 'stored', whole(stored), 'removed', whole(removed))
  return {'ok', following, head()}
end

local limits = {entries = tonumber(ARGV[2]), nbytes = tonumber(ARGV[3])}
return actions[ARGV[1]](limits, unpack(ARGV, 4))
