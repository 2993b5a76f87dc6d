// What one piece of memory went through, and whether an access is ordered after it.
//
// Two accesses to the same memory, at least one of them a write, race unless they are ordered: made by one thread; in
// one block with __syncthreads between; in one warp with __syncwarp between that both lanes took part in. Different
// blocks of a launch are never ordered. Atomics do not race with atomics. Writing the value that is there is a write.
#pragma once

#include <cstdint>

#include "machine.h"

namespace simt {

enum class Use { read, write, atomic };

struct Record {
  enum Flag : uint16_t { kAtomic = 1, kPlain = 2, kManyWarps = 4, kPending = 8 };
  uint32_t epoch;
  uint32_t pc;
  uint32_t lane_epoch;
  uint16_t thread;
  uint16_t flags;
};

struct Cell {
  Record write;    // the last one
  Record read;     // the last of those (and of the atomics) since the last write
  uint32_t lanes;  // who read, when all readers are of one warp
  // A read or an atomic by an earlier block of this launch, kept when this block's own replaces it.
  uint32_t other_epoch, other_pc;
  uint16_t other_thread, other_flags;
};

struct Conflict {
  bool found = false, with_write = false;
  uint32_t epoch = 0, pc = 0;
  int thread = 0;
};

// The running thread, as the rules need it; `floor` is the epoch before which nothing counts: the start of the launch
// for global memory, of the block for shared memory.
class RaceRules {
 public:
  RaceRules(uint32_t floor, uint32_t pc)
      : floor_(floor), pc_(pc), thread_(self().index), warp_(self().warp), lane_(self().lane), of_(own_warp()) {}

  // Checks the access and records it.
  Conflict access(Cell& cell, Use use) const {
    Conflict conflict = check(cell, use);
    if (!conflict.found) record(cell, use);
    return conflict;
  }

  Conflict check(const Cell& cell, Use use) const {
    const bool atomic = use == Use::atomic;
    if (cell.write.epoch >= floor_) {
      const bool atomic_before = cell.write.flags & Record::kAtomic;
      if (unordered(cell.write) && !(atomic && atomic_before)) return conflict_with(cell.write, true);
      // Only the last atomic is in `write`; the earlier ones are among the readers.
      if (use == Use::read && atomic_before) {
        if (readers_unordered(cell, Record::kAtomic)) return conflict_with(cell.read, true);
        if (other_counts(cell, Record::kAtomic)) return conflict_with_other(cell, true);
      }
    }
    if (use == Use::read) return {};
    const uint16_t opposed = atomic ? Record::kPlain : Record::kPlain | Record::kAtomic;
    if (readers_unordered(cell, opposed)) return conflict_with(cell.read, cell.read.flags & Record::kAtomic);
    if (other_counts(cell, opposed)) return conflict_with_other(cell, cell.other_flags & Record::kAtomic);
    return {};
  }

  void record(Cell& cell, Use use) const {
    const uint16_t flag = use == Use::atomic ? Record::kAtomic : Record::kPlain;
    const Record own = {machine.epoch, pc_, of_.lane_epoch[lane_], thread_, flag};
    if (use != Use::write) add_reader(cell, own);
    if (use == Use::read) return;
    cell.write = own;
    if (use == Use::write) cell.read.epoch = 0;
  }

 private:
  bool unordered(const Record& record) const {
    if (record.epoch < machine.block_start) return true;
    if (record.epoch < machine.epoch || record.thread == thread_) return false;
    return record.thread / kLanes != warp_ || record.lane_epoch > of_.known[lane_][record.thread % kLanes];
  }

  bool readers_unordered(const Cell& cell, uint16_t opposed) const {
    const Record& read = cell.read;
    if (read.epoch < floor_ || !(read.flags & opposed)) return false;
    if (read.epoch < machine.block_start) return true;
    if (read.epoch < machine.epoch) return false;
    if ((read.flags & Record::kManyWarps) || read.thread / kLanes != warp_) return true;
    for (unsigned lanes = cell.lanes & ~(1u << lane_); lanes != 0; lanes &= lanes - 1) {
      if (read.lane_epoch > of_.known[lane_][__builtin_ctz(lanes)]) return true;
    }
    return false;
  }

  bool other_counts(const Cell& cell, uint16_t opposed) const {
    return cell.other_epoch >= floor_ && (cell.other_flags & opposed);
  }

  void add_reader(Cell& cell, const Record& own) const {
    Record& read = cell.read;
    const uint32_t bit = 1u << lane_;
    if (read.epoch != own.epoch) {
      if (read.epoch >= floor_ && read.epoch < machine.block_start) keep_other(cell);
      read = own;
      cell.lanes = bit;
      return;
    }
    if (read.flags & Record::kManyWarps) {
      read.flags |= own.flags;
      return;
    }
    if (read.thread / kLanes != warp_) {
      read.flags |= own.flags | Record::kManyWarps;
      return;
    }
    constexpr uint16_t kAny = Record::kPlain | Record::kAtomic;
    if (read.lane_epoch < own.lane_epoch && !readers_unordered(cell, kAny)) {
      read = own;
      cell.lanes = bit;
      return;
    }
    const uint16_t flags = read.flags | own.flags;
    const uint32_t epoch = read.lane_epoch > own.lane_epoch ? read.lane_epoch : own.lane_epoch;
    // The one named in a report should be another thread than the one that will write, which often reads last.
    if (cell.lanes == bit) read = own;
    read.flags = flags;
    read.lane_epoch = epoch;
    cell.lanes |= bit;
  }

  void keep_other(Cell& cell) const {
    const uint16_t flags = cell.other_epoch >= floor_ ? cell.other_flags : 0;
    cell.other_epoch = cell.read.epoch;
    cell.other_pc = cell.read.pc;
    cell.other_thread = cell.read.thread;
    cell.other_flags = flags | cell.read.flags;
  }

  static Conflict conflict_with(const Record& record, bool write) {
    return {true, write, record.epoch, record.pc, record.thread};
  }
  static Conflict conflict_with_other(const Cell& cell, bool write) {
    return {true, write, cell.other_epoch, cell.other_pc, cell.other_thread};
  }

  uint32_t floor_, pc_;
  uint16_t thread_;
  int warp_, lane_;
  const Warp& of_;
};

}  // namespace simt
