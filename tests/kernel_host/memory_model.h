// What the checker remembers. A happens-before model of the Metal Shading Language specification's chapters on memory
// coherency, synchronisation functions and fences: barriers order the accesses of the address spaces that their
// mem_flags name, among the threads that meet; a fence of device scope releases or acquires through a relaxed atomic,
// as in C++. Stamps are cheap because most order comes from barriers, which order whole threadgroups.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace kernel_host {

using u32 = uint32_t;

// The bits of mem_flags.
enum Space { kDevice = 1, kThreadgroup = 2, kSpaces = 3 };

// Who touched something, and when in its own time. Epochs count the barriers of one address space.
struct Stamp {
  u32 thread = 0;  // index in the grid plus one; 0: nobody
  u32 group_epoch = 0, simd_epoch = 0;
  u32 releases = 0;
};

// What is known to have happened: all of a threadgroup before a barrier, or one thread before a release.
class Clock {
 public:
  void add_group(u32 group, u32 epoch) {
    raise(groups_, group, epoch);
  }
  void add_thread(u32 thread, u32 releases) {
    raise(threads_, thread, releases);
  }
  void merge(const Clock& other) {
    for (auto& [group, epoch] : other.groups_) {
      add_group(group, epoch);
    }
    for (auto& [thread, releases] : other.threads_) {
      add_thread(thread, releases);
    }
  }
  bool covers(const Stamp& s, u32 group) const {
    auto g = groups_.find(group);
    if (g != groups_.end() && s.group_epoch < g->second) {
      return true;
    }
    auto t = threads_.find(s.thread - 1);
    return t != threads_.end() && s.releases <= t->second;
  }

 private:
  static void raise(std::map<u32, u32>& map, u32 key, u32 value) {
    u32& v = map[key];
    v = std::max(v, value);
  }
  std::map<u32, u32> groups_, threads_;
};

// The last write of a granule and two of the reads since.
struct Cell {
  Stamp written, read[2];
};

// The values that a relaxed load may still see, in modification order.
struct Store {
  u32 value;
  Stamp by;
  std::shared_ptr<const Clock> released;  // what an acquire that reads this value learns
};
struct History {
  std::vector<Store> stores;
  bool plainly_written = false;  // since the last store
};

// Bytes that one or several buffer indices show, or one threadgroup variable.
struct Memory {
  size_t bytes = 0, granule = 1;
  Space space = kDevice;
  bool writable = false, initialised = false;
  std::vector<Cell> cells;
  std::unordered_map<size_t, History> histories;  // by the word's first byte

  Cell& cell(size_t index) {
    if (cells.empty()) {
      cells.resize((bytes + granule - 1) / granule);
    }
    return cells[index];
  }
  History* find_history(size_t byte) {
    auto h = histories.empty() ? histories.end() : histories.find(byte & ~size_t(3));
    return h == histories.end() ? nullptr : &h->second;
  }
};

// Where a kernel finds bytes of a Memory. Each buffer index has addresses of its own, also where two share a Memory.
struct Window {
  char *base = nullptr, *end = nullptr;
  Memory* memory = nullptr;
  size_t offset = 0;  // of base in memory
  bool writable = false;
  std::string name;
  uint64_t read = 0, written = 0;  // bytes
};

}  // namespace kernel_host
