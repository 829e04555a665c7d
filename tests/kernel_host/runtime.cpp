// Runs a compute kernel that is compiled as C++: one fibre for each thread, a seeded scheduler, and a checker that is
// fed by the compiler's -fsanitize=thread and -fsanitize=alignment callbacks (their libraries are not linked). The
// rules are those of the Metal Shading Language specification; memory_model.h has the order of accesses.
//
// Stricter than Metal: all lanes of a SIMD-group take part in its operations, and a protocol between threadgroups is
// made of atomics and device-scope fences alone. Not seen: Apple's compiler and driver, fast-math, the order of a
// device's simd_sum, plain writes that race with atomic loads, more than two concurrent readers of a granule, private
// memory.
#include "runtime.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <random>
#include <set>

#include "fibre.h"
#include "memory_model.h"

namespace kernel_host {

// ---- Interface with host.py

struct Buffer {
  char* data;
  size_t bytes, offset, size;    // of the array; what is bound of it
  size_t memory, memory_offset;  // arrays that overlap share a memory
  size_t granule;
  u32 initialised, writable, bound;
  uint64_t read, written;  // results
};

struct Options {
  u32 groups[3], threads[3];
  u32 simd_width, resident_groups;
  uint64_t seed;
  u32 check, weak, preempt;  // preempt: a switch in every n-th plain access, 0 for none
};

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kThreadgroupLimit = 32 << 10;  // of every Apple GPU
constexpr size_t kThreadgroupSlot = 1 << 20;    // of addresses
constexpr size_t kGap = 64;                     // between threadgroup variables, so that overruns are seen
constexpr size_t kMargin = 32 << 20;            // of addresses, on both sides of a buffer
constexpr size_t kPoisoned = 4096;              // of a margin
constexpr int kMaxBuffers = 31;
constexpr size_t kMaxErrors = 20;
constexpr uint64_t kMaxSwitches = 400'000'000;  // a spin without end stops here

// ---- What a launch consists of

struct Group;
struct Simdgroup;

enum State { kReady, kWaiting, kDone };

struct Thread {
  u32 id, index, position[3];  // id: in the grid; index: in the threadgroup
  Group* group;
  Simdgroup* simdgroup;
  State state = kReady;
  Fibre fibre;
  char* stack;
  Location waits_at;
  u32 simd_operations = 0;
  u32 releases = 1;
  Clock acquired, seen_by_atomics;  // the latter counts from the next acquire fence on
  std::shared_ptr<const Clock> released;
  std::unordered_map<const History*, size_t> newest_seen;
};

struct Simdgroup {
  u32 first, lanes, live, arrived = 0;
  u32 epoch[kSpaces] = {};
  const char* op = nullptr;
  Location at;
  char slots[2][kMaxSimdWidth * kMaxLaneBytes];  // two operations: a slow lane still reads the previous one
};

struct Variable {
  Memory memory;
  Window window;
};

struct Group {
  u32 id, position[3];
  u32 live, arrived = 0;
  u32 epoch[kSpaces] = {};
  u32 barrier_flags = 0;
  Location barrier_at;
  Clock acquired;  // by all of its threads
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Simdgroup> simdgroups;
  std::deque<Variable> variables;
  std::unordered_map<const void*, Variable*> variable_of;
  char* scratch;
  size_t addresses_used = 0, bytes_used = 0;
};

struct Mapping {
  char* p = nullptr;
  size_t bytes = 0;
  explicit Mapping(size_t n) {
    void* m = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m != MAP_FAILED) {
      p = static_cast<char*>(m);
      bytes = n;
    }
  }
  ~Mapping() {
    if (p) {
      munmap(p, bytes);
    }
  }
  Mapping(const Mapping&) = delete;
};

struct Launch {
  Options options;
  void (*kernel)();
  u32 n_groups, n_threads;  // threads: of a group
  std::mt19937_64 random;
  u32 salt;

  std::vector<Memory> memories;
  Window windows[kMaxBuffers];
  Window no_variable;
  char *arena, *scratch;
  size_t slot_bytes, scratch_bytes;

  Fibre scheduler;
  std::vector<std::unique_ptr<Group>> groups;
  std::deque<Thread*> ready;
  std::vector<char*> free_stacks, free_scratch;
  uint64_t switches = 0;
  bool stopped = false;
  std::vector<std::string> errors;
  std::set<std::string> reported;

  u32 below(u32 n) {
    return n <= 1 ? 0 : u32(random() % n);
  }
};

Launch* launch = nullptr;
Thread* current = nullptr;

std::map<std::string, void (*)()>& kernels() {
  static std::map<std::string, void (*)()> map;
  return map;
}

// ---- Reports

std::string where(const Location& at) {
  const char* name = strrchr(at.file, '/');
  return std::string(name ? name + 1 : at.file) + ":" + std::to_string(at.line);
}
// host.py turns the address into file and line.
std::string where(void* return_address) {
  Dl_info info;
  char text[32] = "?";
  if (dladdr(return_address, &info)) {
    snprintf(
        text, sizeof text, "pc+0x%zx",
        size_t(static_cast<char*>(return_address) - 1 - static_cast<char*>(info.dli_fbase)));
  }
  return text;
}
std::string who(u32 thread_id) {
  return "thread " + std::to_string(thread_id % launch->n_threads) + " of threadgroup " +
         std::to_string(thread_id / launch->n_threads);
}
std::string who(const Stamp& s) {
  return who(s.thread - 1);
}
// Once for each key.
void report(const std::string& key, const std::string& text) {
  if (launch->errors.size() < kMaxErrors && launch->reported.insert(key).second) {
    launch->errors.push_back(text);
  }
}

// ---- Fibres

void leave(State state) {
  current->state = state;
  launch->switches++;
  Fibre::switch_from_to(current->fibre, launch->scheduler);
}

void make_ready(Thread* t) {
  t->state = kReady;
  launch->ready.push_back(t);
}

// Lets others run.
void yield() {
  if (!launch->ready.empty()) {
    launch->ready.push_back(current);
    leave(kReady);
  }
}

// Ends the launch.
[[noreturn]] void stop(const std::string& text) {
  report(text, text);
  launch->stopped = true;
  for (;;) {
    leave(kWaiting);
  }
}

std::string not_reached(const char* op, const Location& at) {
  return std::string("divergent: ") + op + " at " + where(at) + " is not reached by a thread that has returned";
}

void run_thread() {
  launch->kernel();
  Thread& t = *current;
  t.group->live--;
  t.simdgroup->live--;
  if (t.simdgroup->arrived) {
    stop(not_reached(t.simdgroup->op, t.simdgroup->at));
  }
  if (t.group->arrived) {
    stop(not_reached("threadgroup_barrier", t.group->barrier_at));
  }
  leave(kDone);
}

// ---- Accesses

Stamp now(Space space) {
  const Thread& t = *current;
  return {t.id + 1, t.group->epoch[space], t.simdgroup->epoch[space], t.releases};
}

// Whether `s` happened before what the current thread does now.
bool ordered(const Stamp& s, Space space) {
  const Thread& t = *current;
  if (s.thread == 0 || s.thread == t.id + 1) {
    return true;
  }
  const u32 group = (s.thread - 1) / launch->n_threads;
  if (group == t.group->id) {
    if (s.group_epoch < t.group->epoch[space]) {
      return true;
    }
    const u32 index = (s.thread - 1) % launch->n_threads;
    if (index / launch->options.simd_width == t.index / launch->options.simd_width &&
        s.simd_epoch < t.simdgroup->epoch[space]) {
      return true;
    }
  }
  return space == kDevice && (t.group->acquired.covers(s, group) || t.acquired.covers(s, group));
}

// Null for what is neither device nor threadgroup memory: a thread's own.
Window* window_at(const char* p) {
  const size_t in_arena = size_t(p - launch->arena);
  if (in_arena < launch->slot_bytes * kMaxBuffers) {
    return &launch->windows[in_arena / launch->slot_bytes];
  }
  if (size_t(p - launch->scratch) >= launch->scratch_bytes) {
    return nullptr;
  }
  for (Variable& v : current->group->variables) {
    if (p >= v.window.base && p < v.window.end + kGap) {
      return &v.window;
    }
  }
  launch->no_variable.base = launch->no_variable.end = current->group->scratch;
  return &launch->no_variable;
}

struct Access {
  char* p;
  size_t bytes;
  bool write, coherent;
  void* return_address;
};

void report_access(const char* kind, const Window& w, const Access& a, const std::string& more) {
  const std::string at = where(a.return_address);
  report(
      kind + w.name + at, std::string(kind) + ": " + (a.write ? "write" : "read") + " of " + w.name + " byte " +
                              std::to_string(a.p - w.base) + " (+" + std::to_string(a.bytes) + ") by " +
                              who(current->id) + " at " + at + more);
}

bool in_bounds(const Window& w, const char* p, size_t bytes) {
  return p >= w.base && p + bytes <= w.end;
}
std::string bounds_of(const Window& w) {
  return ", which has " + std::to_string(w.end - w.base) + " bytes";
}

// Plain accesses against the atomic ones; true if an atomic one has written there.
bool check_against_atomics(const Window& w, const Access& a, size_t byte) {
  Memory& m = *w.memory;
  History* h = m.find_history(byte);
  if (!h) {
    return false;
  }
  if (!ordered(h->stores.back().by, m.space)) {
    report_access("race", w, a, ", last written atomically by " + who(h->stores.back().by) + ", not ordered");
  }
  h->plainly_written |= a.write;
  return true;
}

void check_granule(const Window& w, const Access& a, size_t index) {
  Memory& m = *w.memory;
  Cell& c = m.cell(index);
  const bool atomically_written = check_against_atomics(w, a, index * m.granule);
  if (!a.write && !m.initialised && !c.written.thread && !atomically_written) {
    return report_access("uninitialised", w, a, "");
  }
  const Stamp me = now(m.space);
  if (!ordered(c.written, m.space)) {
    report_access("race", w, a, ", last written by " + who(c.written) + ", not ordered");
  } else if (
      m.space == kDevice && !a.coherent && c.written.thread &&
      (c.written.thread - 1) / launch->n_threads != current->group->id) {
    report_access("not coherent", w, a, ", written by " + who(c.written) + ": the pointer is not coherent(device)");
  }
  if (!a.write) {
    const bool first_is_free = c.read[0].thread == me.thread || ordered(c.read[0], m.space);
    c.read[first_is_free ? 0 : 1] = me;
    return;
  }
  for (Stamp& r : c.read) {
    if (!ordered(r, m.space)) {
      report_access("race", w, a, ", read by " + who(r) + ", not ordered");
    }
    r = Stamp{};
  }
  c.written = me;
}

void on_access(const Access& a) {
  if (!current) {
    return;
  }
  Window* w = window_at(a.p);
  if (!w) {
    return;
  }
  (a.write ? w->written : w->read) += a.bytes;
  if (!launch->options.check) {
    return;
  }
  if (launch->options.preempt && launch->below(launch->options.preempt) == 0) {
    yield();
  }
  if (!in_bounds(*w, a.p, a.bytes)) {
    return report_access("out-of-bounds", *w, a, bounds_of(*w));
  }
  if (a.write && !w->writable) {
    return report_access("read-only", *w, a, "");
  }
  Memory& m = *w->memory;
  if (!m.writable) {
    return;
  }
  const size_t first = size_t(a.p - w->base) + w->offset;
  for (size_t i = first / m.granule; i <= (first + a.bytes - 1) / m.granule; i++) {
    check_granule(*w, a, i);
  }
}

// ---- Atomics

struct Atomic {
  Window& window;
  char* p;
  bool reads, writes;
  size_t byte() const {
    return size_t(p - window.base) + window.offset;
  }
};

void check_against_plain(const Atomic& a, const std::string& what) {
  Memory& m = *a.window.memory;
  for (size_t i = a.byte() / m.granule; i <= (a.byte() + 3) / m.granule; i++) {
    const Cell& c = m.cell(i);
    if (!ordered(c.written, m.space)) {
      report("race" + what, "race: " + what + ", written by " + who(c.written) + " without atomics, not ordered");
    }
    for (const Stamp& r : c.read) {
      if (a.writes && !ordered(r, m.space)) {
        report("race" + what, "race: " + what + ", read by " + who(r) + " without atomics, not ordered");
      }
    }
  }
}

Atomic begin_atomic(void* address, int order, bool reads, bool writes) {
  if (order != 0) {
    report("order", "order: an atomic operation with an order other than relaxed, which Metal has for fences only");
  }
  yield();
  char* p = static_cast<char*>(address);
  Window* w = window_at(p);
  if (!w || !in_bounds(*w, p, 4)) {
    stop(
        "out-of-bounds: atomic operation on " +
        (w ? w->name + " byte " + std::to_string(p - w->base) + bounds_of(*w) : "no buffer") + " by " +
        who(current->id));
  }
  Atomic a{*w, p, reads, writes};
  w->read += reads ? 4 : 0;
  w->written += writes ? 4 : 0;
  const std::string what = launch->options.check ? "atomic operation on " + w->name + " byte " +
                                                       std::to_string(p - w->base) + " by " + who(current->id)
                                                 : std::string();
  if (reinterpret_cast<uintptr_t>(p) % 4) {
    stop("misaligned: " + what);
  }
  if (launch->options.check) {
    if (writes && !w->writable) {
      stop("read-only: " + what);
    }
    check_against_plain(a, what);
  }
  return a;
}

History& history_of(const Atomic& a) {
  Memory& m = *a.window.memory;
  History& h = m.histories[a.byte() & ~size_t(3)];
  if (h.stores.empty() || h.plainly_written) {
    u32 value;
    memcpy(&value, a.p, 4);
    h.stores.push_back({value, m.cell(a.byte() / m.granule).written, nullptr});
    h.plainly_written = false;
  }
  return h;
}

void push_store(History& h, u32 value, Space space, std::shared_ptr<const Clock> released) {
  h.stores.push_back({value, now(space), std::move(released)});
  current->newest_seen[&h] = h.stores.size() - 1;
}

u32 see(const Atomic& a, History& h, size_t index) {
  const Store& s = h.stores[index];
  if (s.by.thread == 0 && !a.window.memory->initialised) {
    report(
        "uninitialised" + a.window.name, "uninitialised: atomic operation on " + a.window.name + " byte " +
                                             std::to_string(a.p - a.window.base) + " by " + who(current->id) +
                                             " may see what was there before the kernel");
  }
  current->newest_seen[&h] = index;
  if (s.released) {
    current->seen_by_atomics.merge(*s.released);
  }
  return s.value;
}

}  // namespace

uint32_t atomic_load(void* p, int order) {
  const Atomic a = begin_atomic(p, order, true, false);
  if (!launch->options.check) {
    u32 value;
    memcpy(&value, p, 4);
    return value;
  }
  History& h = history_of(a);
  const size_t newest = h.stores.size() - 1;
  size_t oldest = newest;
  if (launch->options.weak) {  // any store that is not known to be overwritten
    while (oldest > 0 && !ordered(h.stores[oldest].by, a.window.memory->space)) {
      oldest--;
    }
    oldest = std::max(oldest, current->newest_seen[&h]);
  }
  return see(a, h, oldest + launch->below(u32(newest - oldest + 1)));
}

void atomic_store(void* p, uint32_t value, int order) {
  const Atomic a = begin_atomic(p, order, false, true);
  if (launch->options.check) {
    push_store(history_of(a), value, a.window.memory->space, current->released);
  }
  memcpy(p, &value, 4);
}

uint32_t atomic_modify_begin(void* p, int order) {
  const Atomic a = begin_atomic(p, order, true, true);
  u32 value;
  memcpy(&value, p, 4);
  if (launch->options.check) {
    History& h = history_of(a);
    value = see(a, h, h.stores.size() - 1);
  }
  return value;
}

void atomic_modify_end(void* p, uint32_t value) {
  if (launch->options.check) {
    const Atomic a{*window_at(static_cast<char*>(p)), static_cast<char*>(p), true, true};
    History& h = history_of(a);
    auto released = h.stores.back().released;  // a release goes on through read-modify-writes
    if (current->released) {
      auto both = std::make_shared<Clock>(*current->released);
      if (released) {
        both->merge(*released);
      }
      released = both;
    }
    push_store(h, value, a.window.memory->space, released);
  }
  memcpy(p, &value, 4);
}

void fence(unsigned flags, int order, int scope) {
  enum { kRelaxed, kAcquire, kRelease };
  constexpr int kDeviceScope = 3;
  yield();
  if (!(flags & kDevice) || scope < kDeviceScope || order == kRelaxed) {
    return;
  }
  Thread& t = *current;
  if (order != kRelease) {
    t.acquired.merge(t.seen_by_atomics);
  }
  if (order != kAcquire) {
    auto clock = std::make_shared<Clock>(t.group->acquired);
    clock->merge(t.acquired);
    clock->add_group(t.group->id, t.group->epoch[kDevice]);
    clock->add_thread(t.id, t.releases++);
    t.released = clock;
  }
}

// ---- Barriers and SIMD-groups

void threadgroup_barrier(unsigned flags, const Location& at) {
  Group& g = *current->group;
  current->waits_at = at;
  if (g.live < g.threads.size()) {
    stop(not_reached("threadgroup_barrier", at));
  }
  if (g.arrived && (where(g.barrier_at) != where(at) || g.barrier_flags != flags)) {
    stop("divergent: threadgroup_barrier at " + where(g.barrier_at) + " and at " + where(at));
  }
  g.barrier_at = at;
  g.barrier_flags = flags;
  if (++g.arrived < g.threads.size()) {
    return leave(kWaiting);
  }
  g.arrived = 0;
  g.epoch[kThreadgroup] += flags & kThreadgroup ? 1 : 0;
  if (flags & kDevice) {
    g.epoch[kDevice]++;
    for (auto& t : g.threads) {
      g.acquired.merge(t->acquired);
      t->acquired = Clock{};
    }
  }
  for (auto& t : g.threads) {
    if (t.get() != current) {
      make_ready(t.get());
    }
  }
  yield();
}

static void meet_lanes(const char* op, const Location& at, unsigned flags) {
  Simdgroup& s = *current->simdgroup;
  current->waits_at = at;
  if (s.live < s.lanes) {
    stop(not_reached(op, at));
  }
  if (s.arrived && (s.at.line != at.line || strcmp(s.op, op) != 0)) {
    stop(std::string("divergent: ") + s.op + " at " + where(s.at) + " and " + op + " at " + where(at));
  }
  s.op = op;
  s.at = at;
  if (++s.arrived < s.lanes) {
    return leave(kWaiting);
  }
  s.arrived = 0;
  for (Space space : {kDevice, kThreadgroup}) {
    s.epoch[space] += flags & space ? 1 : 0;
  }
  for (u32 i = s.first; i < s.first + s.lanes; i++) {
    Thread* t = current->group->threads[i].get();
    if (t != current) {
      make_ready(t);
    }
  }
}

void simdgroup_barrier(unsigned flags, const Location& at) {
  meet_lanes("simdgroup_barrier", at, flags);
}

const char* simd_exchange(
    const char* op, const void* value, size_t bytes, const Location& at, unsigned* lanes, unsigned* lane) {
  Simdgroup& s = *current->simdgroup;
  char* slots = s.slots[current->simd_operations++ % 2];
  *lanes = s.lanes;
  *lane = current->index - s.first;
  memcpy(slots + kMaxLaneBytes * *lane, value, bytes);
  meet_lanes(op, at, 0);
  return slots;
}

// ---- A kernel's arguments

RegisterKernel::RegisterKernel(const char* name, void (*run)()) {
  kernels()[name] = run;
}

void* bound_buffer(int index, size_t min_bytes) {
  if (index < 0 || index >= kMaxBuffers) {
    stop("out-of-bounds: no buffer(" + std::to_string(index) + ") in Metal");
  }
  const Window& w = launch->windows[index];
  if (size_t(w.end - w.base) < min_bytes) {
    stop("out-of-bounds: " + std::to_string(min_bytes) + " bytes of " + w.name + bounds_of(w));
  }
  return w.base;
}

void builtin_id(Builtin which, unsigned out[3]) {
  const Thread& t = *current;
  const Options& o = launch->options;
  auto scalar = [&](u32 v) {
    out[0] = v;
    out[1] = out[2] = 0;
  };
  auto triple = [&](auto of_axis) {
    for (int i = 0; i < 3; i++) {
      out[i] = of_axis(i);
    }
  };
  switch (which) {
    case kThreadIndex:
      return scalar(t.index);
    case kLaneIndex:
      return scalar(t.index % o.simd_width);
    case kSimdgroupIndex:
      return scalar(t.index / o.simd_width);
    case kSimdgroups:
      return scalar(u32(t.group->simdgroups.size()));
    case kSimdWidth:
      return scalar(o.simd_width);
    case kThreadInGrid:
      return triple([&](int i) { return t.group->position[i] * o.threads[i] + t.position[i]; });
    case kThreadInThreadgroup:
      return triple([&](int i) { return t.position[i]; });
    case kThreadgroupInGrid:
      return triple([&](int i) { return t.group->position[i]; });
    case kThreadsPerThreadgroup:
      return triple([&](int i) { return o.threads[i]; });
    case kThreadgroups:
      return triple([&](int i) { return o.groups[i]; });
    case kThreadsInGrid:
      return triple([&](int i) { return o.groups[i] * o.threads[i]; });
  }
}

void* threadgroup_variable(const void* key, size_t bytes, size_t alignment, const char* name) {
  Group& g = *current->group;
  Variable*& v = g.variable_of[key];
  if (!v) {
    const size_t align = std::max<size_t>(alignment, 16);
    auto up = [align](size_t n) { return (n + align - 1) / align * align; };
    g.bytes_used = up(g.bytes_used) + bytes;
    if (g.bytes_used > kThreadgroupLimit) {
      stop("threadgroup memory: " + std::to_string(g.bytes_used) + " bytes with " + name + ", Metal has 32 KiB");
    }
    v = &g.variables.emplace_back();
    v->window.base = g.scratch + up(g.addresses_used + kGap);
    v->window.end = v->window.base + bytes;
    v->window.memory = &v->memory;
    v->window.writable = v->memory.writable = true;
    v->window.name = std::string("threadgroup ") + name;
    v->memory.bytes = bytes;
    v->memory.granule = std::min<size_t>(alignment, 2);  // of a half; most types have parts larger than a byte
    v->memory.space = kThreadgroup;
    g.addresses_used = size_t(v->window.end - g.scratch);
    memset(v->window.base, 0xff, bytes + kGap);
  }
  return v->window.base;
}

// ---- The scheduler

namespace {

void start_group(u32 id) {
  const Options& o = launch->options;
  auto g = std::make_unique<Group>();
  g->id = id;
  g->position[0] = id % o.groups[0];
  g->position[1] = id / o.groups[0] % o.groups[1];
  g->position[2] = id / o.groups[0] / o.groups[1];
  g->live = launch->n_threads;
  g->scratch = launch->free_scratch.back();
  launch->free_scratch.pop_back();
  g->simdgroups.resize((launch->n_threads + o.simd_width - 1) / o.simd_width);
  for (u32 i = 0; i < g->simdgroups.size(); i++) {
    Simdgroup& s = g->simdgroups[i];
    s.first = i * o.simd_width;
    s.lanes = s.live = std::min(o.simd_width, launch->n_threads - s.first);
  }
  for (u32 i = 0; i < launch->n_threads; i++) {
    auto t = std::make_unique<Thread>();
    t->id = id * launch->n_threads + i;
    t->index = i;
    t->position[0] = i % o.threads[0];
    t->position[1] = i / o.threads[0] % o.threads[1];
    t->position[2] = i / o.threads[0] / o.threads[1];
    t->group = g.get();
    t->simdgroup = &g->simdgroups[i / o.simd_width];
    t->stack = launch->free_stacks.back();
    launch->free_stacks.pop_back();
    t->fibre.start(t->stack, kStackBytes, run_thread);
    make_ready(t.get());
    g->threads.push_back(std::move(t));
  }
  launch->groups.push_back(std::move(g));
}

void end_group(Group* g) {
  for (auto& t : g->threads) {
    launch->free_stacks.push_back(t->stack);
  }
  launch->free_scratch.push_back(g->scratch);
  std::erase_if(launch->groups, [g](auto& other) { return other.get() == g; });
}

// Unchecked, in turn. Checked, at random: uniformly for even seeds; for odd ones some SIMD-groups run far ahead.
Thread* next_ready() {
  auto& ready = launch->ready;
  if (launch->options.check) {
    auto priority = [](const Thread* t) {
      return ((t->id / launch->options.simd_width + 1) * 2654435761u ^ launch->salt) * 2246822519u;
    };
    u32 pick = launch->below(u32(ready.size()));
    for (int i = 0; i < 24 && launch->options.seed % 2; i++) {
      const u32 other = launch->below(u32(ready.size()));
      pick = priority(ready[other]) > priority(ready[pick]) ? other : pick;
    }
    std::swap(ready[pick], ready.front());
  }
  Thread* t = ready.front();
  ready.pop_front();
  return t;
}

void report_deadlock() {
  for (auto& g : launch->groups) {
    for (auto& t : g->threads) {
      if (t->state == kWaiting) {
        const std::string at = where(t->waits_at);
        report("deadlock" + at, "deadlock: " + who(t->id) + " waits at " + at);
      }
    }
  }
}

void run_groups() {
  const u32 resident = std::min(launch->options.resident_groups, launch->n_groups);
  Mapping stacks(size_t(resident) * launch->n_threads * kStackBytes);
  Mapping scratch(size_t(resident) * kThreadgroupSlot);
  if (!stacks.p || !scratch.p) {
    return report("memory", "no memory for the stacks of " + std::to_string(resident) + " threadgroups");
  }
  launch->scratch = scratch.p;
  launch->scratch_bytes = scratch.bytes;
  for (u32 i = 0; i < resident * launch->n_threads; i++) {
    launch->free_stacks.push_back(stacks.p + i * kStackBytes);
  }
  for (u32 i = 0; i < resident; i++) {
    launch->free_scratch.push_back(scratch.p + i * kThreadgroupSlot);
  }
  std::vector<u32> order(launch->n_groups);
  for (u32 i = 0; i < launch->n_groups; i++) {
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), launch->random);

  u32 started = 0;
  while (!launch->stopped) {
    while (started < launch->n_groups && launch->groups.size() < resident) {
      start_group(order[started++]);
    }
    if (launch->ready.empty()) {
      report_deadlock();
      break;
    }
    if (launch->switches > kMaxSwitches) {
      report("endless", "deadlock: no end after " + std::to_string(kMaxSwitches) + " switches of threads");
      break;
    }
    current = next_ready();
    Fibre::switch_from_to(launch->scheduler, current->fibre);
    if (current->state == kDone && current->group->live == 0) {
      end_group(current->group);
    }
  }
  current = nullptr;
  launch->groups.clear();
}

// ---- Buffers

size_t up_to_page(size_t n) {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (n + page - 1) / page * page;
}

int anonymous_file(size_t bytes) {
#ifdef __linux__
  const int fd = memfd_create("kernel_host", 0);
#else
  FILE* file = tmpfile();
  const int fd = file ? dup(fileno(file)) : -1;
  if (file) {
    fclose(file);
  }
#endif
  if (fd >= 0 && ftruncate(fd, off_t(bytes)) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}

// The bytes of a memory are mapped once for each buffer index, so that an address tells its index. Returns false if the
// system refuses.
bool map_buffers(Buffer* buffers, int fd, const std::vector<size_t>& file_offsets) {
  for (int i = 0; i < kMaxBuffers; i++) {
    const Buffer& b = buffers[i];
    Window& w = launch->windows[i];
    w.name = "buffer(" + std::to_string(i) + ")" + (b.bound ? "" : " (not bound)");
    char* view = launch->arena + launch->slot_bytes * i + kMargin;
    if (!b.bound) {
      w.base = w.end = view;
      continue;
    }
    Memory& m = launch->memories[b.memory];
    const size_t mapped = up_to_page(m.bytes);
    if (mapped &&
        mmap(view, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, off_t(file_offsets[b.memory])) ==
            MAP_FAILED) {
      return false;
    }
    memset(view - kPoisoned, 0xff, kPoisoned);
    memset(view + mapped, 0xff, kPoisoned);
    w.memory = &m;
    w.offset = b.memory_offset + b.offset;
    w.base = view + w.offset;
    w.end = w.base + b.size;
    w.writable = b.writable;
  }
  return true;
}

// 0xff... is a NaN in each floating type.
void fill_buffers(const Buffer* buffers) {
  std::set<const Memory*> poisoned;
  for (int i = 0; i < kMaxBuffers; i++) {
    const Window& w = launch->windows[i];
    if (buffers[i].bound && poisoned.insert(w.memory).second) {
      memset(w.base - w.offset, 0xff, up_to_page(w.memory->bytes));
    }
  }
  for (int i = 0; i < kMaxBuffers; i++) {
    if (buffers[i].bound && buffers[i].initialised) {
      memcpy(launch->windows[i].base - buffers[i].offset, buffers[i].data, buffers[i].bytes);
    }
  }
}

void run_with_buffers(Buffer* buffers) {
  for (int i = 0; i < kMaxBuffers; i++) {
    const Buffer& b = buffers[i];
    if (b.bound) {
      launch->memories.resize(std::max(launch->memories.size(), b.memory + 1));
      Memory& m = launch->memories[b.memory];
      m.granule = m.bytes ? std::min(m.granule, b.granule) : b.granule;
      m.bytes = std::max(m.bytes, b.memory_offset + b.bytes);
      m.writable |= b.writable != 0;
      m.initialised |= b.initialised != 0;
    }
  }
  size_t file_bytes = 0;
  size_t largest = 0;
  std::vector<size_t> file_offsets;
  for (const Memory& m : launch->memories) {
    file_offsets.push_back(file_bytes);
    file_bytes += up_to_page(m.bytes);
    largest = std::max(largest, up_to_page(m.bytes));
  }
  launch->slot_bytes = largest + 2 * kMargin;
  Mapping arena(launch->slot_bytes * kMaxBuffers);
  launch->arena = arena.p;
  const int fd = anonymous_file(file_bytes);
  if (fd < 0 || !arena.p || !map_buffers(buffers, fd, file_offsets)) {
    report("memory", "no memory for the buffers");
  } else {
    fill_buffers(buffers);
    run_groups();
    for (int i = 0; i < kMaxBuffers; i++) {
      Buffer& b = buffers[i];
      const Window& w = launch->windows[i];
      if (b.bound && b.writable) {
        memcpy(b.data + b.offset, w.base, b.size);
      }
      b.read = w.read;
      b.written = w.written;
    }
  }
  if (fd >= 0) {
    close(fd);
  }
}

}  // namespace
}  // namespace kernel_host

using namespace kernel_host;

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Returns 0: fine, 1: the text says what is wrong, 2: no such kernel, the text lists those there are.
EXPORTED int kernel_host_run(const char* kernel, Buffer* buffers, const Options* options, char* text, size_t capacity) {
  std::string all;
  auto found = kernels().find(kernel);
  if (found == kernels().end()) {
    for (auto& [name, run] : kernels()) {
      all += name + " ";
    }
    snprintf(text, capacity, "%s", all.c_str());
    return 2;
  }
  Launch l{};
  launch = &l;
  l.options = *options;
  l.kernel = found->second;
  l.n_groups = options->groups[0] * options->groups[1] * options->groups[2];
  l.n_threads = options->threads[0] * options->threads[1] * options->threads[2];
  l.random.seed(options->seed);
  l.salt = u32(l.random());
  l.no_variable.name = "threadgroup memory without a variable";
  run_with_buffers(buffers);
  launch = nullptr;
  for (auto& error : l.errors) {
    all += error + "\n";
  }
  snprintf(text, capacity, "%s", all.c_str());
  return l.errors.empty() ? 0 : 1;
}

// ---- What the compiler calls before each access

extern "C" {

#define READ(n, name, coherent)                                                          \
  void __tsan_##name##n(void* p) {                                                       \
    on_access({static_cast<char*>(p), n, false, coherent, __builtin_return_address(0)}); \
  }
#define WRITE(n, name, coherent)                                                        \
  void __tsan_##name##n(void* p) {                                                      \
    on_access({static_cast<char*>(p), n, true, coherent, __builtin_return_address(0)}); \
  }
#define BOTH(n, name)                                                                 \
  void __tsan_##name##n(void* p) {                                                    \
    on_access({static_cast<char*>(p), n, false, false, __builtin_return_address(0)}); \
    on_access({static_cast<char*>(p), n, true, false, __builtin_return_address(0)});  \
  }
#define ACCESSES(n)                        \
  READ(n, read, false)                     \
  READ(n, unaligned_read, false)           \
  READ(n, volatile_read, true)             \
  READ(n, unaligned_volatile_read, true)   \
  WRITE(n, write, false)                   \
  WRITE(n, unaligned_write, false)         \
  WRITE(n, volatile_write, true)           \
  WRITE(n, unaligned_volatile_write, true) \
  BOTH(n, read_write)                      \
  BOTH(n, unaligned_read_write)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* p, size_t n) {
  on_access({static_cast<char*>(p), n, false, false, __builtin_return_address(0)});
}
void __tsan_write_range(void* p, size_t n) {
  on_access({static_cast<char*>(p), n, true, false, __builtin_return_address(0)});
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  on_access({static_cast<char*>(const_cast<void*>(from)), n, false, false, __builtin_return_address(0)});
  on_access({static_cast<char*>(to), n, true, false, __builtin_return_address(0)});
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  on_access({static_cast<char*>(const_cast<void*>(from)), n, false, false, __builtin_return_address(0)});
  on_access({static_cast<char*>(to), n, true, false, __builtin_return_address(0)});
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  on_access({static_cast<char*>(to), n, true, false, __builtin_return_address(0)});
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The compiler's own layout of an -fsanitize=alignment site.
struct AlignmentSite {
  const char* file;
  u32 line, column;
  struct Type {
    uint16_t kind, info;
    char name[1];
  }* type;
  unsigned char log2_alignment, access;
};

// Metal leaves a misaligned access undefined, and the machine may trap on it: the launch ends here.
void __ubsan_handle_type_mismatch_v1(const AlignmentSite* site, char* p) {
  if (!current) {
    return;
  }
  const char* file = strrchr(site->file, '/');
  const Window* w = window_at(p);
  stop(
      std::string("misaligned: access as ") + site->type->name + ", alignment " +
      std::to_string(1 << site->log2_alignment) + ", to " + (w ? w->name : "private memory") + " byte " +
      std::to_string(w ? p - w->base : 0) + " by " + who(current->id) + " at " + (file ? file + 1 : site->file) + ":" +
      std::to_string(site->line));
}
}
