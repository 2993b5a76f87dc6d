// Turns, barriers, and the end of threads.
#include "machine.h"

#include <cstring>
#include <string>

#include "memory.h"
#include "report.h"
#include "warp.h"

namespace simt {

Machine machine;

namespace {

// Some set bit, any of them.
int pick(unsigned bits) {
  const unsigned turn = machine.random() & 31;
  const unsigned rotated = bits >> turn | bits << ((32 - turn) & 31);
  return static_cast<int>((__builtin_ctz(rotated) + turn) & 31);
}

[[noreturn]] void no_progress() {
  std::string text = "no thread can go on";
  const char* kind = "divergent barrier";
  if (machine.barrier.waiting > 0) {
    text += "; " + std::to_string(machine.barrier.waiting) + " wait at the barrier " + describe(machine.barrier.site);
  }
  for (int w = 0; w < machine.warp_count; ++w) {
    for (const Meeting& meeting : machine.warps[w].meetings) {
      kind = "divergent warp operation";
      text += "; lanes " + lanes_text(meeting.arrived) + " of warp " + std::to_string(w) + " wait in " +
              operation_name(meeting.operation) + " at " + describe(meeting.site) + " for lanes " +
              lanes_text(meeting.mask & ~meeting.arrived);
    }
  }
  violation(kind, text);
}

// The thread whose turn comes next, or null when all have ended.
Thread* next_thread() {
  while (machine.ready_warps == 0) {
    if (machine.ended_count == machine.thread_count) return nullptr;
    if (!release_active_masks()) no_progress();
  }
  const int warp = pick(machine.ready_warps);
  Warp& of = machine.warps[warp];
  const int lane = pick(of.ready);
  of.ready &= ~(1u << lane);
  if (of.ready == 0) machine.ready_warps &= ~(1u << warp);
  return &machine.threads[warp * kLanes + lane];
}

void continue_with(Fiber& from, Thread* thread) {
  if (thread == nullptr) {
    Fiber::switch_to(from, machine.host);
    return;
  }
  machine.current = thread;
  watch_stack(stack_of(thread->index), kStackBytes);
  if (&from != &thread->fiber) Fiber::switch_to(from, thread->fiber);
}

void end_thread() {
  Thread& thread = self();
  if (!thread.copies.empty()) {
    violation("copy not waited for", "the thread returned before it waited", thread.copies.front().pc);
  }
  Warp& warp = own_warp();
  const unsigned bit = 1u << thread.lane;
  if (machine.barrier.waiting > 0) {
    violation_at(
        machine.barrier.site, "divergent barrier",
        "the thread returned while thread " + std::to_string(machine.barrier.first_thread) +
            " of its block waits at the barrier " + describe(machine.barrier.site));
  }
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.mask & bit) {
      violation_at(
          meeting.site, "divergent warp operation",
          "the thread returned while lanes " + lanes_text(meeting.arrived) + " wait for it in " +
              operation_name(meeting.operation) + " at " + describe(meeting.site));
    }
  }
  warp.ended |= bit;
  ++machine.ended_count;
  machine.idle_turns = 0;
}

void thread_main() {
  machine.launch->call(machine.launch->kernel, machine.launch->arguments);
  end_thread();
  continue_with(self().fiber, next_thread());
  __builtin_unreachable();
}

}  // namespace

void wait() {
  Fiber& from = self().fiber;
  continue_with(from, next_thread());
}

void make_ready(int warp, unsigned lanes) {
  machine.warps[warp].ready |= lanes;
  machine.ready_warps |= 1u << warp;
  machine.idle_turns = 0;
}

void give_up_turn() {
  constexpr uint64_t kMostIdleTurns = 1 << 20;
  const uint64_t turns = machine.idle_turns + 1;
  if (turns > kMostIdleTurns) {
    violation("divergent barrier", "threads keep spinning on atomics; blocks run one after another");
  }
  const Thread& thread = self();
  make_ready(thread.warp, 1u << thread.lane);
  machine.idle_turns = turns;
  wait();
}

void run_block(Index block) {
  machine.block = block;
  machine.block_start = ++machine.epoch;
  machine.block_starts.emplace_back(machine.epoch, block);
  machine.barrier.waiting = 0;
  machine.ended_count = 0;
  machine.ready_warps = 0;
  const int threads = machine.launch->threads;
  machine.thread_count = threads;
  machine.warp_count = (threads + kLanes - 1) / kLanes;
  for (int w = 0; w < machine.warp_count; ++w) {
    Warp& warp = machine.warps[w];
    const int lanes = threads - w * kLanes;
    warp.exists = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    warp.ended = warp.at_barrier = 0;
    warp.meetings.clear();
    ++warp.clock;  // beyond everything known of earlier blocks
    for (uint32_t& epoch : warp.lane_epoch) epoch = warp.clock;
    make_ready(w, warp.exists);
    warp.ready = warp.exists;
  }
  for (int t = 0; t < threads; ++t) {
    Thread& thread = machine.threads[t];
    thread.index = static_cast<uint16_t>(t);
    thread.warp = static_cast<uint8_t>(t / kLanes);
    thread.lane = static_cast<uint8_t>(t % kLanes);
    thread.copies.clear();
    thread.open_group = 0;
    thread.fiber.reset(stack_of(t), kStackBytes, thread_main);
  }
  continue_with(machine.host, next_thread());
}

int block_barrier(BarrierKind kind, int predicate, Site site) {
  auto& barrier = machine.barrier;
  Thread& thread = self();
  Warp& warp = own_warp();
  const unsigned bit = 1u << thread.lane;
  if (machine.ended_count > 0) {
    violation_at(
        site, "divergent barrier", std::to_string(machine.ended_count) + " threads of the block have already returned");
  }
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.mask & bit) {
      violation_at(
          site, "divergent barrier",
          "lanes " + lanes_text(meeting.arrived) + " of the warp wait for this thread in " +
              operation_name(meeting.operation) + " at " + describe(meeting.site));
    }
  }
  if (barrier.waiting == 0) {
    barrier = {0, kind, site, thread.index, 0, 1, 0, barrier.result};
  } else if (kind != barrier.kind || !same_site(site, barrier.site)) {
    violation_at(
        site, "divergent barrier",
        "thread " + std::to_string(barrier.first_thread) + " waits at another barrier, " + describe(barrier.site));
  }
  barrier.any |= predicate != 0;
  barrier.all &= predicate != 0;
  barrier.count += predicate != 0;
  if (++barrier.waiting < machine.thread_count) {
    warp.at_barrier |= bit;
    wait();
    return barrier.result;
  }
  ++machine.epoch;
  barrier.waiting = 0;
  barrier.result = kind == BarrierKind::any ? barrier.any : kind == BarrierKind::all ? barrier.all : barrier.count;
  for (int w = 0; w < machine.warp_count; ++w) {
    const unsigned lanes = machine.warps[w].at_barrier;
    machine.warps[w].at_barrier = 0;
    if (lanes != 0) make_ready(w, lanes);
  }
  // The last to arrive has no head start either.
  make_ready(thread.warp, bit);
  wait();
  return barrier.result;
}

Index thread_index() { return {machine.current->index, 0, 0}; }
Index block_index() { return machine.block; }
Index block_size() { return {static_cast<unsigned>(machine.thread_count), 1, 1}; }
Index grid_size() { return machine.grid; }

}  // namespace simt
