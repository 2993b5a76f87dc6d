#include "warp.h"

#include <algorithm>

#include "report.h"

namespace simt {

const char* operation_name(int operation) {
  constexpr const char* kNames[] = {
      "__syncwarp",    "__activemask", "__shfl_sync", "__ballot/any/all_sync", "__match_any_sync", "__match_all_sync",
      "__reduce_sync", "ldmatrix",     "mma"};
  return kNames[operation];
}

std::string lanes_text(unsigned lanes) {
  std::string text;
  for (int first = 0; first < kLanes; ++first) {
    if (!(lanes >> first & 1)) continue;
    int last = first;
    while (last + 1 < kLanes && (lanes >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(first);
    if (last > first) text += "-" + std::to_string(last);
    first = last;
  }
  return text;
}

namespace {

constexpr const char* kDivergent = "divergent warp operation";

// Raises when the lanes of `mask` can no longer come: they ended, or wait for somebody who waits here.
void check_lanes_can_come(const Warp& warp, Operation operation, unsigned mask, unsigned bit, Site site) {
  const std::string name = operation_name(operation);
  if (!(mask & bit)) violation_at(site, kDivergent, name + " with a mask that lacks the calling lane");
  if (mask & ~warp.exists) {
    violation_at(
        site, kDivergent, name + ": no lanes " + lanes_text(mask & ~warp.exists) + " in this block's last warp");
  }
  if (mask & warp.ended) {
    violation_at(site, kDivergent, name + ": lanes " + lanes_text(mask & warp.ended) + " of its mask have returned");
  }
  if (mask & warp.at_barrier) {
    violation_at(
        site, kDivergent,
        name + ": lanes " + lanes_text(mask & warp.at_barrier) + " of its mask wait at the barrier " +
            describe(machine.barrier.site));
  }
}

// The meeting to join, made at the first arrival.
Meeting& meeting_of(Warp& warp, Operation operation, unsigned mask, unsigned bit, Site site) {
  Meeting* found = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.operation == operation && meeting.mask == mask && same_site(meeting.site, site)) {
      found = &meeting;
    } else if ((meeting.mask & bit) && (mask & meeting.arrived) && meeting.operation != kActiveMask) {
      const std::string other = operation_name(meeting.operation);
      violation_at(
          site, kDivergent,
          std::string(operation_name(operation)) + ": lanes " + lanes_text(meeting.arrived) + " wait for this one in " +
              other + " at " + describe(meeting.site) +
              (meeting.mask != mask ? " with mask of lanes " + lanes_text(meeting.mask) : ""));
    }
  }
  if (found != nullptr) return *found;
  Meeting meeting = {operation, site, mask, 0, {}};
  warp.meetings.push_back(meeting);
  return warp.meetings.back();
}

void remove(Warp& warp, Meeting& meeting) {
  meeting = warp.meetings.back();
  warp.meetings.pop_back();
}

}  // namespace

void meet(Operation operation, unsigned mask, void* payload, Site site, Perform perform) {
  Warp& warp = own_warp();
  const unsigned bit = 1u << self().lane;
  if (!(mask & bit) || (mask & (~warp.exists | warp.ended | warp.at_barrier))) {
    check_lanes_can_come(warp, operation, mask, bit, site);
  }
  Meeting& meeting = meeting_of(warp, operation, mask, bit, site);
  meeting.arrived |= bit;
  meeting.payloads[self().lane] = payload;
  if (meeting.arrived != mask) {
    wait();
    return;
  }
  const Meeting complete = meeting;
  remove(warp, meeting);
  perform(complete.payloads, mask);
  if (mask != bit) make_ready(self().warp, mask & ~bit);
}

void warp_barrier(unsigned mask, Site site) {
  meet(kSyncWarp, mask, nullptr, site, [](void* const*, unsigned lanes) {
    Warp& warp = own_warp();
    uint32_t known[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int other = 0; other < kLanes; ++other) known[other] = std::max(known[other], warp.known[lane][other]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) known[lane] = warp.clock;
    }
    ++warp.clock;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      std::copy(known, known + kLanes, warp.known[lane]);
      warp.lane_epoch[lane] = warp.clock;
    }
  });
}

unsigned active_mask(Site site) {
  unsigned result = 0;
  Warp& warp = own_warp();
  Meeting* found = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.operation == kActiveMask && same_site(meeting.site, site)) found = &meeting;
  }
  if (found == nullptr) {
    Meeting meeting = {kActiveMask, site, 0, 0, {}};
    warp.meetings.push_back(meeting);
    found = &warp.meetings.back();
  }
  found->arrived |= 1u << self().lane;
  found->payloads[self().lane] = &result;
  wait();
  return result;
}

bool release_active_masks() {
  bool released = false;
  for (int w = 0; w < machine.warp_count; ++w) {
    Warp& warp = machine.warps[w];
    for (size_t i = 0; i < warp.meetings.size();) {
      Meeting& meeting = warp.meetings[i];
      if (meeting.operation != kActiveMask) {
        ++i;
        continue;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        if (meeting.arrived >> lane & 1) *static_cast<unsigned*>(meeting.payloads[lane]) = meeting.arrived;
      }
      const unsigned lanes = meeting.arrived;
      remove(warp, meeting);
      make_ready(w, lanes);
      released = true;
    }
  }
  return released;
}

}  // namespace simt
