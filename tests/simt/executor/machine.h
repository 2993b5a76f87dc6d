// The block that is being executed: its threads, who may run, where the others wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "executor.h"
#include "fibers.h"

namespace simt {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr int kMaxWarps = kMaxThreads / kLanes;

// A copy that has been issued and not been waited for.
struct Copy {
  char* shared;
  const char* global;
  int bytes;
  int group;
  uint32_t pc;
};

struct Thread {
  Fiber fiber;
  uint16_t index = 0;
  uint8_t warp = 0, lane = 0;
  std::vector<Copy> copies;
  int open_group = 0;  // the group that the next commit closes
};

// Lanes of one warp that have come to the same operation and wait for the others of its mask.
struct Meeting {
  int operation;
  Site site;
  unsigned mask;
  unsigned arrived;
  void* payloads[kLanes];
};

struct Warp {
  unsigned ready = 0;  // lanes that can run
  unsigned exists = 0, ended = 0, at_barrier = 0;
  std::vector<Meeting> meetings;
  // Order by __syncwarp: `clock` counts them; `lane_epoch` is the clock at a lane's last; what lane b did up to its
  // epoch known[a][b] happened before what lane a does now.
  uint32_t clock = 0;
  uint32_t lane_epoch[kLanes] = {};
  uint32_t known[kLanes][kLanes] = {};
};

// xorshift64*: small, fast, and the same everywhere.
struct Random {
  uint64_t state = 1;
  uint32_t operator()() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545F4914F6CDD1Dull) >> 32);
  }
  void seed(uint64_t value) {
    state = (value + 1) * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 4; ++i) (*this)();
  }
};

struct Machine {
  const Launch* launch = nullptr;
  uint64_t seed = 0;
  Random random;
  Index grid = {}, block = {};
  int thread_count = 0, warp_count = 0, ended_count = 0;
  unsigned ready_warps = 0;
  Thread* current = nullptr;
  Fiber host;  // the launching thread's own stack
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];

  // Barriers and blocks advance `epoch`, which never returns: what carries an older one is ordered, or stale.
  uint32_t epoch = 1, block_start = 1, launch_start = 1;
  struct {
    int waiting = 0;
    BarrierKind kind = BarrierKind::plain;
    Site site = {};
    int first_thread = 0;
    int any = 0, all = 1, count = 0, result = 0;
  } barrier;
  std::vector<std::pair<uint32_t, Index>> block_starts;  // epoch and block, to name the block of an earlier access
  uint64_t idle_turns = 0;                               // turns given up by atomics since anything else happened
};

extern Machine machine;

inline Thread& self() { return *machine.current; }
inline int own_warp_index() { return machine.current->warp; }
inline Warp& own_warp() { return machine.warps[own_warp_index()]; }

// Runs one block to its end, or until a violation brings control back to the host.
void run_block(Index block);

// The running thread waits; returns once somebody made it ready and its turn came.
void wait();
// The running thread stays ready and lets others run.
void give_up_turn();
void make_ready(int warp, unsigned lanes);

}  // namespace simt
